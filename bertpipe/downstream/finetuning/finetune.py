"""Stage: a checkpoint -> scores on tasks, through the same packed loop as pretraining.

    finetune-<fingerprint>/
        scores.json                       every run, the median over seeds, and the points of the grid
        table.txt                         what the command prints at the end
        submission/                       test predictions as the benchmarks' scorers want them
        <task>/model/                     the best run's stock folder, label names included
        <task>/scores.json                the task's part of scores.json
        <task>/runs/<init>-seed-<n>/      scores.json, metrics.jsonl, speed.jsonl, predictions-*.jsonl

A run, task x init x point of the grid x seed, is a cell (cells.py) beside the artifact; only missing ones are made.
Inits: `model`, and the baselines asked for (`scratch` is the same architecture from random weights; majority and tfidf
see the same data). The point with the best median on validation is chosen, and its best run's model kept.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config, named_tasks
from bertpipe.downstream.finetuning import baselines, grid, published, submission, summary, table
from bertpipe.downstream.finetuning.baselines import BASELINES
from bertpipe.downstream.finetuning.cells import Cell, cell, take
from bertpipe.downstream.finetuning.training import Job, prepare, train
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Task
from bertpipe.errors import ArtifactError
from bertpipe.train import boards
from bertpipe.train.place import Place, check_processes
from bertpipe.train.trackers import Background


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Fine-tune and score; every process calls it, the main one writes into `out`."""
    settings = cfg.finetune
    check(cfg)
    names = tasks.chosen(named_tasks(settings), settings.data, settings.task)
    check_processes(settings.slots_per_step, "finetune.slots_per_step")
    place = Place(cfg.runtime, settings.precision)
    progress = _Progress(sum(len(grid.runs(settings, tasks.get(name, settings.task))) for name in names))
    cold = _Start.of(cfg, inputs, place)
    warm = _Start.warm(cfg, place)
    scores: dict[str, Any] = {}
    with place.together(), place.watched():
        for name in grid.ordered(names, settings):
            warmed = name in grid.WARMED and name != settings.warm_start
            start = warm if warmed and warm is not None else cold
            scores[name] = _Scoring(cfg, place, name, start, progress).score(out / name)
            if name == settings.warm_start:
                warm = _Start.after(name, out / name / "model", scores[name])
    if place.is_main:
        rows = {name: scores[name] for name in names}
        artifact.write_json(out / "scores.json", {"model": cold.model, "tasks": rows})
        lines = [*table.lines(rows), *submission.write(out, rows)]
        (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines), flush=True)
        counts |= {name: {i: s["median"] for i, s in row["summary"].items()} for name, row in rows.items()}
        counts |= {"runs": progress.total, "runs_made": progress.made, **place.facts()}


def check(cfg: Config) -> None:
    """ConfigError for settings that make no runs, and for trackers that can't be; before anything is loaded."""
    grid.check(cfg.finetune)
    boards.check(cfg.runtime)


@dataclass(frozen=True)
class _Start:
    """The checkpoint that runs begin with."""

    model: str
    """Folder or Hub id."""
    identity: Any
    """Of its content; known to the main process."""
    new_head: bool = False

    @staticmethod
    def of(cfg: Config, inputs: dict[str, Path], place: Place) -> _Start:
        """`finetune.model`, or this run's pretrained model."""
        if cfg.finetune.model is None:
            return _Start(str(inputs["pretrain"] / "model"), artifact.read_manifest(inputs["pretrain"])["fingerprint"])
        cache = Path(cfg.runtime.root) / ".hashes.json"
        return _Start(cfg.finetune.model, artifact.identify_model(cfg.finetune.model, cache) if place.is_main else None)

    @staticmethod
    def warm(cfg: Config, place: Place) -> _Start | None:
        """`finetune.warm_start` where it is a checkpoint."""
        name = cfg.finetune.warm_start
        if name is None or name in tasks.TASKS:
            return None
        cache = Path(cfg.runtime.root) / ".hashes.json"
        return _Start(name, {"warm_start": artifact.identify_model(name, cache) if place.is_main else None}, True)

    @staticmethod
    def after(name: str, model: Path, scores: dict[str, Any]) -> _Start:
        """The best model of a task of this command."""
        if scores["model"] is None:
            raise ArtifactError(
                f"finetune.warm_start: every run of {name} diverged, so there is no model to start from"
            )
        return _Start(str(model), {"warm_start": scores["model_fingerprint"]}, True)


