"""THE loop: pretraining and fine-tuning both call `fit`.

A step is `slots_per_step` slots, shared evenly among the processes. The loss of a step is the sum over all slots
divided by the count of the whole global batch, so neither ranks nor slots change it. Dropout is re-seeded for each
slot from (seed, step, slot), so there is no random state to save.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bertpipe.data import keyed
from bertpipe.data.batches import PackedBatch, StepSource, load
from bertpipe.errors import DataError
from bertpipe.model.objectives import Objective
from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.flops import Meter
from bertpipe.train.optim import Optimizer
from bertpipe.train.place import Place
from bertpipe.train.profile import Trace
from bertpipe.train.tracking import Record, Speed

PLAIN_SECONDS = 30.0  # between progress lines where there is no terminal


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
) -> Speed:
    """Train `objective` in place for the settings' steps, from the newest checkpoint if there is one.

    KeyboardInterrupt (Ctrl-C or SIGTERM on any process) ends it after the current step, with a checkpoint saved.
    """
    share = place.share(settings.slots_per_step, "slots_per_step")
    state = _resume(objective, optimizer, place, record, checkpoints)
    module = place.wrap(objective)
    module.train()
    speed = Speed(state["seconds"], meter)
    loader = load(source, range(state["step"], settings.steps), *share, settings.loader_workers, _pins(place))
    batches = speed.watch(loader)
    bar = _Bar(settings, place, state["step"])
    with closing(loader), _stop_signals() as stop, bar, trace or nullcontext(), _written(checkpoints):
        for step in range(state["step"], settings.steps):
            waiting = time.monotonic()
            slots = [batch.to(place.device) for batch in next(batches)]
            waited = time.monotonic() - waiting
            *counts, tokens, room, sequences, stopping = place.sum(_measure(objective, slots, stop.asked))
            lr = optimizer.set_lr(step)
            sums = _backward(module, slots, settings, place, step, place.rank * len(slots), counts)
            norm = optimizer.step()
            figures = means(objective.parts, place.sum(sums), counts)
            loss = figures["loss"]
            if not math.isfinite(loss) or not math.isfinite(norm):  # alike on all processes
                raise DataError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}: diverged; lower the learning rate"
                )
            state["tokens"] += int(tokens)
            speed.add(int(tokens), waited)
            line = {"step": step + 1, "epoch": epoch_of(step), "tokens": state["tokens"], **figures}
            line |= {"lr": lr, "grad_norm": norm, "sequences": int(sequences)}
            line["fill"] = tokens / room
            record.write("metrics", line)
            last = step + 1 == settings.steps
            if last or (step + 1) % settings.log_every == 0:
                record.write("speed", {"step": step + 1} | speed.read())
            bar.update(step + 1, line, speed)
            if evaluate is not None and (last or (step + 1) % settings.eval_every == 0):
                started = time.monotonic()
                figures = evaluate()
                module.train()
                speed.pause(time.monotonic() - started)
                record.write("metrics", {"step": step + 1} | figures)
                bar.say(step + 1, figures)
            due = settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0
            if checkpoints is not None and (last or due or stopping):
                _save(step + 1, objective, optimizer, place, record, checkpoints, state, speed)
            if trace is not None:
                trace.step()
            if stopping:
                raise KeyboardInterrupt
        if any(place.sum([float(stop.asked)])):  # asked for in the last step or its evaluation
            raise KeyboardInterrupt
    return speed


def _measure(objective: Objective, slots: list[PackedBatch], stop: bool) -> list[float]:
    """What processes must agree on before a step: divisors, real tokens, all tokens, sequences, stop or not."""
    return [
        *(float(sum(part)) for part in zip(*(objective.counts(slot) for slot in slots), strict=True)),
        float(sum(slot.num_tokens for slot in slots)),
        float(sum(slot.input_ids.numel() for slot in slots)),
        float(sum(slot.num_sequences for slot in slots)),
        float(stop),
    ]


def _backward(
    module: Any,
    slots: list[PackedBatch],
    settings: LoopSettings,
    place: Place,
    step: int,
    first: int,
    counts: list[float],
) -> torch.Tensor:
    """Gradients of the step, in place; returns this process's sums of K losses, then K correct, float64 [2 K]."""
    sums = torch.zeros(2 * len(counts), dtype=torch.float64, device=place.device)
    # DDP averages over the processes, so each scales up by their number
    weights = torch.tensor([place.world / max(1.0, count) for count in counts], device=place.device)
    for number, slot in enumerate(slots):
        torch.manual_seed(keyed.key(settings.seed, "dropout", step, first + number))
        with place.hold_sync(module, hold=number + 1 < len(slots)):
            out = module(slot, weights)
            (out["loss"].reshape(-1) * weights).sum().backward()
        sums += torch.stack([out["loss"].detach(), out["correct"]]).double().flatten()
    return sums


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
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "positions": {}}
    newest = checkpoints.newest() if checkpoints is not None else None
    if newest is not None and checkpoints is not None:
        objective.to(place.device)
        state = checkpoints.restore(newest, objective.model, optimizer)
        if place.is_main:
            print(f"resuming after step {state['step']} from {newest}")
            changed = {k: (state["place"].get(k), v) for k, v in place.facts().items() if state["place"].get(k) != v}
            for name, (before, now) in changed.items():
                print(f"note: {name} was {before} and is now {now}; results may differ in their last bits")
    record.rewind(state["positions"])
    return state


