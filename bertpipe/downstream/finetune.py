"""Stage: a checkpoint -> scores on tasks, through the same packed loop as pretraining.

    finetune-<fingerprint>/
        scores.json                       every run and the median over seeds
        <task>/model/                     the best seed's stock folder, label names included
        <task>/scores.json                the task's part of scores.json
        <task>/runs/<init>-seed-<n>/      scores.json, metrics.jsonl, speed.jsonl, predictions-*.jsonl

A run, task x init x seed, is a cell (cells.py) beside the artifact; only missing ones are made. Inits: `model`, and the
baselines asked for (`scratch` is the same architecture from random weights; majority and tfidf see the same data).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config, FinetuneConfig, listed
from bertpipe.downstream import tasks
from bertpipe.downstream.baselines import BASELINES
from bertpipe.downstream.cells import Cell, cell, take
from bertpipe.downstream.kind import Task
from bertpipe.downstream.training import SCRATCH, Job, prepare, train
from bertpipe.errors import ConfigError
from bertpipe.train.place import Place


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Fine-tune and score; every process calls it, the main one writes into `out`."""
    settings = cfg.finetune
    check(cfg)
    names = tasks.chosen(settings.tasks, settings.data)
    place = Place(cfg.runtime, settings.precision)
    place.share(settings.slots_per_step, "finetune.slots_per_step")
    with place.together():
        table = {name: _Scoring(cfg, place, name, inputs.get("pretrain")).score(out / name) for name in names}
    if place.is_main:
        model = settings.model or str(inputs["pretrain"] / "model")
        artifact.write_json(out / "scores.json", {"model": model, "tasks": table})
        counts |= {name: {i: s["median"] for i, s in row["summary"].items()} for name, row in table.items()}
        counts |= {"runs": sum(len(row["runs"]) for row in table.values()), **place.facts()}


def check(cfg: Config) -> None:
    """ConfigError for unknown tasks or baselines, or no seeds; before anything is loaded."""
    settings = cfg.finetune
    for name in tasks.chosen(settings.tasks, settings.data):
        tasks.get(name)
    if not settings.seeds or (isinstance(settings.seeds, list) and len(set(settings.seeds)) < len(settings.seeds)):
        raise ConfigError(f"finetune.seeds: {settings.seeds} must be at least one seed, each once")
    choices = (*BASELINES, SCRATCH)
    for name in listed(settings.baselines):
        if name not in choices:
            raise ConfigError(f"finetune.baselines: {name!r} is not one of {', '.join(choices)}")


def runs(settings: FinetuneConfig, task: Task) -> list[tuple[str, int]]:
    """(init, seed) of every run of a task."""
    seeds = list(range(1, settings.seeds + 1)) if isinstance(settings.seeds, int) else settings.seeds
    baselines = listed(settings.baselines)
    trained = ["model", *(name for name in baselines if name == SCRATCH)]
    plain = [name for name in baselines if name in BASELINES and task.kind in BASELINES[name].kinds]
    return [(init, seed) for init in trained for seed in seeds] + [(init, seeds[0]) for init in plain]


