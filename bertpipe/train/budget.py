"""A run as long as a time (`train.budget: 6h`): measure some steps, work out how many fit, and freeze that number.

The measuring runs before step 1, on the real model, batches, optimizer and processes, at a learning rate of 0, and
leaves nothing behind: weights are put back, the optimizer is a throwaway. The number of steps then stands in
budget.json of the run folder, which a resume reads, so that a run's schedule has one length whatever befalls it. A
budgeted run is bit for bit the run with `train.steps` set to that number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bertpipe import artifact
from bertpipe.config import Config, TrainConfig
from bertpipe.data import phases
from bertpipe.data.batches import PackedBatch, StepSource
from bertpipe.errors import ConfigError
from bertpipe.model.objectives import Objective
from bertpipe.train import loop
from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.tracking import Record

FILE = "budget.json"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
FIRST_STEPS = 2  # not timed: start-up of the loader, first touch of memory
MEASURED_SHARE = 0.01  # of the budget, for the steps that are measured, in each phase
FEWEST_STEPS, MOST_STEPS = 2, 50
RESERVE = 0.05  # of the time left, kept for steps that turn out slower than those measured


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run."""

    steps: tuple[float, ...]
    """Of a full step, in each phase."""
    evaluation: float
    checkpoint: float
    eval_every: int
    checkpoint_every: int

    def of(self, train: TrainConfig) -> float:
        """Seconds of a run of `train.steps` steps; the closing evaluation, checkpoint and model are in."""
        total = 0.0
        for part, seconds in zip(phases.parts(train), self.steps, strict=True):
            total += seconds * phases.tokens_of(train, part) / (part.slot_tokens * train.slots_per_step)
        total += self.evaluation * math.ceil(train.steps / self.eval_every)
        return total + self.checkpoint * (math.ceil(train.steps / self.checkpoint_every) + 1)


def seconds_of(budget: str | int) -> float:
    """Seconds of a time like 90s, 45m, 6h or 1.5d; ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", str(budget))
    if not found or not float(found[1]):
        raise ConfigError(f"train.budget: {budget!r} is no time; write a number and s, m, h or d, such as 6h or 1.5d")
    return float(found[1]) * UNITS[found[2]]


def affordable(train: TrainConfig, cost: Cost, seconds: float, begun: int = 0) -> int:
    """The largest number of steps whose part after `begun` takes at most `seconds`; `begun` when not one more does."""
    spent = cost.of(with_steps(train, begun)) if begun else 0.0

    def fits(steps: int) -> bool:
        return cost.of(with_steps(train, steps)) - spent <= seconds

    low, high = begun, max(1, begun) * 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_steps(train: TrainConfig, steps: int) -> TrainConfig:
    """The same recipe with another number of steps."""
    return train.model_copy(update={"steps": steps})


def freeze(
    cfg: Config,
    out: Path,
    started: float,
    begun: int,
    place: Place,
    measure: Callable[[], Cost],
) -> tuple[Config, dict[str, Any]]:
    """The config with the number of steps that the budget allows, and what budget.json says of it.

    Args:
        cfg: the settings; `train.steps` is replaced.
        out: the run folder.
        started: time.monotonic() when the stage began; what passed since then counts.
        begun: steps that a parent run has made (`train.extend_from`).
        place: the processes; the first one's number counts for all.
        measure: what steps cost; called on every process, unless the number is frozen already.

    Raises ConfigError when the budget is over before step 1.
    """
    assert cfg.train.budget is not None
    record: dict[str, Any] = {}
    if place.is_main and (out / FILE).is_file():
        record = json.loads((out / FILE).read_text(encoding="utf-8"))
    if not any(place.sum([float(record.get("steps", 0))])):
        cost = measure()
        used = time.monotonic() - started
        left = (seconds_of(cfg.train.budget) - used) * (1 - RESERVE)
        steps = int(place.sum([float(affordable(cfg.train, cost, left, begun) if place.is_main else 0)])[0])
        if steps == begun:
            raise ConfigError(
                f"train.budget: {cfg.train.budget} is too short for a step: {used:.0f} s are gone before the first, "
                f"and one step with what comes after it takes {cost.of(with_steps(cfg.train, 1)):.0f} s"
            )
        record = {"steps": steps, "budget": cfg.train.budget, "used_seconds": round(used, 1)}
        record |= {"cost_seconds": dataclasses.asdict(cost), "expected_seconds": round(used + left, 1)}
        if place.is_main:
            artifact.write_json(out / FILE, record)
            print(
                f"budget: {cfg.train.budget} is {steps} steps, {used:.0f} s of it gone and {RESERVE:.0%} of the rest "
                f"kept back; seconds: a step {', '.join(f'{s:.3g}' for s in cost.steps)}, an evaluation "
                f"{cost.evaluation:.3g}, a checkpoint {cost.checkpoint:.3g}",
                flush=True,
            )
    steps = int(place.sum([float(record["steps"] if place.is_main else 0)])[0])
    return cfg.model_copy(update={"train": with_steps(cfg.train, steps)}), record


def frozen(cfg: Config, out: Path) -> Config:
    """The config with the number of steps that was frozen in the run folder `out`; ConfigError before that."""
    if not (out / FILE).is_file():
        raise ConfigError(f"{out / FILE}: not there, so train.budget has not come to a number of steps yet")
    return cfg.model_copy(update={"train": with_steps(cfg.train, json.loads((out / FILE).read_text())["steps"])})


class _From:
    """A source that begins at a later step."""

    def __init__(self, source: StepSource, first: int):
        self.source, self.first = source, first

    def slots(self, step: int, first: int, last: int) -> list[PackedBatch]:
        return self.source.slots(self.first + step, first, last)


class _Clock(Record):
    """A record of when steps ended, and of nothing else."""

    def __init__(self) -> None:
        super().__init__(None)
        self.times: list[float] = []

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Note the time at each step."""
        if name == "metrics":
            self.times.append(time.monotonic())


