"""Phases and batch-size warmup: every order pure, steps of the right size and length, the same for any processes."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.config import Phase, Ramp, TrainConfig
from bertpipe.data import phases
from bertpipe.data.batches import MaskedSlots, load
from bertpipe.data.masking import Masking, Vocabulary
from bertpipe.data.order import Order
from bertpipe.errors import ConfigError
from bertpipe.train.samples import Epochs
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE

SHORT = {"share": 0.75, "sequence_length": 16}
LONG = {"share": 0.25, "sequence_length": 32, "slot_tokens": 160}
RAMPS = [{"steps": 3, "slots": 2}, {"steps": 30, "slots": 4}]


def train(**changes) -> TrainConfig:
    fields = {"steps": 200, "seed": 3, "sequence_length": 32, "slot_tokens": 128, "slots_per_step": 8}
    fields |= {"phases": [SHORT, LONG], "batch_warmup": RAMPS}
    return TrainConfig(**(fields | changes))


def visited(order, steps):
    """Places in the corpus of the tokens of some steps, in their order."""
    found = []
    for step in steps:
        for p in order.slots(step):
            first = order.shards.first_token[p.shard]
            found += [np.arange(f + s, f + s + n) for f, s, n in zip(first, p.start, p.length, strict=True)]
    return np.concatenate(found)


def masked(order):
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIAL_IDS.values())] = True
    masking = Masking("token", 0.15, 0.8, 0.1, Vocabulary(4, special, order.shards.continuations))
    return phases.Ramped(MaskedSlots(order, masking, seed=5), order)


def test_no_phases_are_the_order_there_was(shards):
    """Golden: the order's keys with phase 0 are those of an order that knows no phases."""
    plain = phases.make_order(shards, train(phases=[], batch_warmup=[]))
    assert isinstance(plain, Order)
    assert np.array_equal(visited(plain, range(5)), visited(Order(shards, 3, 32, 128, 8), range(5)))
    one = phases.make_order(shards, train(phases=[{"share": 1, "sequence_length": 32}], batch_warmup=[]))
    assert np.array_equal(visited(plain, range(60)), visited(one, range(60)))
    assert [plain.locate(step) for step in range(60)] == [one.locate(step) for step in range(60)]


def test_each_phase_has_its_lengths_and_its_own_order(shards):
    order = phases.make_order(shards, train())
    assert order.locate(149)[0] + 1 == order.locate(150)[0], "the second phase begins an epoch"
    assert order.locate(150)[1] == 0
    for step in (0, 149, 150, 199):
        longest, total = (14, 128) if step < 150 else (30, 160)
        slots = order.slots(step)
        assert max(p.length.max() for p in slots if len(p.length)) == longest
        assert max(p.num_tokens for p in slots) > total - 10
        batch = masked(order).slots(step, 0, 8)[0]
        assert batch.input_ids.shape == (1, total) and batch.max_seqlen == longest + 2
    alone = Order(shards, 3, 32, 160, 8, phase=1)
    assert np.array_equal(visited(order, range(150, 155)), visited(alone, range(5)))
    assert not np.array_equal(visited(alone, range(5)), visited(Order(shards, 3, 32, 160, 8), range(5)))


def test_every_token_comes_once_an_epoch_while_steps_grow(shards):
    order = phases.make_order(shards, train(phases=[]))
    sizes = [len(order.slots(step)) for step in range(40)]
    assert sizes == [2] * 3 + [4] * 30 + [8] * 7
    first = order.steps_in(0)
    assert first < 33 < first + order.steps_in(1), "the second epoch begins inside the warmup"
    for epoch in range(3):
        steps = [step for step in range(first + 60) if order.locate(step)[0] == epoch]
        assert np.array_equal(np.sort(visited(order, steps)), np.arange(shards.num_tokens))


