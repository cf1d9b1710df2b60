"""Runs that are saved, killed, resumed and moved to other processes, against the one that never was (K5); and mutants.

The machine drives what the training loop drives: an order, its masked slots and the loader, resumed from one integer.
Each historical bug of other libraries, planted into that driver, has to be caught by the same machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from bertpipe.data.batches import MaskedSlots, PackedBatch, load
from bertpipe.data.masking import Masking, Vocabulary
from bertpipe.data.order import Order
from bertpipe.data.shards import TokenShards
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, in_memory, write_shards

SLOTS = 4  # of a step
STEPS = 18  # of the run: four epochs and a bit
LENGTHS = np.random.default_rng(2).integers(1, 60, 27).tolist()
RUNS = int(os.environ.get("BERTPIPE_MACHINE_RUNS", "5000"))


def digest(batch: PackedBatch) -> bytes:
    fields = (batch.input_ids, batch.cu_seqlens, batch.predict_index, batch.predict_labels, batch.predict_weight)
    return b"".join(field.numpy().tobytes() for field in fields)


class Copies:
    """A source as some loader workers have it: step by step in turn, each with a copy of its own."""

    def __init__(self, source: MaskedSlots, workers: int):
        self.sources = [pickle.loads(pickle.dumps(source)) for _ in range(workers)] or [source]

    def slots(self, step: int, first: int, last: int) -> list[PackedBatch]:
        return self.sources[step % len(self.sources)].slots(step, first, last)


class Run:
    """The part of a training run that concerns data, on `world` processes; its whole state is the step."""

    def __init__(self, folder: Path, world: int, workers: int, state: str | None):
        shards = TokenShards(folder / "shards", "train")
        self.order = Order(shards, 3, 32, 64, SLOTS, folder / "plans", window_tokens=700)
        special = np.zeros(VOCAB_SIZE, bool)
        special[list(SPECIAL_IDS.values())] = True
        masking = Masking("token", 0.15, 0.8, 0.1, Vocabulary(4, special, shards.continuations))
        self.source = Copies(MaskedSlots(self.order, masking, 5), workers)
        self.world, self.workers = world, workers
        self.step = 0
        if state is not None:
            self.load(json.loads(state))
        self.begin()

    def begin(self) -> None:
        """Open a loader on each process; workers prepare some steps ahead."""
        share = SLOTS // self.world
        self.ranks = [
            prefetch(load(self.source, self.plan(), r * share, (r + 1) * share, 0, False), 2 * self.workers)
            for r in range(self.world)
        ]

    def plan(self) -> range | list[int]:
        """The steps to come."""
        return range(self.step, STEPS)

    def next(self) -> str | None:
        """Hash of the next global batch; None when the run is over."""
        state = hashlib.sha256()
        parts = [next(rank, None) for rank in self.ranks]
        if any(part is None for part in parts):
            return None
        for _, slots in parts:
            for batch in slots:
                state.update(digest(batch))
        self.step += 1
        return state.hexdigest()

    def save(self) -> str:
        return json.dumps({"step": self.step})

    def load(self, state: dict) -> None:
        self.step = state["step"]

    def first_of(self, epoch: int) -> int:
        return sum(self.order.steps_in(e) for e in range(epoch))


def prefetch(batches: Iterator, ahead: int) -> Iterator:
    waiting: deque = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


# --- the bugs of others: what each did, as a plan of steps or a state -----------------------------------------------


class EpochForgotten(Run):
    """accelerate#2016: resumed in a later epoch, goes on as if in the first."""

    def plan(self):
        return [*range(self.order.locate(self.step)[1], STEPS)][: STEPS - self.step]


class SkipsEveryEpoch(Run):
    """accelerate#1451: what is skipped to resume is skipped again in each epoch after it."""

    def plan(self):
        epoch, skipped = self.order.locate(self.step)
        steps = list(range(self.step, self.first_of(epoch + 1)))
        while len(steps) < STEPS:
            epoch += 1
            steps += range(self.first_of(epoch) + skipped, self.first_of(epoch + 1))
        return steps[: STEPS - self.step]


class FirstPermutation(Run):
    """accelerate#4195: the place in the epoch comes back, its permutation is that of the first one."""

    def plan(self):
        epoch, within = self.order.locate(self.step)
        end = self.first_of(epoch + 1)
        wrong = [min(s, self.first_of(1) - 1) for s in range(within, within + end - self.step)]
        return [*wrong, *range(end, STEPS)][: STEPS - self.step]


class NextPermutation(Run):
    """accelerate#4233: resumed inside an epoch, it skips into the permutation of the next one."""

    def plan(self):
        epoch, within = self.order.locate(self.step)
        end = self.first_of(epoch + 1)
        if not within:
            return range(self.step, STEPS)
        return [*range(end + within, end + within + end - self.step), *range(end, STEPS)][: STEPS - self.step]


class PermutationTwice(Run):
    """accelerate#4233, its second part: the epoch after the resumed one has that one's permutation again."""

    def plan(self):
        epoch, within = self.order.locate(self.step)
        if not within:
            return range(self.step, STEPS)
        end, start = self.first_of(epoch + 1), self.first_of(epoch)
        return [*range(self.step, end), *range(start, end), *range(self.first_of(epoch + 2), STEPS)][
            : STEPS - self.step
        ]