def measure(
    cfg: Config,
    objective: Objective,
    recipe: Recipe,
    make_source: Callable[[Config, Path], StepSource],
    evaluate: Callable[[], Any] | None,
    tokenizer: Any,
    place: Place,
    out: Path,
) -> Cost:
    """Time full steps of each phase, an evaluation and a checkpoint; the objective comes back as it was."""
    assert cfg.train.budget is not None
    scratch = out / "measuring"
    share = min((p.share for p in cfg.train.phases), default=1.0)
    probe = with_steps(cfg.train, math.ceil((FIRST_STEPS + MOST_STEPS + 2) / share)).model_copy(
        update={"batch_warmup": []}
    )
    source = make_source(cfg.model_copy(update={"train": probe}), scratch)
    before = {name: p.detach().to("cpu", copy=True) for name, p in objective.model.named_parameters()}
    still = dataclasses.replace(recipe, schedule="constant", warmup_steps=1 << 40, steps=1 << 40)
    optimizer = Optimizer(objective.model, still)
    settings = loop.LoopSettings(
        steps=0,
        slots_per_step=probe.slots_per_step,
        seed=probe.seed,
        eval_every=1 << 40,
        loader_workers=cfg.runtime.loader_workers,
        progress=False,
        description="measuring",
    )

    def seconds(part: phases.Part, steps: int) -> float:
        """Mean seconds of `steps` steps after those that warm up, of the slowest process."""
        clock = _Clock()
        fitted = dataclasses.replace(settings, steps=FIRST_STEPS + steps)
        loop.fit(objective, _From(source, part.first), optimizer, fitted, place, clock)
        place.release()
        passed = (clock.times[-1] - clock.times[FIRST_STEPS - 1]) / steps
        return max(place.sum([passed * (place.rank == rank) for rank in range(place.world)]))

    costs = []
    for part in phases.parts(probe):
        wanted = MEASURED_SHARE * seconds_of(cfg.train.budget) / seconds(part, 1)
        costs.append(seconds(part, max(FEWEST_STEPS, min(MOST_STEPS, int(wanted)))))
    with torch.no_grad():
        for name, p in objective.model.named_parameters():
            p.copy_(before[name])
            p.grad = None
    started = time.monotonic()
    if evaluate is not None:
        evaluate()
    evaluated = time.monotonic()
    if place.is_main:
        checkpoints = Checkpoints(scratch, 2, tokenizer)
        checkpoints.save(0, objective.model, optimizer, {})
        checkpoints.wait()
    place.barrier()
    saved = time.monotonic()
    if place.is_main:
        artifact.discard(scratch)
    place.barrier()
    every = (cfg.train.eval_every, cfg.runtime.checkpoint_every)
    return Cost(tuple(costs), evaluated - started if evaluate else 0.0, saved - evaluated, *every)
