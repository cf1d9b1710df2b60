"""A run in phases: lengths that change along the way, and small steps at its start.

A phase is a share of the steps with a sequence length (and slot size) of its own: short sequences for most of the run,
long ones at its end (Devlin et al. 2019, A.2). Each has its own order, a pure function of (shards, seed, epoch, phase).
Epochs are counted on from phase to phase, so that masks are drawn anew when a text comes again.

Batch-size warmup gives the first steps fewer slots. Every number of slots is a multiple of the smallest, so whatever
number of processes shares the smallest shares them all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe.config import TrainConfig
from bertpipe.data.order import Order, Pieces
from bertpipe.data.shards import TokenShards
from bertpipe.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A phase's place in the run."""

    first: int
    """Its first step, from 0."""
    last: int
    """The step behind its last one; equal to `first` when the run is too short for it."""
    sequence_length: int
    slot_tokens: int


def check(train: TrainConfig) -> None:
    """ConfigError for phases that don't make up a run, or steps that not every number of processes could share."""
    for number, phase in enumerate(train.phases, 1):
        slot_tokens = phase.slot_tokens or train.slot_tokens
        if slot_tokens < phase.sequence_length:
            raise ConfigError(
                f"train.phases: phase {number} has sequences of {phase.sequence_length} tokens in slots of "
                f"{slot_tokens}; give it larger slot_tokens"
            )
        if phase.sequence_length > train.sequence_length:
            raise ConfigError(
                f"train.phases: phase {number} has sequences of {phase.sequence_length} tokens, train.sequence_length "
                f"is {train.sequence_length}; it must be the longest"
            )
    total = sum(phase.share for phase in train.phases)
    if train.phases and abs(total - 1) > 1e-6:
        raise ConfigError(f"train.phases: the shares sum to {total:g}; they must sum to 1")
    sizes = [*(stage.slots for stage in train.batch_warmup), train.slots_per_step]
    for size in sizes:
        if size % sizes[0]:
            raise ConfigError(
                f"train.batch_warmup: {size} slots are no multiple of the first {sizes[0]}, so processes that share "
                "those evenly could not share them"
            )
    if sizes != sorted(sizes):
        raise ConfigError(f"train.batch_warmup: slots must grow up to train.slots_per_step, got {sizes}")


def parts(train: TrainConfig) -> list[Part]:
    """The phases of a run of `train.steps` steps, each ending at the rounded sum of the shares so far."""
    if not train.phases:
        return [Part(0, train.steps, train.sequence_length, train.slot_tokens)]
    found: list[Part] = []
    share, first = 0.0, 0
    for phase in train.phases:
        share += phase.share
        last = round(min(1.0, share) * train.steps)
        found.append(Part(first, last, phase.sequence_length, phase.slot_tokens or train.slot_tokens))
        first = last
    return found


def smallest_step(train: TrainConfig) -> tuple[int, str]:
    """Slots of the run's smallest step, which the processes must share evenly, and the setting they come from."""
    if train.batch_warmup:
        return train.batch_warmup[0].slots, "train.batch_warmup"
    return train.slots_per_step, "train.slots_per_step"


def tokens_of(train: TrainConfig, part: Part) -> int:
    """Tokens of a phase's slots, with the little padding at the ends of slots and epochs."""
    slots, first = (part.last - part.first) * train.slots_per_step, 0
    for stage in train.batch_warmup:
        steps = max(0, min(part.last, first + stage.steps) - max(part.first, first))
        slots -= steps * (train.slots_per_step - stage.slots)
        first += stage.steps
    return slots * part.slot_tokens


def total_tokens(train: TrainConfig) -> int:
    """Tokens of the whole run, padding counted as in `tokens_of`."""
    return sum(tokens_of(train, part) for part in parts(train))


class PhasedOrder:
    """The orders of a run's phases, as one order over its steps."""

    def __init__(
        self,
        shards: TokenShards,
        train: TrainConfig,
        plans: Path | None = None,
        make: Callable[..., Order] = Order,
    ):
        self.shards, self.slots_per_step = shards, train.slots_per_step
        self.parts = [part for part in parts(train) if part.last > part.first]
        numbers = [number for number, part in enumerate(parts(train)) if part.last > part.first]
        self.orders = [
            make(
                shards,
                train.seed,
                part.sequence_length,
                part.slot_tokens,
                train.slots_per_step,
                plans,
                phase=number,
                ramp=_ramp_from(train, part.first),
            )
            for number, part in zip(numbers, self.parts, strict=True)
        ]
        self._epochs: list[int] = []

    def _phase(self, step: int) -> tuple[int, int]:
        """(which phase, step within it) of a step of the run; steps behind the last belong to the last phase."""
        number = bisect_right([part.first for part in self.parts], step) - 1
        return number, step - self.parts[number].first

    def at(self, step: int) -> Order:
        """The order of the phase that a step belongs to."""
        return self.orders[self._phase(step)[0]]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run; a phase begins a new epoch."""
        number, step = self._phase(step)
        while len(self._epochs) < number:
            order, part = self.orders[len(self._epochs)], self.parts[len(self._epochs)]
            self._epochs.append(order.locate(part.last - part.first - 1)[0] + 1)
        epoch, step = self.orders[number].locate(step)
        return sum(self._epochs[:number]) + epoch, step

    def next_epoch(self, step: int) -> int:
        """The first step of the epoch after that of a step."""
        number, step = self._phase(step)
        part = self.parts[number]
        following = part.first + self.orders[number].next_epoch(step)
        return following if number + 1 == len(self.parts) else min(following, part.last)

    def num_slots(self, step: int) -> int:
        """Slots of a step."""
        number, step = self._phase(step)
        return self.orders[number].num_slots(step)

    def slots(self, step: int) -> list[Pieces]:
        """The slots of a step of the run."""
        number, step = self._phase(step)
        return self.orders[number].slots(step)

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch of the first phase."""
        return self.orders[0].steps_in(epoch)

    def prepare(self, steps: int) -> None:
        """Make the plans that `steps` steps need, so that readers in other processes find them on disk."""
        for order, part in zip(self.orders, self.parts, strict=True):
            if part.first < steps:
                order.prepare(min(steps, part.last) - part.first)


def _ramp_from(train: TrainConfig, first: int) -> tuple[tuple[int, int], ...]:
    """What is left of the batch-size warmup at step `first`, as (steps, slots)."""
    left = []
    for stage in train.batch_warmup:
        steps = stage.steps - max(0, first)
        if steps > 0:
            left.append((min(steps, stage.steps), stage.slots))
        first -= stage.steps
    return tuple(left)


class Ramped:
    """A source of batches whose steps differ in slots: a share of the full step is the same share of every step."""

    def __init__(self, source: Any, order: Order | PhasedOrder):
        self.source, self.order = source, order

    def slots(self, step: int, first: int, last: int) -> list[Any]:
        """What slots first .. last - 1 of a full step are in this one."""
        size, full = self.order.num_slots(step), self.order.slots_per_step
        return self.source.slots(step, first * size // full, last * size // full)


def make_order(
    shards: TokenShards, train: TrainConfig, plans: Path | None = None, make: Callable[..., Order] = Order
) -> Order | PhasedOrder:
    """The order of a run of `train.steps` steps, its plans kept in `plans`; `make` is Order or makes one like it."""
    if train.phases:
        return PhasedOrder(shards, train, plans, make)
    ramp = _ramp_from(train, 0)
    return make(shards, train.seed, train.sequence_length, train.slot_tokens, train.slots_per_step, plans, ramp=ramp)
