"""Which runs a task has: init x point of the grid x seed.

`finetune.lr`, `finetune.batch_size` and `finetune.epochs` may each be several; the grid is their product (Devlin et al.
2019, A.3, try 2 batch sizes, 3 rates and 3 numbers of epochs, and choose on dev). `finetune.warm_start` lets some
tasks start from another's model (Phang et al. 2018; Liu et al. 2019, section 5.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bertpipe.config import FinetuneConfig, listed, named_tasks
from bertpipe.downstream.finetuning.baselines import BASELINES
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Task
from bertpipe.errors import ConfigError

MODEL, SCRATCH = "model", "scratch"
WARMED = ("rte", "mrpc", "stsb")
"""Tasks that `finetune.warm_start` is for."""


@dataclass(frozen=True)
class Point:
    """What may be several, as one value each."""

    lr: float
    batch_size: int
    epochs: int

    def __str__(self) -> str:
        return f"lr {self.lr} batch {self.batch_size} epochs {self.epochs}"


@dataclass(frozen=True)
class Run:
    """One run of a task."""

    init: str
    """`model`, or a baseline."""
    seed: int
    point: Point | None
    """None for a baseline that is not trained by steps."""

    def name(self, several: bool) -> str:
        """Among the runs of its task; with the point where there are several."""
        where = f"-{self.point}".replace(" ", "-") if several and self.point else ""
        return f"{self.init}{where}-seed-{self.seed}"


def points(settings: FinetuneConfig) -> list[Point]:
    """The grid, one point where nothing is several."""
    return [Point(*values) for values in itertools.product(*_axes(settings).values())]


def at(settings: FinetuneConfig, point: Point | None) -> FinetuneConfig:
    """The settings of a run: those of its point."""
    return settings.model_copy(update=asdict(point)) if point else settings


def point_of(settings: FinetuneConfig) -> Point:
    """The one point of settings as `at` gives them."""
    (point,) = points(settings)
    return point


def seeds(settings: FinetuneConfig) -> list[int]:
    """1 to n, or as they were given."""
    return list(range(1, settings.seeds + 1)) if isinstance(settings.seeds, int) else settings.seeds


def is_trained(settings: FinetuneConfig) -> bool:
    """Whether there is anything to train; else models are scored as they are."""
    return settings.epochs not in (0, [0])


def runs(settings: FinetuneConfig, task: Task) -> list[Run]:
    """Every run of a task: init by init, point by point, seed by seed; the one there is where nothing is drawn."""
    if not is_trained(settings):
        return [Run(MODEL, seeds(settings)[0], points(settings)[0])]
    baselines = listed(settings.baselines)
    trained = [MODEL, *(name for name in baselines if name == SCRATCH)]
    plain = [name for name in baselines if name in BASELINES and task.kind in BASELINES[name].kinds]
    made = [Run(init, seed, point) for init in trained for point in points(settings) for seed in seeds(settings)]
    return made + [Run(name, seeds(settings)[0], None) for name in plain]


def ordered(names: list[str], settings: FinetuneConfig) -> list[str]:
    """The tasks, that of `finetune.warm_start` first."""
    return sorted(names, key=lambda name: name != settings.warm_start)


def check(settings: FinetuneConfig) -> None:
    """ConfigError for unknown tasks or baselines, values given twice or not at all, and a warm start that can't be."""
    names = tasks.chosen(named_tasks(settings), settings.data, settings.task)
    for name in names:
        tasks.get(name, settings.task)
    if not seeds(settings) or len(set(seeds(settings))) < len(seeds(settings)):
        raise ConfigError(f"finetune.seeds: {settings.seeds} must be at least one seed, each once")
    for key, values in _axes(settings).items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"finetune.{key}: {values} must be at least one value, each once")
    if isinstance(settings.epochs, list) and 0 in settings.epochs and is_trained(settings):
        raise ConfigError(f"finetune.epochs: {settings.epochs}: 0, which trains nothing, stands alone")
    for key in () if is_trained(settings) else ("baselines", "warm_start"):
        if getattr(settings, key):
            raise ConfigError(f"finetune.{key}: with finetune.epochs: 0 nothing is trained; leave it out")
    choices = (*BASELINES, SCRATCH)
    for name in listed(settings.baselines):
        if name not in choices:
            raise ConfigError(f"finetune.baselines: {name!r} is not one of {', '.join(choices)}")
    start = settings.warm_start
    if start in tasks.TASKS and start not in names:
        raise ConfigError(f"finetune.warm_start: {start!r} is not among finetune.tasks: {', '.join(names) or 'none'}")
    if start is not None and not {*WARMED} & {*names} - {start}:
        raise ConfigError(f"finetune.warm_start: none of {', '.join(WARMED)} is among finetune.tasks to start from it")


def _axes(settings: FinetuneConfig) -> dict[str, Sequence[Any]]:
    """The values of each part of a point."""
    given = {"lr": settings.lr, "batch_size": settings.batch_size, "epochs": settings.epochs}
    return {key: value if isinstance(value, list) else [value] for key, value in given.items()}
