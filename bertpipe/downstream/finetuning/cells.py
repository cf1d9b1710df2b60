"""Runs that are kept: `{root}/cells/<task>-<fingerprint>/`, one committed unit for each task x init x point x seed.

A cell is named by everything its result depends on, so any finetune artifact that asks for the same run takes it from
here: a task added, a seed more or a wider grid cost only what is new. The model of a run is a unit of its own beside
it, because only the best is kept; of a cell whose model is wanted again and gone, the run is made again, bit for bit.
Artifacts hold the files themselves (as hard links where the disk has them): the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import FinetuneConfig
from bertpipe.downstream.finetuning import grid
from bertpipe.downstream.finetuning.grid import Run
from bertpipe.downstream.tasks.kind import Task
from bertpipe.errors import ArtifactError

FOLDER = "cells"
VERSION = 1  # raised when the same recipe would now give another result
ELSEWHERE = {"tasks", "task", "data", "model", "seeds", "baselines", "warm_start"}
"""Settings that say which runs there are, or where something lies; not what a run is."""


@dataclass(frozen=True)
class Cell:
    """One run: what it is, and where it stands or will stand."""

    task: str
    run: Run
    settings: FinetuneConfig
    """Those of its point."""
    fingerprint: str
    folder: Path

    @property
    def model(self) -> Path:
        """The folder of its fine-tuned model."""
        return self.folder.with_name(f"{self.folder.name}-model")

    @property
    def is_done(self) -> bool:
        """Whether its scores stand."""
        return artifact.is_complete(self.folder)

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """The scores.json of a finished cell; ArtifactError when it is damaged."""
        _intact(self.folder)
        return json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def committing(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield (scratch folder, counts); `scratch/model`, if the body makes it, becomes the unit of its own."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with artifact.committing(self.folder, kind="run", **self._facts) as (scratch, counts):
            artifact.clear(scratch)  # a run is redone whole
            self.drop_model()
            yield scratch, counts
            if (scratch / "model").is_dir():
                with artifact.committing(self.model, kind="model", **self._facts) as (place, _):
                    artifact.clear(place)
                    (scratch / "model").replace(place / "model")

    @contextlib.contextmanager
    def remaking(self) -> Iterator[Path]:
        """Yield a folder to make the run in once more, for its model; ArtifactError if it now predicts otherwise."""
        with artifact.committing(self.model, kind="model", **self._facts) as (scratch, _):
            artifact.clear(scratch)
            yield scratch
            for path in sorted(self.folder.glob("predictions-*")):
                if (scratch / path.name).read_bytes() != path.read_bytes():
                    raise ArtifactError(
                        f"{path}: made again, for its model, the run predicts otherwise (another number of threads, "
                        f"device or version?); delete {self.folder} and run the command again"
                    )
            for path in scratch.iterdir():
                if path.is_file() and path.name != artifact.LOCK:
                    path.unlink()

    def take_model(self, target: Path) -> bool:
        """Bring the model to `target`; False where it is not kept, ArtifactError where it is damaged.

        Another command may drop it meanwhile.
        """
        try:
            _intact(self.model)
            take(self.model / "model", target)
            return True
        except (ArtifactError, FileNotFoundError):
            if artifact.is_complete(self.model):
                raise
            return False

    def drop_model(self) -> None:
        """Its model is not wanted; it goes at once, so that half of one is never taken for a whole."""
        gone = self.model.with_name(f"{self.model.name}.dropped")
        shutil.rmtree(gone, ignore_errors=True)  # of a process that was killed here
        with contextlib.suppress(FileNotFoundError):
            self.model.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @property
    def _facts(self) -> dict[str, Any]:
        return {"task": self.task, "fingerprint": self.fingerprint, **asdict(self.run)}


def cell(root: Path, task: Task, data: Any, model: Any, run: Run, settings: FinetuneConfig) -> Cell:
    """The cell of a run below `root`; `data` and `model` are content identities."""
    recipe = {"version": VERSION, "task": asdict(task), "data": data, "init": run.init, "seed": run.seed}
    settings = grid.at(settings, run.point)
    if run.point:  # the other baselines depend on nothing else
        recipe |= {"model": model, "settings": settings.model_dump(mode="json", exclude=ELSEWHERE)}
    fingerprint = artifact.digest(recipe)
    return Cell(task.name, run, settings, fingerprint, root / FOLDER / f"{task.name}-{fingerprint[:12]}")


def take(source: Path, target: Path) -> None:
    """The files of a committed unit, in `target` as well: as links where the disk has them, else as copies."""
    artifact.discard(target)
    for path in artifact.list_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copy2(path, place)


def _intact(folder: Path) -> None:
    """ArtifactError, saying what to do, unless a unit is as it was committed."""
    if problems := artifact.verify(folder):
        raise ArtifactError(f"{problems[0]}; delete {folder} and run the command again")