def test_masks_differ_between_phases(shards):
    """The same text in two phases of equal lengths: other epochs, so other masks."""
    equal = [{"share": 0.5, "sequence_length": 32}] * 2
    order = phases.make_order(shards, train(phases=equal, batch_warmup=[]))
    epochs = [{order.locate(step)[0] for step in part} for part in (range(100), range(100, 200))]
    assert max(epochs[0]) + 1 == min(epochs[1])


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 1)])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(shards, world, workers):
    """Over the seams: a growing step, an epoch's end, the next phase. A worker gets the order pickled."""
    order = phases.make_order(shards, train(steps=60))
    steps = [0, 2, 3, 32, 33, 44, 45, 46, 59]
    whole = {step: masked(order).slots(step, 0, 8) for step in steps}
    fresh = phases.make_order(shards, train(steps=60))
    share = 8 // world
    ranks = [
        list(load(masked(fresh), steps, r * share, (r + 1) * share, workers, False))  # type: ignore[arg-type]
        for r in range(world)
    ]
    for number, step in enumerate(steps):
        assert {rank[number][0] for rank in ranks} == {step}
        found = [slot for rank in ranks for slot in rank[number][1]]
        assert len(found) == len(whole[step]) == order.num_slots(step)
        assert all(len(rank[number][1]) == len(found) // world for rank in ranks)
        for a, b in zip(whole[step], found, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.predict_index, b.predict_index)


def test_plans_come_back_the_same_and_any_step_is_found_alone(shards, tmp_path):
    reference = phases.make_order(shards, train())
    written = phases.make_order(shards, train(), tmp_path / "plans")
    written.prepare(200)
    before = {path.name: path.read_bytes() for path in (tmp_path / "plans").iterdir()}
    assert {"epoch-00000.npy", "phase-1-epoch-00000.npy"} <= before.keys()
    for step in (199, 150, 149, 3, 0):
        fresh = pickle.loads(pickle.dumps(phases.make_order(shards, train(), tmp_path / "plans")))
        assert np.array_equal(visited(fresh, [step]), visited(reference, [step]))
        assert fresh.locate(step) == reference.locate(step)
    for path in (tmp_path / "plans").iterdir():
        path.unlink()
    phases.make_order(shards, train(), tmp_path / "plans").prepare(200)
    assert {path.name: path.read_bytes() for path in (tmp_path / "plans").iterdir()} == before


def test_the_next_epoch_begins_where_the_number_changes(shards):
    for order in (phases.make_order(shards, train()), Order(shards, 3, 32, 128, 4)):
        epochs = [order.locate(step)[0] for step in range(200)]
        for step in range(150):
            following = order.next_epoch(step)
            assert following > step and (following >= 200 or epochs[following] == epochs[following - 1] + 1)
            assert set(epochs[step:following]) == {epochs[step]}


def test_plans_are_made_one_epoch_ahead(shards, tmp_path):
    """A run of a million steps over little text has thousands of epochs, and begins at once all the same."""
    order = Order(shards, 3, 32, 128, 4, tmp_path / "plans")
    epochs = Epochs(order, 1_000_000, plans_ahead=True)
    for step in range(order.steps_in(0) + 1):
        assert epochs(step) == (step == order.steps_in(0))
        epochs.wait()
        assert len(list((tmp_path / "plans").iterdir())) == 2 + (step == order.steps_in(0))
    last = Epochs(Order(shards, 3, 32, 128, 4, tmp_path / "short"), order.steps_in(0), plans_ahead=True)
    assert last(order.steps_in(0) - 1) == 0
    last.wait()
    assert len(list((tmp_path / "short").iterdir())) == 1, "no epoch behind the run's end is planned"
    assert not Epochs(order, 10, plans_ahead=False)(0)


@given(
    steps=st.integers(1, 400),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ramp=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 4)), max_size=3),
)
def test_phases_make_up_the_run(steps, cuts, ramp):
    given_phases = [{"share": c / sum(cuts), "sequence_length": 32, "slot_tokens": 100 + c} for c in cuts]
    stages = [{"steps": n, "slots": slots} for (n, _), slots in zip(ramp, sorted(s for _, s in ramp), strict=True)]
    made = train(steps=steps, phases=given_phases, batch_warmup=stages, slots_per_step=12)
    found = phases.parts(made)
    assert found[0].first == 0 and found[-1].last == steps
    assert all(a.last == b.first for a, b in itertools.pairwise(found))
    for part, c in zip(found, cuts, strict=True):
        assert part.last - part.first == pytest.approx(steps * c / sum(cuts), abs=1)
    sizes = [slots for stage in stages for slots in [stage["slots"]] * stage["steps"]] + [12] * steps
    tokens = sum(size * next(p.slot_tokens for p in found if s < p.last) for s, size in enumerate(sizes[:steps]))
    assert phases.total_tokens(made) == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": [Phase(share=0.5, sequence_length=16)]}, r"train.phases: the shares sum to 0.5"),
        (
            {"phases": [Phase(share=1, sequence_length=64)]},
            r"phase 1 has sequences of 64 .* train.sequence_length is 32",
        ),
        ({"phases": [Phase(share=1, sequence_length=32, slot_tokens=16)]}, r"sequences of 32 tokens in slots of 16"),
        ({"batch_warmup": [Ramp(steps=1, slots=3)]}, r"train.batch_warmup: 8 slots are no multiple of the first 3"),
        ({"batch_warmup": [Ramp(steps=1, slots=2), Ramp(steps=1, slots=3)]}, r"3 slots are no multiple of the first 2"),
        ({"batch_warmup": [Ramp(steps=1, slots=4), Ramp(steps=1, slots=16)]}, r"slots must grow .* got \[4, 16, 8\]"),
    ],
)
def test_what_makes_no_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        phases.check(train(**changes))