def _save(
    step: int,
    objective: Objective,
    optimizer: Optimizer,
    place: Place,
    record: Record,
    checkpoints: Checkpoints,
    state: dict[str, Any],
    speed: Speed,
) -> None:
    """One process copies and writes, beside the next steps; the others wait for the copy."""
    if place.is_main:
        facts = {"tokens": state["tokens"], "seconds": speed.seconds, "positions": record.positions()}
        checkpoints.save(step, objective.model, optimizer, facts | {"place": place.facts()})
    place.barrier()


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


class _Stop:
    """Whether a signal asked this process to stop."""

    asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a wish to stop after the step; a second SIGINT stops at once."""
    stop = _Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bar:
    """Progress of the main process: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, settings: LoopSettings, place: Place, start: int):
        self.settings, self.shown = settings, settings.progress and place.is_main
        console = Console(stderr=True)
        self.terminal = self.shown and console.is_terminal
        self.said, self.start = time.monotonic(), start
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.terminal,
        )
        self.task = self.bar.add_task(settings.description, total=settings.steps, completed=start, figures="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, step: int, line: dict[str, Any], speed: Speed) -> None:
        """Show a finished step."""
        if not self.shown:
            return
        share = speed.waited / max(1e-9, time.monotonic() - speed.last) if speed.tokens else 0.0
        figures = f"loss {line['loss']:.3f}  {speed.tokens_per_second:,.0f} tokens/s  data wait {share:.0%}"
        if speed.mfu is not None:
            figures += f"  MFU {speed.mfu:.0%}"
        if self.terminal:
            self.bar.update(self.task, completed=step, figures=figures)
        elif time.monotonic() - self.said > PLAIN_SECONDS:
            self.said = time.monotonic()
            left = (speed.seconds - speed.before) / max(1, step - self.start) * (self.settings.steps - step)
            name = self.settings.description
            print(f"{name}: step {step}/{self.settings.steps}  {figures}  {left:.0f} s left", file=sys.stderr)

    def say(self, step: int, figures: dict[str, float]) -> None:
        """Show an evaluation."""
        if self.shown:
            text = "  ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {v:.4g}" for k, v in figures.items())
            self.bar.console.print(
                f"{self.settings.description}: step {step}  hold-out: {text}", highlight=False, soft_wrap=True
            )
