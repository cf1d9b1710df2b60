"""Multi-label classification of a sentence or a pair: any number of labels for each, each a yes or no of its own.

The column of the label holds lists of names. `Split.labels`: float32 [examples, labels], 1 where the label holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.downstream.tasks.bootstrap import Weighted, f1_of
from bertpipe.downstream.tasks.kind import Encoded, Outputs, Split, Task
from bertpipe.downstream.tasks.kinds.columns import class_names, codes_of, in_order
from bertpipe.downstream.tasks.kinds.sequences import Sequences
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class MultiLabel(Sequences):
    """Each label that is likelier than not."""

    problem = "multi_label_classification"

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> np.ndarray:
        """int64 [examples, labels]: 1 where the probability, the logit's sigmoid, is above a half."""
        return (outputs.logits > 0).astype(np.int64)

    def score(self, task: Task, split: Split, predicted: np.ndarray) -> dict[str, float]:
        """By the task's metric."""
        from bertpipe.downstream.tasks.metrics import compute

        return compute(task.metric, predicted, split.labels.astype(np.int64))

    def weighted(self, task: Task, split: Split, predicted: np.ndarray) -> Weighted | None:
        """F1 over all decisions, from the sums of each example's."""
        if task.headline != "f1":
            return None
        labels = split.labels.astype(np.int64)
        return f1_of(np.column_stack([(labels & predicted).sum(1), predicted.sum(1), labels.sum(1)]))

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """Names of the labels, and the logits."""
        assert split.label_names
        line: dict[str, Any] = {"prediction": _chosen(split.label_names, predicted[row])}
        if split.labels is not None:
            line["label"] = _chosen(split.label_names, split.labels[row])
        return line | {"logits": [round(float(x), 5) for x in outputs.of(row)[0]]}

    def parse(self, lines: Sequence[Mapping[str, Any]], names: tuple[str, ...] | None) -> tuple[Split, Any]:
        """Sets of names as rows of 0 and 1."""
        split, predicted = super().parse(lines, names)
        labels, predicted = (
            np.array([[name in one for name in names or ()] for one in several], np.int64)
            for several in (split.labels, predicted)
        )
        return replace(split, labels=labels.astype(np.float32)), predicted

    def _named(
        self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None
    ) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        """See Sequences. A row may have no label at all, an empty list, but not all of train."""
        import pyarrow as pa

        kind = table.schema.field(task.label).type
        if not (pa.types.is_null(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise DataError(
                f"{where}: column {task.label!r} holds {kind}, not lists of labels; if it is a text of several, say "
                "what stands between them: finetune.task.label_separator"
            )
        rows = class_names(table, task.label, where)
        if split != "train" and all(row is None for row in rows):
            return None, names
        if None in rows:
            row = rows.index(None)
            raise DataError(f"{where}: row {row}: column {task.label!r} is null; label the row, [] if none holds")
        flat = [name for several in rows for name in several]
        at = [row for row, several in enumerate(rows) for _ in several]
        found = names or in_order(flat)
        if not found:
            raise DataError(f"{where}: column {task.label!r} has no label in any row")
        labels = np.zeros((len(rows), len(found)), np.float32)
        labels[at, codes_of(flat, at, found, task.label, where)] = 1
        return labels, found


def _chosen(names: tuple[str, ...], values: Iterable[float]) -> list[str]:
    return [name for name, value in zip(names, values, strict=True) if value]
