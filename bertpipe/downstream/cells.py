"""Runs that are kept: `{root}/cells/<task>-<fingerprint>/`, one committed unit for each task x init x seed x recipe.

A cell is named by everything its result depends on, so any finetune artifact that asks for the same run takes it from
here: a task added, a seed more or a wider grid cost only what is new. The model of a run is a unit of its own beside
it, because only the best is kept; of a cell whose model is wanted again and gone, the run is made again, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import FinetuneConfig
from bertpipe.downstream.kind import Task
from bertpipe.errors import ArtifactError

FOLDER = "cells"
VERSION = 1  # raised when the same recipe would now give another result
ELSEWHERE = {"tasks", "data", "model", "seeds", "baselines"}
"""Settings that say which runs there are, or where something lies; not what a run is."""


@dataclass(frozen=True)
class Cell:
    """One run: what it is, and where it stands or will stand."""

    init: str
    seed: int
    settings: FinetuneConfig
    folder: Path

    @property
    def model(self) -> Path:
        """The folder of its fine-tuned model."""
        return self.folder.with_name(f"{self.folder.name}-model")

    @property
    def name(self) -> str:
        """Among the runs of its task."""
        return f"{self.init}-seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether its scores stand."""
        return artifact.is_complete(self.folder)

    def scores(self) -> dict[str, Any]:
        """Its scores.json; ArtifactError when the cell is damaged."""
        if problems := artifact.verify(self.folder):
            raise ArtifactError(f"{problems[0]}; delete {self.folder} and run the command again")
        return json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def committing(self, task: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield (scratch folder, counts); `scratch/model`, if the body makes it, becomes the unit of its own."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        facts = {"task": task, "init": self.init, "seed": self.seed}
        with artifact.committing(self.folder, kind="run", **facts) as (scratch, counts):
            artifact.clear(scratch)  # a run is redone whole
            artifact.discard(self.model)
            artifact.discard(self.model.with_name(self.model.name + artifact.PARTIAL))
            yield scratch, counts
            if (scratch / "model").is_dir():
                with artifact.committing(self.model, kind="model", **facts) as (place, _):
                    (scratch / "model").replace(place / "model")

    def drop_model(self) -> None:
        """Its model is not the best."""
        artifact.discard(self.model)


def cell(root: Path, task: Task, data: Any, model: Any, init: str, seed: int, settings: FinetuneConfig) -> Cell:
    """The cell of a run below `root`; `data` and `model` are content identities."""
    fingerprint = artifact.digest(
        {
            "version": VERSION,
            "task": asdict(task),
            "data": data,
            "model": model,
            "init": init,
            "seed": seed,
            "settings": settings.model_dump(mode="json", exclude=ELSEWHERE),
        }
    )
    return Cell(init, seed, settings, root / FOLDER / f"{task.name}-{fingerprint[:12]}")


def take(source: Path, target: Path) -> None:
    """The files of a committed unit, in `target` as well: as links where the disk has them, else as copies."""
    artifact.discard(target)
    for path in artifact.list_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)
