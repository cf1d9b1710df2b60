"""Which tokens stand in which slot of which step: a pure function of (shards, seed, epoch, phase, lengths).

A document is cut into segments of at most `sequence_length` - 2 tokens. An epoch visits every segment once: the shards
in a keyed permutation, grouped into windows, and within a window all segments in a keyed permutation. Slots are filled
in that order; the segment that meets the end of a slot is cut there and goes on in the next slot, so slots are full.
Nothing here depends on processes or workers, and memory is bounded by the window.

One linear pass an epoch writes where each step starts, int64 [steps + 1, 3] (window, segment, token within it), to a
plan file; it may be deleted or damaged and comes back the same. With it any step is found at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bertpipe.data import keyed, npy
from bertpipe.data.shards import TokenShards
from bertpipe.errors import DataError, StorageError

SPECIALS = 2  # [CLS] and [SEP] around every sequence
MIN_PIECE = 8  # a cut leaves at least so many tokens before it; a smaller room at a slot's end stays padding
MOST_EMPTY = 100  # epochs in a row without a step: of pairs, a mixture's epoch may have none
WINDOW_TOKENS = 1 << 28  # shards are shuffled together in windows of about this many tokens

Cursor = tuple[int, int, int]  # window, segment within it, tokens of that segment already used


@dataclass(frozen=True)
class Pieces:
    """The sequences of one slot, without special tokens; arrays of equal length [S]."""

    shard: np.ndarray
    """int64: which shard each sequence lies in."""
    start: np.ndarray
    """int64: its first token within the shard."""
    length: np.ndarray
    """int64: its tokens, at least 1."""
    labels: np.ndarray | None = None
    """int64 [S / 2] where each two are a pair, the two segments of one sequence (pairs.py)."""

    @property
    def num_tokens(self) -> int:
        """Tokens the slot holds, special tokens included."""
        sequences = len(self.length) if self.labels is None else len(self.labels)
        return int(self.length.sum()) + len(self.length) + sequences

    @staticmethod
    def join(parts: list[Pieces]) -> Pieces:
        """The sequences of all parts, in order."""
        if not parts:
            return _NOTHING
        shard, start, length = (np.concatenate([getattr(p, name) for p in parts]) for name in _COLUMNS)
        labels = [p.labels for p in parts if p.labels is not None]
        return Pieces(shard, start, length, np.concatenate(labels) if labels else None)


_COLUMNS = ("shard", "start", "length")
_NOTHING = Pieces(*(np.zeros(0, np.int64) for _ in range(3)))


@dataclass(frozen=True)
class Window:
    """Permuted segments of some shards; `ends` is the running sum of their costs (length + specials)."""

    pieces: Pieces
    ends: np.ndarray


class Order:
    """The order of one pretraining run.

    Args:
        shards: the split to visit.
        seed: of the permutations.
        sequence_length: longest sequence, special tokens included.
        slot_tokens: tokens of a slot, at least `sequence_length`.
        slots_per_step: slots of one optimizer step, over all processes.
        plans: folder for the plan files; None keeps the plans in memory.
        window_tokens: how many tokens are shuffled together, about.
        phase: number of the phase of the run that this order is of (see phases.py); steps and epochs begin at 0 in it.
        ramp: (steps, slots) pairs: the first so many steps have so many slots instead, the next ones the next.
    """

    def __init__(
        self,
        shards: TokenShards,
        seed: int,
        sequence_length: int,
        slot_tokens: int,
        slots_per_step: int,
        plans: Path | None = None,
        window_tokens: int = WINDOW_TOKENS,
        phase: int = 0,
        ramp: tuple[tuple[int, int], ...] = (),
    ):
        assert slot_tokens >= sequence_length > SPECIALS
        if shards.num_tokens == 0:
            raise DataError(f"{shards.folder}: no tokens to train on")
        self.shards, self.seed, self.plans, self.window_tokens = shards, seed, plans, window_tokens
        self.sequence_length, self.slot_tokens, self.slots_per_step = sequence_length, slot_tokens, slots_per_step
        self.phase, self.ramp = phase, ramp
        self._plan = lru_cache(maxsize=2)(self._load_plan)
        self._window = lru_cache(maxsize=2)(self._build_window)
        self._windows = lru_cache(maxsize=4)(self._group_shards)
        self.steps_in = lru_cache(maxsize=None)(self._count_steps)

    def __reduce__(self):  # to a loader's worker: rebuilt there, caches and memory maps anew
        return Order, (
            self.shards,
            self.seed,
            self.sequence_length,
            self.slot_tokens,
            self.slots_per_step,
            self.plans,
            self.window_tokens,
            self.phase,
            self.ramp,
        )

    def at(self, step: int) -> Order:
        """The order that a step belongs to: this one."""
        return self

    def num_slots(self, step: int) -> int:
        """Slots of a step."""
        for steps, slots in self.ramp:
            if step < steps:
                return slots
            step -= steps
        return self.slots_per_step

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run, both from 0; DataError where no epoch comes to a step."""
        epoch = empty = 0
        while step >= (steps := self.steps_in(epoch)):
            epoch, step = epoch + 1, step - steps
            empty = 0 if steps else empty + 1
            if empty == MOST_EMPTY:
                raise DataError(f"{self.shards.folder}: {empty} epochs in a row have nothing to train on")
        return epoch, step

    def _count_steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch; its last step may be short."""
        return len(self._plan(epoch)) - 1

    def slots(self, step: int) -> list[Pieces]:
        """The `num_slots` slots of a step of the run; in an epoch's last step they may be short or empty."""
        count = self.num_slots(step)
        epoch, step = self.locate(step)
        window, segment, offset = (int(x) for x in self._plan(epoch)[step])
        cursor = (window, segment, offset)
        slots = []
        for _ in range(count):
            ranges, cursor = self._fill(epoch, cursor)
            slots.append(Pieces.join([self._take(epoch, *taken) for taken in ranges]))
        return slots

    def next_epoch(self, step: int) -> int:
        """The first step of the epoch after that of a step."""
        epoch, within = self.locate(step)
        return step - within + self.steps_in(epoch)

    def prepare(self, steps: int) -> None:
        """Make the plans that `steps` steps need, so that readers in other processes find them on disk."""
        self.locate(steps - 1)

    def _load_plan(self, epoch: int) -> np.ndarray:
        name = f"phase-{self.phase}-epoch-{epoch:05d}.npy" if self.phase else f"epoch-{epoch:05d}.npy"
        path = self.plans / name if self.plans else None
        plan = _read_plan(path) if path is not None else None
        if plan is not None:
            return plan
        plan = np.array(list(self._step_starts(epoch)), np.int64)
        if path is not None:
            with contextlib.suppress(StorageError, OSError):  # a full disk; whoever needs the plan can make it
                path.parent.mkdir(parents=True, exist_ok=True)
                npy.save(path, plan, flush=True)
        return plan

    def _step_starts(self, epoch: int) -> Iterator[Cursor]:
        cursor, last = (0, 0, 0), len(self._windows(epoch))
        step = sum(self.steps_in(before) for before in range(epoch)) if self.ramp else 0
        while cursor[0] < last:
            start, any_text = cursor, False
            for _ in range(self.num_slots(step)):
                taken, cursor = self._fill(epoch, cursor)
                any_text |= bool(taken)
            if any_text:  # none where a slot ended with the last pair, before windows without one (pairs.py)
                yield start
                step += 1
        yield cursor

    def _fill(self, epoch: int, cursor: Cursor) -> tuple[list[tuple[int, int, int, int, int]], Cursor]:
        """Fill one slot from `cursor` on.

        Returns the ranges taken, (window, first segment, tokens of it already used, end segment, tokens cut from the
        end segment), and the cursor behind them.
        """
        taken, room, last = [], self.slot_tokens, len(self._windows(epoch))
        while cursor[0] < last:
            window, first, offset = cursor
            ends = self._window(epoch, window).ends
            before = ends[first - 1] if first else 0
            before += offset  # the rest of a cut segment needs special tokens of its own
            end = int(np.searchsorted(ends, before + room, side="right"))
            if end > first:
                room -= int(ends[end - 1] - before)
                offset = 0
            else:
                end = first  # not even the first one fits whole
            cut = 0
            if end < len(ends) and room - SPECIALS >= MIN_PIECE:
                cut = room - SPECIALS
            if end > first or cut:
                taken.append((window, first, cursor[2], end, cut))
            if end < len(ends):
                return taken, (window, end, offset + cut)
            cursor = (window + 1, 0, 0)
        return taken, cursor

    def _take(self, epoch: int, window: int, first: int, offset: int, end: int, cut: int) -> Pieces:
        stop = end + (cut > 0)
        pieces = self._window(epoch, window).pieces
        start, length = pieces.start[first:stop].copy(), pieces.length[first:stop].copy()
        start[0] += offset
        length[0] -= offset
        if cut:
            length[-1] = cut
        return Pieces(pieces.shard[first:stop], start, length)

    def _visited(self, shard: int, epoch: int) -> np.ndarray | None:
        """bool [D]: documents of a shard that an epoch visits; None for all."""
        return self.shards.visited(shard, keyed.key(self.seed, "visits", *self._phase_key), epoch)

    @property
    def _phase_key(self) -> tuple[int, ...]:
        return (self.phase,) if self.phase else ()

    def _group_shards(self, epoch: int) -> list[np.ndarray]:
        """Shards of each window, in visiting order."""
        shards = keyed.permutation(keyed.key(self.seed, "shards", epoch, *self._phase_key), self.shards.num_shards)
        sizes = self.shards.sizes[shards]
        window = (np.cumsum(sizes) - sizes) // self.window_tokens
        return [shards[window == w] for w in np.unique(window)]

    def _build_window(self, epoch: int, window: int) -> Window:
        numbers = [int(number) for number in self._windows(epoch)[window]]
        pieces = Pieces.join(
            [cut_documents(self.shards, n, self.sequence_length, self._visited(n, epoch)) for n in numbers]
        )
        order = keyed.permutation(keyed.key(self.seed, "segments", epoch, window, *self._phase_key), len(pieces.length))
        pieces = Pieces(pieces.shard[order], pieces.start[order], pieces.length[order])
        return Window(pieces, np.cumsum(pieces.length + SPECIALS))


