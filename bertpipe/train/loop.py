"""THE loop: pretraining and fine-tuning both call `fit`.

A step is `slots_per_step` slots, shared evenly among the processes. The loss of a step is the sum over all slots
divided by the count of the whole global batch, so neither ranks nor slots change it. Dropout is re-seeded for each
slot from (seed, step, slot), so there is no random state to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bertpipe.data import keyed
from bertpipe.data.batches import PackedBatch, StepSource, load
from bertpipe.errors import RunError
from bertpipe.model.objectives import Objective
from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.flops import Meter
from bertpipe.train.guard import Guard, compare_weights
from bertpipe.train.optim import Optimizer
from bertpipe.train.place import Place
from bertpipe.train.profile import Trace
from bertpipe.train.progress import Bar
from bertpipe.train.reduction import REDUCTIONS, Reduction
from bertpipe.train.signals import Stopped, catching
from bertpipe.train.tracking import Record, Speed


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself has to know."""

    steps: int
    slots_per_step: int
    seed: int
    eval_every: int
    checkpoint_every: int = 0
    log_every: int = 10
    loader_workers: int = 0
    progress: bool = True
    description: str = "pretrain"
    reduction: str = "fast"
    max_skipped: int = 5
    spike_deviations: float = 0.0
    desync_every: int = 100
    timeout: int = 1_800


