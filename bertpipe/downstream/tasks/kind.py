"""The words that fine-tuning is described in: Task (a row of the table), Split (its checked data), Kind (its form: how
it is read, encoded, decided and scored).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from bertpipe.config import FinetuneConfig
    from bertpipe.data.batches import Examples
    from bertpipe.downstream.tasks.bootstrap import Weighted

UNLABELLED = -1
"""GLUE's code for a label that is kept secret: every label of a test split."""
CUT = ("cut_to_max_length", "questions_cut")
"""Reasons in `Encoded.counts`."""
OWN = "own"
"""`Task.source` of a task of the user's own (own_task.py)."""


@dataclass(frozen=True)
class Task:
    """One row of the task table."""

    name: str
    kind: str
    """Key into KINDS."""
    text: tuple[str, ...]
    """The columns of the text: of the sentence, or of both sentences of a pair; else as the kind says."""
    label: str
    """The column of the label."""
    labels: tuple[str, ...] | None
    """The name of each code, in order. Empty: the data decides (`Split.label_names`). None: there are no codes."""
    metric: str
    """Key into metrics.METRICS; `squad` and `squad_v2` are in squad_metric.py."""
    headline: str
    """The one number of that metric to show first, and to choose by."""
    source: str
    """Key into SOURCES: where the data comes from."""
    evaluated: tuple[str, ...] = ("validation",)
    """Labelled splits to score; the first one chooses the epoch and the best run."""
    predicted: tuple[str, ...] = ("test",)
    """Splits that may be missing, and whose labels may be secret: predictions are written."""
    diagnostic: Mapping[str, str] = field(default_factory=dict)
    """Those of `predicted` that lie beside the task, as `test` of a folder (of the Hub: a config) called as they are;
    and the metric (key into metrics.METRICS) that scores each where it is labelled."""
    other_text: tuple[str, ...] = ()
    """What another edition of the same data calls the columns of `text`."""
    templates: tuple[str, ...] = ()
    """Format strings that make the texts of an example out of the columns; empty: the columns are the texts."""
    phrases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of columns that hold a keyword: what to read in its place, by keyword."""
    trained: bool = True
    """Whether the training split is wanted; with `finetune.epochs: 0` it isn't."""

    @property
    def validation(self) -> str:
        """The split that chooses."""
        return self.evaluated[0]

    @property
    def required(self) -> tuple[str, ...]:
        """The splits that must be there."""
        return ("train", *self.evaluated) if self.trained else self.evaluated

    @property
    def splits(self) -> tuple[str, ...]:
        """All that there may be."""
        return (*self.required, *self.predicted)

    def prefix(self, split: str) -> str:
        """What the names of a split's scores begin with: nothing for the one that chooses, else `mismatched_`."""
        return "" if split == self.validation else split.removeprefix("validation_") + "_"


@dataclass(frozen=True)
class Split:
    """The examples of one split, in the file's order."""

    texts: list[tuple[str, ...]]
    """The texts of each example, as its kind says: one, the two of a pair, the words of a sentence."""
    labels: Any
    """One for each example, in the form of its kind; None where they are secret: predictions only, no score."""
    ids: list[int] | list[str]
    """What each example is called: the column `idx`, or else the row number; for `docs` package:file#paragraph."""
    label_names: tuple[str, ...] | None
    """The name of each code; None where there are no codes."""
    counts: dict[str, int] = field(default_factory=dict)
    """What people should know of it, by reason: what is odd and was kept, what was taken out of it."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Encoded:
    """A split as tokens, and what its kind remembers to turn logits back into answers."""

    examples: Examples
    counts: dict[str, int] = field(default_factory=dict)
    """What was done to them, by reason; those of CUT lost tokens."""
    notes: Any = None
    """For `Kind.decide` alone."""

    @property
    def num_truncated(self) -> int:
        """Examples of which tokens were cut off."""
        return sum(self.counts.get(reason, 0) for reason in CUT)


@dataclass(frozen=True)
class Outputs:
    """A model's logits for a split: those of item i of its Examples are `logits[first[i] : first[i + 1]]`."""

    logits: np.ndarray
    """float32 [rows, L]"""
    first: np.ndarray
    """int64 [items + 1]"""

    def of(self, item: int) -> np.ndarray:
        """float32 [rows of the item, L]"""
        return self.logits[self.first[item] : self.first[item + 1]]


class Kind(abc.ABC):
    """A form of task. Its methods keep no state: what they need of one another is in Split and Encoded."""

    head: str
    """Key into model/labelled.py's HEADS_OF: stock auto class and loss."""
    pipeline: str = "text-classification"
    """The stock pipeline that runs the saved model; the Hub calls its tasks so too."""

    def columns(self, task: Task) -> tuple[str, ...]:
        """The columns that a labelled table must have; the label's last."""
        return (*task.text, task.label)

    @abc.abstractmethod
    def read(self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None) -> Split:
        """Check one table, which has rows and the kind's columns (but perhaps no label, if `split` is in
        `task.predicted`). `where` names it in errors. `names` are the label names that it declares; of a task whose
        row leaves them to the data, those of the training split, where None means that this is it. DataError names
        file, row, column and remedy."""

    @abc.abstractmethod
    def encode(self, split: Split, tokenizer: Any, settings: FinetuneConfig) -> Encoded:
        """Tokens, with the labels where the split has them."""

    @abc.abstractmethod
    def model_fields(self, split: Split) -> dict[str, Any]:
        """Fields of the stock config that the training split decides: num_labels, id2label, ..."""

    @abc.abstractmethod
    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> Any:
        """The prediction of each example: a sequence as long as the split."""

    @abc.abstractmethod
    def score(self, task: Task, split: Split, predicted: Any) -> Mapping[str, float]:
        """The task's official metrics of a labelled split, `task.headline` among them; each from 0 or -1 to 1, save for
        thresholds (`_thresh`)."""

    def final(self, task: Task, predicted: Any, scores: Mapping[str, float]) -> Any:
        """The predictions, once the scores of the split that chooses are known: a threshold chosen there is applied."""
        return predicted

    @abc.abstractmethod
    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """What predictions-*.jsonl says of an example beside id and text: `prediction`, `label` where known, ..."""

    def parse(self, lines: Sequence[Mapping[str, Any]], names: tuple[str, ...] | None) -> tuple[Split, Any]:
        """Of the lines of a labelled split the labels and the predictions, as `score` takes them; `names` are the
        label names. What `score` makes of them is what it made of the run's."""
        texts, ids = [tuple(line.get("text", ())) for line in lines], [line["id"] for line in lines]
        return Split(texts, [line["label"] for line in lines], ids, names), [line["prediction"] for line in lines]

    def weighted(self, task: Task, split: Split, predicted: Any) -> Weighted | None:
        """The headline score of resampled examples, where it has a quick form that is not one of bootstrap.py's."""
        return None

    def details(self, split: Split, predicted: Any) -> dict[str, Any]:
        """What scores.json says of a labelled split beside its scores, by name: scores of parts of it."""
        return {}

    def files(self, split: Split, predicted: Any) -> dict[str, str]:
        """The predictions in official formats, by file ending."""
        return {}


def counted(**numbers: int) -> dict[str, int]:
    """Those that are not 0."""
    return {reason: number for reason, number in numbers.items() if number}


def name_fields(names: tuple[str, ...] | None) -> dict[str, Any]:
    """num_labels, id2label and label2id of a stock config; one output where there are no names."""
    fields: dict[str, Any] = {"num_labels": len(names) if names else 1}
    if names:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return fields