@dataclass
class _Progress:
    """Counts the runs of all tasks, and says how far it is."""

    total: int
    passed: int = 0
    made: int = 0

    def found(self, name: str, cells: list[Cell]) -> None:
        """Say how many runs of a task are there already."""
        num = sum(one.is_done for one in cells)
        self.passed += num
        if num:
            print(f"{name}: {num} of {len(cells)} runs are there already", flush=True)

    def finished(self, one: Cell, headline: str, left: int, seconds: float) -> None:
        """Say what a run came to; `left` more of its task took `seconds` each so far."""
        self.passed += 1
        self.made += 1
        outcome = one.outcome
        what = [one.task, one.run.init, *([str(one.run.point)] if one.run.point else []), f"seed {one.run.seed}"]
        result = f"{headline} {outcome['scores'][headline]:.3f}" if headline in outcome["scores"] else "no score"
        if outcome["failed"]:
            result += f" (failed: {outcome['failed']})"
        rest = f"; {left} more of {one.task}, about {_duration(left * seconds)}" if left else ""
        print(
            f"run {self.passed} of {self.total}: {' '.join(what)}: {result}, {outcome['wall_seconds']} s{rest}",
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class _Scoring:
    """The runs of one task. All processes go through the same of them; the main one decides and writes."""

    cfg: Config
    place: Place
    name: str
    start: _Start
    progress: _Progress

    @cached_property
    def job(self) -> Job:
        job = prepare(self.name, self.cfg.finetune, self.start.model, self.start.new_head)
        if self.place.is_main:
            for line in job.lines():
                print(line, flush=True)
        return job

    @property
    def task(self) -> Task:
        return tasks.get(self.name, self.cfg.finetune.task)

    @property
    def headline(self) -> str:
        return self.task.headline

    def score(self, folder: Path) -> dict[str, Any]:
        """The task's part of scores.json; `folder` is made."""
        cells = self._cells()
        if self._agreed((folder / "scores.json").is_file()):
            self.progress.passed += len(cells)
        else:
            self._make_missing(cells)
            best = self._take_best(cells, folder)
            if self.place.is_main:
                self._write(cells, best, folder)
            self.place.barrier()
        return json.loads((folder / "scores.json").read_text())

    def _cells(self) -> list[Cell]:
        """The task's runs; only the main process names them by what they depend on."""
        task, root, data = self.task, Path(self.cfg.runtime.root), None
        # `auto` is not the same everywhere, and a folder of cells may be shared
        settings = self.cfg.finetune.model_copy(update={"precision": self.place.precision})
        if self.place.is_main:
            cache, train = root / ".hashes.json", grid.is_trained(settings)
            data = tasks.identify([self.name], settings.data, cache, settings.task, train)[self.name]
        return [cell(root, task, data, self.start.identity, one, settings) for one in grid.runs(settings, task)]

    def _agreed(self, fact: bool) -> bool:
        """What the main process sees."""
        self.place.doing(self.name)
        return any(self.place.sum([float(self.place.is_main and fact)]))

    def _make_missing(self, cells: list[Cell]) -> None:
        """Make the runs that aren't there, and drop the models that no choice can fall on any more."""
        if self.place.is_main:
            self.progress.found(self.name, cells)
        left, started, made = sum(not one.is_done for one in cells), time.monotonic(), 0
        for one in cells:
            if not self._agreed(one.is_done):
                self._make(one)
                left, made = left - 1, made + 1
                if self.place.is_main:
                    self.progress.finished(one, self.headline, left, (time.monotonic() - started) / made)
            if self.place.is_main:
                wanted = {other.folder for other in summary.wanted(cells, grid.MODEL, self.headline)}
                for other in cells:
                    if other.folder not in wanted:
                        other.drop_model()

    def _make(self, one: Cell) -> None:
        copies = self._copies(one) if self.place.is_main else []
        writing: Any = one.committing() if self.place.is_main else contextlib.nullcontext((None, {}))
        job, started = self.job, time.monotonic()
        with writing as (scratch, counts):
            if one.run.init in BASELINES:
                scores: dict[str, float] = {}
                outcome: dict[str, Any] = {"scores": scores, "best_epoch": None, "failed": None}
                for split in filter(job.is_scored, job.splits):
                    predicted = baselines.predict(one.run.init, job, split, one.run.seed)
                    scores |= job.score(split, predicted)
                    outcome |= job.details(split, predicted)
            else:
                outcome = train(self._cfg(one), self.place, job, one.run.init, one.run.seed, scratch, copies)
            if self.place.is_main:
                point = vars(one.run.point) if one.run.point else {}
                waited = max((tracker.waited for tracker in copies), default=0.0)
                facts = {
                    "wall_seconds": round(time.monotonic() - started - waited, 1),
                    "task": asdict(job.task),
                    "floor": job.floor,
                    "labels": job.labels.label_names,
                    "sizes": {split: len(data) for split, data in job.splits.items()},
                    "truncated": sum(encoded.num_truncated for encoded in job.encoded.values()),
                    "counts": job.counts(),
                }
                result = {"init": one.run.init, "seed": one.run.seed, **point, **outcome, **facts}
                artifact.write_json(scratch / "scores.json", result)
                counts |= outcome["scores"]
        self.place.barrier()

    def _copies(self, one: Cell) -> list[Background]:
        """The trackers that show a run while it trains, each run under a name of its own."""
        run, cfg = one.run, self._cfg(one)
        config = cfg.model_dump(mode="json") | {"run": {"task": one.task, "init": run.init, "seed": run.seed}}
        name = f"{one.task[:40]}-{run.name(self._several)}-{one.fingerprint[:12]}"
        return boards.open_all(cfg.runtime, name, config)

    @property
    def _several(self) -> bool:
        """Whether runs are told apart by their point too."""
        return len(grid.points(self.cfg.finetune)) > 1

    def _cfg(self, one: Cell) -> Config:
        return self.cfg.model_copy(update={"finetune": one.settings})

    def _take_best(self, cells: list[Cell], folder: Path) -> Cell | None:
        """The best run of the chosen point, its model brought to `folder`; made again where it was dropped."""
        index = -1
        if self.place.is_main:
            best = summary.best(summary.choose(cells, grid.MODEL, self.headline), self.headline)
            index = -1 if best is None else cells.index(best)
        index = int(self.place.sum([float(index) if self.place.is_main else 0.0])[0])
        if index < 0:
            return None
        best = cells[index]
        while not self._agreed(self.place.is_main and best.take_model(folder / "model")):
            if self.place.is_main:
                print(f"{self.name}: {best.run.name(several=True)} is made again, for its model", flush=True)
            again: Any = best.remaking() if self.place.is_main else contextlib.nullcontext()
            with again as scratch:
                train(self._cfg(best), self.place, self.job, best.run.init, best.run.seed, scratch)
        return best

    def _write(self, cells: list[Cell], best: Cell | None, folder: Path) -> None:
        """Sum up a task's runs, and bring them into the artifact; scores.json last."""
        task, several = self.task, self._several
        for one in cells:
            take(one.folder, folder / "runs" / one.run.name(several))
        chosen = {
            init: summary.choose(cells, init, task.headline) for init in dict.fromkeys(one.run.init for one in cells)
        }
        shared = ("task", "labels", "sizes", "truncated", "counts", "floor")
        rows = [
            {key: value for key, value in one.outcome.items() if key not in shared}
            | {"folder": f"{self.name}/runs/{one.run.name(several)}"}
            for group in chosen.values()
            for one in group
        ]
        first = cells[0].outcome
        scores = {
            "kind": task.kind,
            "metric": task.headline,
            "labels": first["labels"],
            "num_train": first["sizes"].get("train", 0),
            "num_validation": first["sizes"][task.validation],
            "truncated": first["truncated"],
            "counts": first["counts"],
            "floor": first["floor"],
            "runs": rows,
            "summary": {
                init: summary.summarise([one.outcome for one in group], task.headline)
                | ({"point": vars(group[0].run.point)} if several and group[0].run.point else {})
                for init, group in chosen.items()
            },
            "further": summary.further(task, [one.outcome for one in chosen[grid.MODEL]]),
            "grid": summary.grid_rows(cells, task.headline),
            "model": f"{self.name}/model" if best else None,
            "model_seed": best.run.seed if best else None,
            "model_fingerprint": best.fingerprint if best else None,
            "published": published.of(self.name),
        }
        artifact.write_json(folder / "scores.json", scores)