def _read_plan(path: Path) -> np.ndarray | None:
    """int64 [steps + 1, 3]: memory map; None when it is not there or not whole."""
    try:
        plan = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if plan.dtype != np.int64 or plan.ndim != 2 or plan.shape[1] != 3 or len(plan) < 2 or plan[0].any():
        return None
    further = np.diff(plan, axis=0)
    first = np.argmax(further != 0, axis=1)  # every step starts behind the one before
    return plan if (np.take_along_axis(further, first[:, None], 1) > 0).all() else None


def cut_documents(shards: TokenShards, shard: int, sequence_length: int, visited: np.ndarray | None = None) -> Pieces:
    """Every segment of a shard, in document order: full ones of `sequence_length` - 2 tokens, then the rest.

    `visited`, bool [D], says of which documents; None of all.
    """
    longest = sequence_length - SPECIALS
    offsets = np.asarray(shards.documents(shard))
    sizes = np.diff(offsets)
    counts = -(-sizes // longest) if visited is None else -(-sizes // longest) * visited
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.repeat(offsets[:-1], counts) + within * longest
    length = np.minimum(np.repeat(offsets[1:], counts) - start, longest)
    return Pieces(np.full(len(start), shard, np.int64), start, length)


def fixed_slots(shards: TokenShards, sequence_length: int, slot_tokens: int, max_tokens: int) -> list[Pieces]:
    """Evaluation slots: the first `max_tokens` tokens of a split, in document order, segments never cut again."""
    slots, budget = [], max_tokens
    for shard in range(shards.num_shards):
        pieces = cut_documents(shards, shard, sequence_length)
        first = 0
        while first < len(pieces.length) and budget > 0:
            ends = np.cumsum(pieces.length[first : first + slot_tokens] + SPECIALS)
            count = int(np.searchsorted(ends, min(slot_tokens, max(budget, sequence_length)), side="right"))
            chosen = slice(first, first + count)
            slots.append(Pieces(pieces.shard[chosen], pieces.start[chosen], pieces.length[chosen]))
            budget -= slots[-1].num_tokens
            first += count
    return slots
