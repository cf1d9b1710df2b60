"""Finished runs, read back: the task's row, the scores and the predictions of each, and the scores made of them anew.

What a run wrote is enough: neither the data nor the model is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertpipe.downstream.finetuning.grid import MODEL, SCRATCH
from bertpipe.downstream.reporting.record import read_json, read_lines
from bertpipe.downstream.tasks.kind import Kind, Split, Task
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.errors import ArtifactError

TRAINED = (MODEL, SCRATCH)
"""Inits whose runs leave predictions."""


@dataclass(frozen=True)
class Run:
    """One run of fine-tuning."""

    folder: Path
    result: dict[str, Any]
    """Its scores.json."""

    @cached_property
    def task(self) -> Task:
        """The row of its task."""
        row = self.result["task"].items()
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row}
        return Task(**fields)

    @property
    def kind(self) -> Kind:
        """The task's form."""
        return KINDS[self.task.kind]

    @property
    def names(self) -> tuple[str, ...] | None:
        """The name of each code."""
        return tuple(self.result["labels"]) if self.result.get("labels") else None

    @property
    def seed(self) -> int:
        """What it was drawn from."""
        return self.result["seed"]

    def headline(self, split: str | None = None) -> float:
        """The task's one number, of the split that chooses or another evaluated one; -inf for a run that diverged."""
        name = self.task.prefix(split or self.task.validation) + self.task.headline
        return self.result["scores"].get(name, -math.inf)

    def path(self, split: str) -> Path:
        """The file of its predictions."""
        return self.folder / f"predictions-{split}.jsonl"

    def lines(self, split: str) -> list[dict[str, Any]]:
        """Its predictions for a split, in the split's order."""
        return read_lines(self.path(split))

    def parse(self, lines: list[dict[str, Any]]) -> tuple[Split, Any]:
        """Labels and predictions of `lines`, as `score` takes them; ArtifactError for lines that are none of this
        run's."""
        try:
            return self.kind.parse(lines, self.names)
        except KeyError as error:
            raise ArtifactError(
                f"{self.folder}: its predictions have no {error}; run `bertpipe finetune` again"
            ) from None

    def score(self, split: Split, predicted: Any) -> float:
        """The headline score of what `parse` gives."""
        return float(self.kind.score(self.task, split, predicted)[self.task.headline])


def find(folder: Path) -> Iterator[Run]:
    """The trained runs in a finetune artifact or the folder of one of its tasks, of a grid those of the chosen point;
    or the run whose folder it is."""
    for path in (folder, *sorted(folder.glob("*"))):
        result = read_json(path / "scores.json") if path.is_dir() else {}
        if path == folder and "task" in result:
            yield Run(folder, result)
        for row in result.get("runs", ()):
            place = path / "runs" / Path(row.get("folder", "")).name
            if row["init"] in TRAINED and "task" in (own := read_json(place / "scores.json")):
                yield Run(place, own)


def is_right(line: Mapping[str, Any]) -> bool:
    """Whether the prediction of a line is the label; of a question whether it is one of the gold answers."""
    return bool(line["exact"]) if "exact" in line else line["prediction"] == line["label"]


def best(runs: Iterable[Run]) -> Run | None:
    """The one with the highest headline score, of several the lowest seed; None where none has scores."""
    scored = (run for run in runs if run.task.headline in run.result["scores"])
    return max(scored, key=lambda run: (run.headline(), -run.seed), default=None)