@dataclass(frozen=True)
class _Scoring:
    """The runs of one task. All processes go through the same of them; the main one decides and writes."""

    cfg: Config
    place: Place
    name: str
    pretrained: Path | None
    """This run's pretrain artifact, where `finetune.model` is not set."""

    @property
    def model(self) -> str:
        return self.cfg.finetune.model or str(self.pretrained / "model" if self.pretrained else "")

    @cached_property
    def job(self) -> Job:
        job = prepare(self.name, self.cfg.finetune, self.model)
        if self.place.is_main:
            for split, counts in job.counts().items():
                found = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in counts.items())
                print(f"{self.name} {split}: {found}", flush=True)
        return job

    def score(self, folder: Path) -> dict[str, Any]:
        """The task's part of scores.json; `folder` is made."""
        cells = self._cells()
        for one in cells:
            self._make(one)
            self._keep_best(cells)
        if not self._agreed(folder.name == self.name and (folder / "scores.json").is_file()):
            best = self._best(cells)
            if not self._agreed(artifact.is_complete(best.model)):  # it was not the best of an earlier, wider choice
                if self.place.is_main:
                    artifact.discard(best.folder)
                self._make(best)
            if self.place.is_main:
                self._write(cells, best, folder)
            self.place.barrier()
        scores = json.loads((folder / "scores.json").read_text())
        if self.place.is_main:
            print(_line(self.name, scores), flush=True)
        return scores

    def _cells(self) -> list[Cell]:
        settings, task = self.cfg.finetune, tasks.get(self.name)
        root = Path(self.cfg.runtime.root)
        cache = root / ".hashes.json" if self.place.is_main else None
        data = tasks.identify([self.name], settings.data, cache)[self.name]
        if self.pretrained is not None and settings.model is None:
            model = artifact.read_manifest(self.pretrained)["fingerprint"]
        else:
            model = artifact.identify_model(self.model, cache)
        return [cell(root, task, data, model, init, seed, settings) for init, seed in runs(settings, task)]

    def _agreed(self, fact: bool) -> bool:
        """What the main process sees."""
        return any(self.place.sum([float(self.place.is_main and fact)]))

    def _make(self, one: Cell) -> None:
        """Make a run, if it isn't there."""
        if self._agreed(one.is_done):
            return
        writing: Any = one.committing(self.name) if self.place.is_main else contextlib.nullcontext((None, {}))
        job, started = self.job, time.monotonic()
        with writing as (scratch, counts):
            if one.init in BASELINES:
                outcome = _score_baseline(job, one.init, one.seed)
            else:
                outcome = train(self.cfg, self.place, job, one.init, one.seed, scratch)
            result = {"init": one.init, "seed": one.seed, **outcome}
            if self.place.is_main:
                artifact.write_json(
                    scratch / "scores.json",
                    result
                    | {
                        "wall_seconds": round(time.monotonic() - started, 1),
                        "labels": job.splits["train"].label_names,
                        "sizes": {split: len(data) for split, data in job.splits.items()},
                        "truncated": sum(encoded.num_truncated for encoded in job.encoded.values()),
                        "counts": job.counts(),
                    },
                )
                counts |= result["scores"]
        self.place.barrier()

    def _best(self, cells: list[Cell]) -> Cell:
        """Of the finished runs of the model, the one with the highest headline score."""
        headline = tasks.get(self.name).headline
        done = [one for one in cells if one.init == "model" and one.is_done]
        return max(done, key=lambda one: one.scores()["scores"][headline])

    def _keep_best(self, cells: list[Cell]) -> None:
        """Drop the models of the others."""
        if self.place.is_main:
            best = self._best(cells)
            for one in cells:
                if one is not best:
                    one.drop_model()

    def _write(self, cells: list[Cell], best: Cell, folder: Path) -> None:
        """Sum up a task's runs, and bring them and the best model into the artifact."""
        task = tasks.get(self.name)
        for one in cells:
            take(one.folder, folder / "runs" / one.name)
        take(best.model / "model", folder / "model")
        results = [one.scores() for one in cells]
        summary = {}
        for init in dict.fromkeys(result["init"] for result in results):
            values = [r["scores"][task.headline] for r in results if r["init"] == init]
            middle = statistics.median(values)
            summary[init] = {"median": middle, "lowest": min(values), "highest": max(values), "num_runs": len(values)}
        shared = ("labels", "sizes", "truncated", "counts")
        first = results[0]
        scores = {
            "kind": task.kind,
            "metric": task.headline,
            "labels": first["labels"],
            "num_train": first["sizes"]["train"],
            "num_validation": first["sizes"][task.validation],
            "truncated": first["truncated"],
            "counts": first["counts"],
            "runs": [{key: value for key, value in result.items() if key not in shared} for result in results],
            "summary": summary,
            "model": f"{self.name}/model",
            "model_seed": best.seed,
        }
        artifact.write_json(folder / "scores.json", scores)


def _score_baseline(job: Job, init: str, seed: int) -> dict[str, Any]:
    predicted, split = BASELINES[init].predict(job.splits, seed), job.task.validation
    details = {split: job.kind.details(job.splits[split], predicted)}
    return {"scores": job.score(split, predicted), "best_epoch": None, "details": details}


def _line(name: str, scores: dict[str, Any]) -> str:
    parts = [
        f"{init} {s['median']:.3f}" + (f" [{s['lowest']:.3f}, {s['highest']:.3f}]" if s["num_runs"] > 1 else "")
        for init, s in scores["summary"].items()
    ]
    return f"{name:<6} {scores['metric']}: " + "  ".join(parts)