def fit(
    objective: Objective,
    source: StepSource,
    optimizer: Optimizer,
    settings: LoopSettings,
    place: Place,
    record: Record,
    evaluate: Callable[[], dict[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    epoch_of: Callable[[int], int] = lambda step: 0,
    meter: Meter | None = None,
    trace: Trace | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> Speed:
    """Train `objective` in place for the settings' steps, from the newest checkpoint if there is one.

    `enough`, asked after each evaluation, ends the run early; it says the same on every process. KeyboardInterrupt
    (Ctrl-C or SIGTERM on any process) ends it after the current step, or in the midst of an evaluation, with a
    checkpoint saved. Raises DivergedError, and RunError when a process is lost.
    """
    share = place.share(settings.slots_per_step, "slots_per_step")
    state = _resume(objective, optimizer, place, record, checkpoints)
    steps = range(state["step"], settings.steps)
    run = _Run(objective, optimizer, settings, place, record, evaluate, checkpoints, epoch_of, state, meter)
    loader = load(source, steps, *share, settings.loader_workers, _pins(place), settings.timeout)
    batches = run.speed.watch(loader)
    with closing(loader), place.watched(), catching(place.stop), run.bar, trace or nullcontext(), _written(checkpoints):
        if state["evaluation_due"]:
            run.assess(state["step"])
        for step in steps:
            place.doing(f"step {step + 1}")
            stopping = run.step(step, batches)
            last = step + 1 == settings.steps
            if last or (step + 1) % settings.log_every == 0:
                record.write("speed", {"step": step + 1} | run.speed.read())
            if last or (step + 1) % settings.eval_every == 0:
                run.assess(step + 1)
                last = last or enough()
            due = settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0
            if last or due or stopping:
                run.save(step + 1)
            elif settings.desync_every and (step + 1) % settings.desync_every == 0:
                run.compare(step + 1)
            if trace is not None:
                trace.step()
            if stopping:
                raise Stopped
            if last:
                break
        place.check_stop()  # asked for in the last step
    return run.speed


class _Run:
    """What the steps of one call of `fit` share."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        settings: LoopSettings,
        place: Place,
        record: Record,
        evaluate: Callable[[], dict[str, float]] | None,
        checkpoints: Checkpoints | None,
        epoch_of: Callable[[int], int],
        state: dict[str, Any],
        meter: Meter | None,
    ):
        self.objective, self.optimizer, self.settings, self.place = objective, optimizer, settings, place
        self.record, self.evaluate, self.checkpoints, self.epoch_of = record, evaluate, checkpoints, epoch_of
        self.state = state
        self.guard = Guard(settings.max_skipped, settings.spike_deviations, state["guard"])
        self.reduction: Reduction = REDUCTIONS[settings.reduction](objective, place)
        self.speed = Speed(state["seconds"], meter)
        self.bar = Bar(settings.description, settings.steps, state["step"], settings.progress and place.is_main)
        objective.train()

    def step(self, step: int, batches: Iterator[tuple[int, list[PackedBatch]]]) -> bool:
        """Take a step (from 0), or skip it; returns whether a process was asked to stop."""
        place, objective = self.place, self.objective
        waiting = time.monotonic()
        of, slots = _next(step, batches)
        slots = [slot.to(place.device) for slot in slots]
        waited = time.monotonic() - waiting
        *counts, tokens, room, sequences, steps = place.sum([*_measure(objective, slots), float(of)])
        if steps != step * place.world:
            raise RunError(f"step {step + 1}: the processes are not at the same step's batch; run the command again")
        lr = self.optimizer.set_lr(step)
        sums, stopping = _backward(self.reduction, slots, self.settings, place, step, counts)
        norm = self.optimizer.clip()
        figures = means(objective.parts, sums.sum(0).tolist(), counts)
        skipped = self.guard.judge(step + 1, figures["loss"], norm, sums[:, : len(counts)].sum(1).tolist())
        if skipped is None:
            self.optimizer.update()
        else:
            self.optimizer.clear()
            self.bar.say(step + 1, f"skipped: {skipped}")
        self.state["tokens"] += int(tokens)
        self.speed.add(int(tokens), waited)
        line = {"step": step + 1, "epoch": self.epoch_of(step), "tokens": self.state["tokens"]}
        line |= {name: v for name, v in (figures | {"lr": lr, "grad_norm": norm}).items() if math.isfinite(v)}
        line |= {"sequences": int(sequences), "fill": tokens / room}
        self.record.write("metrics", line if skipped is None else line | {"skipped": skipped})
        self.bar.update(step + 1, line, self.speed)
        return stopping

    def assess(self, step: int) -> None:
        """Evaluate after `step` steps; stopped in its midst, leave a checkpoint that knows what is due."""
        if self.evaluate is None:
            return
        started = time.monotonic()
        self.state["evaluation_due"] = True
        try:
            figures = self.evaluate()
        except Stopped:
            self.save(step)
            raise
        self.state["evaluation_due"] = False
        self.objective.train()
        self.speed.pause(time.monotonic() - started)
        self.record.write("metrics", {"step": step} | figures)
        self.bar.evaluated(step, figures)

    def compare(self, step: int) -> None:
        """RunError unless all processes hold the same weights."""
        if self.place.world > 1:
            compare_weights(step, self.optimizer.parameters.values(), self.place)

    def save(self, step: int) -> None:
        """Write a checkpoint of what all processes hold."""
        if self.settings.desync_every:
            self.compare(step)
        if self.checkpoints is None or not self.place.is_main:
            return
        state = {name: self.state[name] for name in ("tokens", "evaluation_due")}
        state |= {"seconds": self.speed.seconds, "positions": self.record.positions(), "guard": self.guard.state}
        self.checkpoints.save(step, self.objective.model, self.optimizer, state | {"place": self.place.facts()})


def _next(step: int, batches: Iterator[tuple[int, list[PackedBatch]]]) -> tuple[int, list[PackedBatch]]:
    """The next batch; RunError when the process that should prepare it is dead or hangs."""
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise RunError(
            f"step {step + 1}: a process that prepares batches (runtime.loader_workers) died or hangs "
            f"({str(error).splitlines()[0]}); the same command goes on from the last checkpoint"
        ) from error


def _measure(objective: Objective, slots: list[PackedBatch]) -> list[float]:
    """What processes add up before a step: divisors, real tokens, all tokens, sequences."""
    return [
        *(float(sum(part)) for part in zip(*(objective.counts(slot) for slot in slots), strict=True)),
        float(sum(slot.num_tokens for slot in slots)),
        float(sum(slot.input_ids.numel() for slot in slots)),
        float(sum(slot.num_sequences for slot in slots)),
    ]


def _backward(
    reduction: Reduction,
    slots: list[PackedBatch],
    settings: LoopSettings,
    place: Place,
    step: int,
    counts: list[float],
) -> tuple[torch.Tensor, bool]:
    """Gradients of the step, in place.

    Returns every slot's sums of K losses, then K correct, float64 [slots, 2 K], and whether one was asked to stop.
    """
    sums = torch.zeros(place.world * len(slots), 2 * len(counts), dtype=torch.float64, device=place.device)
    weights = torch.tensor([reduction.scale / max(1.0, count) for count in counts], device=place.device)
    for number, slot in enumerate(slots):
        position = place.rank * len(slots) + number
        torch.manual_seed(keyed.key(settings.seed, "dropout", step, position))
        try:
            with reduction.slot(number, len(slots)):
                out = reduction.module(slot, weights)
                (out["loss"].reshape(-1) * weights).sum().backward()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {step + 1}: rank {place.rank} ran out of memory; take runtime.gradient_checkpointing: true or "
                f"smaller slots ({slot.input_ids.numel()} tokens now) ({str(error).splitlines()[0]})"
            ) from error
        sums[position] = torch.stack([out["loss"].detach(), out["correct"]]).double().flatten()
    reduction.finish(len(slots))
    # the other processes' rows are zeros here, so adding them up is exact
    asked = sums.new_tensor([place.stop.asked])
    *total, stopping = place.sum(torch.cat([sums.flatten(), asked]))
    return torch.tensor(total, dtype=torch.float64).view_as(sums), stopping > 0


def means(parts: tuple[str, ...], sums: list[float], counts: list[float]) -> dict[str, float]:
    """Loss (the sum of its parts' means) and accuracy (of the first part); of several parts, those of each as well."""
    num = len(counts)
    losses = [total / max(1, count) for total, count in zip(sums[:num], counts, strict=True)]
    shares = [total / max(1, count) for total, count in zip(sums[num:], counts, strict=True)]
    figures = {"loss": sum(losses), "accuracy": shares[0]}
    for part, loss, share in zip(parts, losses, shares, strict=True):
        if num > 1:
            figures |= {f"{part}_loss": loss, f"{part}_accuracy": share}
    return figures


def _resume(
    objective: Objective, optimizer: Optimizer, place: Place, record: Record, checkpoints: Checkpoints | None
) -> dict[str, Any]:
    """Weights and optimizer of the newest checkpoint, in place, and the state to go on from."""
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "positions": {},
        "evaluation_due": False,
        "guard": {},
    }
    newest = checkpoints.newest() if checkpoints is not None else None
    if newest is not None and checkpoints is not None:
        objective.to(place.device)
        state |= checkpoints.restore(newest, objective.model, optimizer)
        if place.is_main:
            print(f"resuming after step {state['step']} from {newest}")
            changed = {k: (state["place"].get(k), v) for k, v in place.facts().items() if state["place"].get(k) != v}
            for name, (before, now) in changed.items():
                print(f"note: {name} was {before} and is now {now}; results may differ in their last bits")
    record.rewind(state["positions"])
    return state


@contextmanager
def _written(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Wait at the end, whatever it is, for the checkpoint that is being written."""
    try:
        yield
    finally:
        if checkpoints is not None:
            checkpoints.wait()


def _pins(place: Place) -> bool:
    return place.device.type == "cuda"
