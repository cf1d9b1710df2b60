"""Classification and regression of a sentence or a pair: one label for each.

`Split.labels`: int64 codes [examples], or float32 numbers [examples].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks.encode import encode_texts
from bertpipe.downstream.tasks.kind import OWN, UNLABELLED, Encoded, Kind, Outputs, Split, Task, counted, name_fields
from bertpipe.downstream.tasks.kinds import columns
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from bertpipe.config import FinetuneConfig


class Sequences(Kind):
    """What both have in common."""

    head = "sequence"
    problem: str
    """`problem_type` of the stock config."""

    def read(self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None) -> Split:
        """Texts and labels; see Kind."""
        if task.labels and names and names != task.labels:
            raise DataError(
                f"{where}: column {task.label!r} names its codes {names}, the task {task.name} {task.labels}"
            )
        texts = columns.texts(table, task, where)
        labels, label_names = None, task.labels or names
        if task.label in table.column_names:
            if task.labels == ():
                labels, label_names = self._named(table, task, split, where, names)
            else:
                labels = self._labels(table, task, split, where)
        return Split(texts, labels, columns.identifiers(table), label_names, columns.empty(texts))

    def encode(self, split: Split, tokenizer: Any, settings: FinetuneConfig) -> Encoded:
        """[CLS] a [SEP], or [CLS] a [SEP] b [SEP], cut to `finetune.max_length`."""
        tokens = encode_texts(split.texts, tokenizer, settings.max_length)
        examples = Examples(tokens.input_ids, tokens.token_type_ids, split.labels)
        return Encoded(examples, counted(cut_to_max_length=tokens.num_truncated))

    def model_fields(self, split: Split) -> dict[str, Any]:
        """The labels' names, or one output; and the stock loss."""
        return name_fields(split.label_names) | {"problem_type": self.problem}

    def score(self, task: Task, split: Split, predicted: np.ndarray) -> dict[str, float]:
        """By the task's metric."""
        from bertpipe.downstream.tasks.metrics import compute  # imports `evaluate`

        return compute(task.metric, predicted, split.labels)

    def _labels(self, table: pa.Table, task: Task, split: str, where: str) -> np.ndarray | None:
        """[rows] int64 codes or float32 numbers; None where none is labelled (all -1 or null) and it isn't train."""
        import pyarrow as pa

        column = table[task.label]
        kind = column.type
        classify = task.labels is not None
        fits = pa.types.is_integer(kind) or (not classify and pa.types.is_floating(kind)) or pa.types.is_null(kind)
        if not fits:
            wanted = f"the integer codes {_codes(task)}" if classify else "numbers"
            raise DataError(f"{where}: column {task.label!r} holds {kind}, the task {task.name} needs {wanted}")
        values = column.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy()
        missing = (values == UNLABELLED) | np.isnan(values)
        if split != "train" and missing.all():
            return None
        none = "-1 or null"
        if task.source == OWN and not classify:  # -1 is a number as others are
            missing, none = np.isnan(values), "null"
        if missing.any():
            row = int(missing.argmax())
            raise DataError(f"{where}: row {row}: column {task.label!r} is {none}; label the row or remove it")
        if not classify:
            outside = ~np.isfinite(values)
        else:
            assert task.labels
            outside = (values < 0) | (values >= len(task.labels))
        if outside.any():
            row = int(outside.argmax())
            wanted = f"one of {_codes(task)}" if classify else "a finite number"
            raise DataError(f"{where}: row {row}: column {task.label!r} is {values[row]:g}, not {wanted}")
        return values.astype(np.int64 if classify else np.float32)

    def _named(
        self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None
    ) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        """The same where the row leaves the names of the classes to the data: (labels, `names` or those found)."""
        import pyarrow as pa

        if pa.types.is_nested(table.schema.field(task.label).type):
            raise DataError(
                f"{where}: column {task.label!r} holds {columns.type_name(table.schema.field(task.label).type)}, "
                "not one class a row; for lists of them the kind is multi_label"
            )
        values = columns.class_names(table, task.label, where)
        if split != "train" and not any(values):
            return None, names
        if None in values:
            raise DataError(
                f"{where}: row {values.index(None)}: column {task.label!r} is empty, null or -1, which is no label; "
                "label the row or remove it (a class can't be called -1: call it otherwise)"
            )
        found = names or columns.in_order(values)
        if len(found) == 1:
            raise DataError(f"{where}: column {task.label!r} is {found[0]!r} in every row; classification needs two")
        codes = columns.codes_of(values, range(len(values)), found, task.label, where)
        return np.array(codes, np.int64), found


def _codes(task: Task) -> str:
    """`0 (negative), 1 (positive)`, or where the codes are the names `0, 1`"""
    return ", ".join(f"{n} ({name})" if name != str(n) else name for n, name in enumerate(task.labels or ()))


class Classification(Sequences):
    """One class of several."""

    problem = "single_label_classification"

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> np.ndarray:
        """The likeliest code, int64 [examples]."""
        return outputs.logits.argmax(-1)

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """Names of the classes, and the logits."""
        assert split.label_names
        line: dict[str, Any] = {"prediction": split.label_names[int(predicted[row])]}
        if split.labels is not None:
            line["label"] = split.label_names[int(split.labels[row])]
        return line | {"logits": [round(float(x), 5) for x in outputs.of(row)[0]]}

    def parse(self, lines: Sequence[Mapping[str, Any]], names: tuple[str, ...] | None) -> tuple[Split, Any]:
        """Codes in place of names, int64 [examples]."""
        split, predicted = super().parse(lines, names)
        codes = {name: code for code, name in enumerate(names or ())}
        labels = np.array([codes[name] for name in split.labels], np.int64)
        return replace(split, labels=labels), np.array([codes[name] for name in predicted], np.int64)


class Regression(Sequences):
    """A number."""

    problem = "regression"

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> np.ndarray:
        """float64 [examples]"""
        return outputs.logits[:, 0].astype(np.float64)

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """The numbers."""
        line: dict[str, Any] = {"prediction": float(predicted[row])}
        if split.labels is not None:
            line["label"] = float(split.labels[row])
        return line | {"logits": [round(float(x), 5) for x in outputs.of(row)[0]]}
