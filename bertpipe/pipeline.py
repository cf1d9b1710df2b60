"""The pipeline, as a table: read it top to bottom.

A stage is done when its folder stands under the name its recipe gives. `run` makes one stage, `plan` says how each
stands. Stages are imported when they run, so nothing here loads torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe import artifact, floors
from bertpipe.config import Config, named_tasks
from bertpipe.config_files import read_preset
from bertpipe.errors import ArtifactError, ConfigError

MULTI_PROCESS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Stage:
    """One arrow of the pipeline."""

    name: str
    module: str
    """Where its `run(cfg, inputs, out, counts)` lives."""
    needs: Callable[[Config], tuple[str, ...]]
    """Stages whose artifacts it reads."""
    reads: tuple[str, ...]
    """Config sections that determine its result."""
    raw: Callable[[Config, Path], dict[str, Any]] = lambda cfg, cache: {}
    """Content identity of inputs from outside, given a cache file for hashes."""
    checked: bool = False
    """Whether its module has `check(cfg)`, which refuses settings that can't work."""
    version: int = 1
    """Raised when the same settings would now give another result."""


def _corpus_raw(cfg: Config, cache: Path) -> dict[str, Any]:
    from bertpipe.data import corpus

    return corpus.identify(cfg.corpus, cache)


def _tokenizer_raw(cfg: Config, cache: Path) -> dict[str, Any]:
    from bertpipe.data import tokenizer

    return tokenizer.identify(cfg.tokenizer, cache)


def _pretrain_raw(cfg: Config, cache: Path) -> dict[str, Any]:
    extends: dict[str, Any] = {}
    if cfg.train.extend_from:
        try:
            extends = {"extends": artifact.read_recipe(Path(cfg.train.extend_from))["fingerprint"]}
        except ArtifactError as error:
            raise ConfigError(f"train.extend_from: {error}") from None
    if cfg.model.init:
        return {"init": artifact.identify_model(cfg.model.init, cache)} | extends
    return {"preset": read_preset(cfg.model.preset)} | extends


def _finetune_raw(cfg: Config, cache: Path) -> dict[str, Any]:
    from bertpipe.downstream.finetuning import grid
    from bertpipe.downstream.tasks import tasks

    settings, trained = cfg.finetune, grid.is_trained(cfg.finetune)
    names = tasks.chosen(named_tasks(settings), settings.data, settings.task)
    raw: dict[str, Any] = {"data": tasks.identify(names, settings.data, cache, settings.task, trained)}
    if settings.model:
        raw["model"] = artifact.identify_model(settings.model, cache)
    if start := settings.warm_start:
        raw["warm_start"] = start if start in tasks.TASKS else artifact.identify_model(start, cache)
    return raw


def _everything_made(cfg: Config) -> tuple[str, ...]:
    """What report and publish look at, as a rule; with `finetune.model` nothing was pretrained here."""
    made: tuple[str, ...] = () if cfg.finetune.model else ("corpus", "tokenizer", "shards", "pretrain")
    return (*made, "finetune") if named_tasks(cfg.finetune) or cfg.finetune.task else made


def _published(cfg: Config) -> tuple[str, ...]:
    """What publish looks at."""
    return ("corpus", "tokenizer") if cfg.publish.tokenizer else _everything_made(cfg)


def wanted(cfg: Config) -> tuple[str, ...]:
    """The stages of `bertpipe all`; a model from elsewhere is published only as a fine-tuned one."""
    publishes = not cfg.finetune.model or cfg.publish.task
    return (*_everything_made(cfg), "report", *(["publish"] if publishes else []))


STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", "bertpipe.data.corpus", lambda cfg: (), ("corpus",), _corpus_raw),
        Stage("tokenizer", "bertpipe.data.tokenizer", lambda cfg: ("corpus",), ("tokenizer",), _tokenizer_raw),
        Stage("shards", "bertpipe.data.shards", lambda cfg: ("corpus", "tokenizer"), ("shards",)),
        Stage(
            "pretrain",
            "bertpipe.train.pretrain",
            lambda cfg: ("tokenizer", "shards"),
            ("model", "masking", "optim", "train"),
            _pretrain_raw,
            checked=True,
        ),
        Stage(
            "finetune",
            "bertpipe.downstream.finetuning.finetune",
            lambda cfg: () if cfg.finetune.model else ("pretrain",),
            ("finetune",),
            _finetune_raw,
            checked=True,
        ),
        Stage("report", "bertpipe.downstream.reporting.report", _everything_made, ("report",), version=2),
        Stage("publish", "bertpipe.downstream.publishing.publish", _published, ("publish",), checked=True, version=2),
    )
}

# Where an input lies is not what it is: these settings enter fingerprints as content (`Stage.raw`) instead. Where an
# artifact goes when it is made is nothing of it either.
PLACES = {
    "corpus": ("sources",),
    "tokenizer": ("adopt",),
    "model": ("init",),
    "train": ("extend_from",),
    "finetune": ("data", "model", "warm_start", "task"),
    "publish": ("push", "private"),
}


def settings_of(stage: Stage, cfg: Config) -> dict[str, Any]:
    """The settings that determine a stage's result."""
    return {s: getattr(cfg, s).model_dump(mode="json", exclude=set(PLACES.get(s, ()))) for s in stage.reads}