class StateFrozen(Run):
    """datasets#8308: after a resume the state that is saved no longer advances."""

    def load(self, state):
        super().load(state)
        self.frozen = self.step

    def save(self):
        return json.dumps({"step": 0 if hasattr(self, "frozen") else self.step})


class BufferLost(Run):
    """datasets#8360 (modelled): what was read ahead counts as seen, and is lost when resumed."""

    def save(self):
        return json.dumps({"step": min(STEPS, self.step + 2 * self.workers)})


class TailAgain(Run):
    """Megatron-Bridge#4601: the count of samples seen stays that of the resume; later epochs are that one's tail."""

    def plan(self):
        epoch, within = self.order.locate(self.step)
        tail = list(range(self.step, self.first_of(epoch + 1)))
        return (tail * STEPS)[: STEPS - self.step] if within else range(self.step, STEPS)


class EpochDropped(Run):
    """meta-pytorch/data#1437: a state saved at the end of an epoch loads as one that has the next behind it, too."""

    def load(self, state):
        super().load(state)
        epoch, within = self.order.locate(self.step)
        if self.step and not within:
            self.step = min(STEPS, self.first_of(epoch + 1))


MUTANTS = [
    EpochForgotten,
    SkipsEveryEpoch,
    FirstPermutation,
    NextPermutation,
    PermutationTwice,
    StateFrozen,
    BufferLost,
    TailAgain,
    EpochDropped,
]


# --- the machine ------------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Any life of a run; every batch it hands out is that of the uninterrupted run at that step."""

    driver: type[Run] = Run
    folder: Path
    expected: list[str]
    ends: list[int]

    @initialize(world=st.sampled_from([1, 2, 4]), workers=st.integers(0, 2))
    def start(self, world, workers):
        shutil.rmtree(self.folder / "plans", ignore_errors=True)
        self.world, self.workers = world, workers
        self.saved: list[tuple[str, int]] = []
        self.open(None, 0)

    def open(self, state: str | None, step: int) -> None:
        self.run = self.driver(self.folder, self.world, self.workers, state)
        self.step = step  # what the oracle knows

    def advance(self) -> None:
        found = self.run.next()
        assert found == (self.expected[self.step] if self.step < STEPS else None)
        self.step = min(STEPS, self.step + 1)

    @rule(count=st.integers(1, 4))
    def go_on(self, count):
        for _ in range(count):
            self.advance()

    @rule()
    def to_the_end_of_the_epoch(self):
        end = next((end for end in self.ends if end > self.step), STEPS)
        while self.step < end:
            self.advance()

    @precondition(lambda self: self.step >= self.ends[-1])
    @rule()
    def to_exhaustion(self):
        while self.step < STEPS:
            self.advance()
        self.advance()

    @rule()
    def save(self):
        self.saved.append((self.run.save(), self.step))
        assert len(self.saved[-1][0]) <= 1024

    @precondition(lambda self: self.saved)
    @rule(times=st.integers(1, 2))
    def resume(self, times):
        for _ in range(times):
            self.open(*self.saved[-1])

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def resume_an_older_one(self, data):
        self.open(*data.draw(st.sampled_from(self.saved)))

    @rule()
    def killed_before_it_saved(self):
        self.saved.clear()
        self.open(None, 0)

    @precondition(lambda self: 0 < self.step < STEPS)
    @rule()
    def resume_here_and_go_through_the_next_epoch(self):
        self.open(self.run.save(), self.step)
        for _ in range(2):
            self.to_the_end_of_the_epoch()

    @rule(world=st.sampled_from([1, 2, 4]), workers=st.integers(0, 2))
    def on_other_processes(self, world, workers):
        self.world, self.workers = world, workers
        self.saved.append((self.run.save(), self.step))
        self.open(*self.saved[-1])

    @rule()
    def plans_deleted(self):
        shutil.rmtree(self.folder / "plans", ignore_errors=True)


@pytest.fixture(scope="module")
def scene() -> Iterator[Path]:
    """Shards, and what an uninterrupted run on one process sees of them."""
    with in_memory() as folder:
        write_shards(folder / "shards", LENGTHS, shard_tokens=300)
        Machine.folder = folder
        run = Run(folder, 1, 0, None)
        Machine.expected = [run.next() for _ in range(STEPS)]
        assert run.next() is None and len(set(Machine.expected)) == STEPS
        Machine.ends = [end for epoch in range(1, 6) if (end := run.first_of(epoch)) < STEPS]
        assert Machine.ends[0] >= 4 and len(Machine.ends) >= 3
        yield folder


def live(driver: type[Run], runs: int, **more) -> None:
    machine = type("Life", (Machine,), {"driver": driver})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.mark.parametrize(
    "runs", [pytest.param(25, id="short"), pytest.param(RUNS, id="long", marks=pytest.mark.torture)]
)
def test_any_life_of_a_run_is_the_uninterrupted_one(scene, runs):
    live(Run, runs, phases=[Phase.generate])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_bugs_of_others_are_caught(scene, mutant):
    with pytest.raises(AssertionError):
        live(mutant, 60, phases=[Phase.generate])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_that_is_never_resumed_is_right(scene, mutant):
    """So it is the resuming that the machine tells apart."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(scene / "shards", Path(folder) / "shards")
        run = mutant(Path(folder), 2, 0, None)
        assert [run.next() for _ in range(STEPS)] == Machine.expected