class Pipeline:
    """The stages of one config: names and states are worked out once."""

    def __init__(self, cfg: Config):
        self.cfg, self.root = cfg, Path(cfg.runtime.root)
        self.cache = self.root / ".hashes.json"
        self._recipes: dict[str, dict[str, Any]] = {}

    def recipe(self, name: str) -> dict[str, Any]:
        """What identifies a stage's artifact: stage, version, settings, parents (fingerprints), raw, fingerprint."""
        if name not in self._recipes:
            stage = STAGES[name]
            parents = {needed: self.recipe(needed)["fingerprint"] for needed in stage.needs(self.cfg)}
            recipe: dict[str, Any] = {"stage": name, "version": stage.version, "settings": settings_of(stage, self.cfg)}
            recipe |= {"parents": parents, "raw": stage.raw(self.cfg, self.cache)}
            self._recipes[name] = recipe | {"fingerprint": artifact.fingerprint(**recipe)}
        return self._recipes[name]

    def locate(self, name: str) -> Path:
        """Where a stage's artifact stands, or will."""
        return self.root / f"{name}-{self.recipe(name)['fingerprint'][:12]}"

    def check(self, name: str) -> None:
        """Raise what is wrong with a stage's settings or raw inputs before it runs; nothing for a finished stage."""
        if not artifact.is_complete(self.locate(name)) and STAGES[name].checked:
            importlib.import_module(STAGES[name].module).check(self.cfg)

    def run(self, name: str) -> bool:
        """Make a stage's artifact; False when it was there already.

        Raises ArtifactError when an input is missing or damaged.
        """
        folder = self.locate(name)
        if artifact.is_complete(folder):
            return False
        inputs = {needed: self.locate(needed) for needed in STAGES[name].needs(self.cfg)}
        for needed, path in inputs.items():
            if not artifact.is_complete(path):
                raise ArtifactError(
                    f"{name} needs {path}, which is not there; first run `bertpipe {needed}` with the same settings"
                )
        floors.check()
        module = importlib.import_module(STAGES[name].module)
        if not is_main():
            if name in MULTI_PROCESS:
                module.run(self.cfg, inputs, folder.with_name(folder.name + artifact.PARTIAL), {})
            return True
        for needed, path in inputs.items():
            if problems := artifact.verify(path):
                raise ArtifactError(
                    f"{problems[0]}; delete {path} and make it again: `bertpipe {needed}` with the same settings"
                )
        facts = self.recipe(name) | {"config": self.cfg.model_dump(mode="json")}
        with artifact.committing(folder, **facts) as (out, counts):
            self._mention_unfinished(name)
            artifact.write_json(out / artifact.RECIPE, facts)
            module.run(self.cfg, inputs, out, counts)
            (out / artifact.RECIPE).unlink()
        return True

    def _mention_unfinished(self, name: str) -> None:
        """Say so when work begins anew although an interrupted run of the same stage stands beside it."""
        own = self.locate(name).name + artifact.PARTIAL
        if (self.root / own / artifact.RECIPE).is_file():
            return
        for other in sorted(self.root.glob(f"{name}-????????????{artifact.PARTIAL}")):
            begun = (other / artifact.RECIPE).is_file() and sum(1 for _ in other.iterdir()) > 2  # beside the lock
            if other.name != own and begun and not artifact.is_at_work(other):
                changed = _some(differing(artifact.read_recipe(other), self.recipe(name)))
                print(f"note: {other} is unfinished and not gone on with: {changed}", flush=True)

    def state(self, name: str) -> tuple[str, str]:
        """("done" | "stale" | "partial" | "missing", what to know about it)."""
        folder = self.locate(name)
        if artifact.is_complete(folder):
            return "done", str(folder)
        scratch = folder.with_name(folder.name + artifact.PARTIAL)
        if scratch.is_dir():
            return "partial", "at work" if artifact.is_at_work(scratch) else f"interrupted; `bertpipe {name}` goes on"
        others = [p for p in sorted(self.root.glob(f"{name}-????????????")) if artifact.is_complete(p)]
        differences = [differing(artifact.read_manifest(p), self.recipe(name)) for p in others]
        if not differences:
            return "missing", f"`bertpipe {name}` makes it"
        nearest = min(differences, key=len)
        return "stale", _some(nearest)


def differing(manifest: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """One line a setting, input or parent in which an artifact differs from what is wanted now."""
    lines = []
    for kind in ("settings", "raw", "parents", "version"):
        before, now = _flatten(manifest.get(kind), ""), _flatten(recipe[kind], "")
        for key in [*now, *(k for k in before if k not in now)]:
            if before.get(key) != now.get(key):
                label = {"settings": "", "raw": "input ", "parents": "made from another ", "version": "version"}[kind]
                detail = "" if kind == "parents" else f": was {_short(before.get(key))}, is {_short(now.get(key))}"
                lines.append(f"{label}{key}{detail}")
    return lines


def _some(differences: list[str], most: int = 3) -> str:
    """The first of `differing`'s lines as one, and how many more there are."""
    more = f"; {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more or "made by another version"


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def several_processes() -> bool:
    """Whether a launcher started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Whether this process is the first of its launch (torchrun and accelerate set RANK)."""
    return int(os.environ.get("RANK", "0")) == 0
