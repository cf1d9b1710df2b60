"""The order: every token once an epoch, full slots, the same batches for any processes and workers."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.data import keyed
from bertpipe.data.batches import BUDGET_SLACK, MaskedSlots, load
from bertpipe.data.masking import Masking, Rate, Vocabulary
from bertpipe.data.order import MIN_PIECE, Order, fixed_slots
from bertpipe.data.shards import TokenShards
from bertpipe.errors import DataError
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, write_shards


def make(shards, **changes):
    return Order(shards, **({"seed": 3, "sequence_length": 32, "slot_tokens": 128, "slots_per_step": 4} | changes))


def places(order, epoch):
    """Every token's place in the corpus, in the order the epoch visits them."""
    first = sum(order.steps_in(e) for e in range(epoch))
    visited = []
    for step in range(first, first + order.steps_in(epoch)):
        for p in order.slots(step):
            for shard, start, length in zip(p.shard, p.start, p.length, strict=True):
                visited.append(order.shards.first_token[shard] + np.arange(start, start + length))
    return np.concatenate(visited)


def source(shards, probability=0.15, rate=None):
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIAL_IDS.values())] = True
    masking = Masking("token", probability, 0.8, 0.1, Vocabulary(4, special, shards.continuations), rate)
    return MaskedSlots(make(shards), masking, seed=5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    shard_tokens=st.integers(20, 500),
    sequence_length=st.integers(11, 40),
    extra=st.integers(0, 100),
    slots=st.integers(1, 4),
    window=st.sampled_from([1, 300, 1 << 28]),
)
def test_an_epoch_visits_every_token_once(
    tmp_path_factory, lengths, shard_tokens, sequence_length, extra, slots, window
):
    """Packing K1 and K2: no token lost, doubled or made up, no sequence too long."""
    folder = write_shards(tmp_path_factory.mktemp("s"), lengths, shard_tokens)
    shards = TokenShards(folder, "train")
    order = Order(shards, 1, sequence_length, sequence_length + extra, slots, window_tokens=window)
    visited = places(order, 0)
    assert np.array_equal(np.sort(visited), np.arange(sum(lengths)))
    for step in range(order.steps_in(0)):
        for pieces in order.slots(step):
            assert pieces.num_tokens <= sequence_length + extra
            assert not len(pieces.length) or (pieces.length.min() >= 1 and pieces.length.max() <= sequence_length - 2)


def test_no_sequence_crosses_a_document(shards):
    """Packing K3; that attention doesn't either is shown in tests/model/test_attention.py."""
    order = make(shards)
    for step in range(order.steps_in(0)):
        for p in order.slots(step):
            for shard, start, length in zip(p.shard, p.start, p.length, strict=True):
                ends = shards.documents(int(shard))
                assert np.searchsorted(ends, start, "right") == np.searchsorted(ends, start + length - 1, "right")


def test_slots_are_full_but_for_the_last_step(shards):
    """Packing K7."""
    order = make(shards)
    for step in range(order.steps_in(0) - 1):
        for pieces in order.slots(step):
            assert pieces.num_tokens > order.slot_tokens - MIN_PIECE - 2


def test_epochs_and_seeds_differ_and_repeat(shards):
    order = make(shards)
    first, second = places(order, 0), places(order, 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, places(make(shards), 0))
    assert not np.array_equal(first, places(make(shards, seed=4), 0))
    neighbours = np.mean(np.diff(first) == 1)
    assert neighbours < 1, "segments are shuffled"


def test_a_plan_file_can_be_deleted_and_comes_back_the_same(shards, tmp_path):
    tmp_path = tmp_path / "plans"
    order = make(shards, plans=tmp_path)
    order.prepare(order.steps_in(0) + 1)
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(written) == ["epoch-00000.npy", "epoch-00001.npy"]
    (tmp_path / "epoch-00001.npy").unlink()
    again = make(shards, plans=tmp_path)
    again.prepare(again.steps_in(0) + 1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == written


@pytest.mark.parametrize("damage", ["cut", "zeros", "order", "type", "empty"])
def test_a_damaged_plan_is_made_again(shards, tmp_path, damage):
    """As a power cut may leave it."""
    order = make(shards, plans=tmp_path / "plans")
    order.prepare(1)
    (path,) = (tmp_path / "plans").iterdir()
    whole = path.read_bytes()
    rows = np.load(path)
    if damage in ("cut", "empty"):
        path.write_bytes(whole[:100] if damage == "cut" else b"")
    elif damage == "zeros":
        path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    else:
        np.save(path, rows[::-1] if damage == "order" else rows.astype(np.float64))
    again = make(shards, plans=tmp_path / "plans")
    assert np.array_equal(again.slots(5)[0].start, order.slots(5)[0].start)
    assert path.read_bytes() == whole


def test_a_plan_that_cannot_be_written_is_kept_in_memory(shards, tmp_path):
    (tmp_path / "plans").write_text("no folder")
    order = make(shards, plans=tmp_path / "plans")
    order.prepare(1)
    assert np.array_equal(order.slots(5)[0].start, make(shards).slots(5)[0].start)


def test_any_step_is_found_without_the_steps_before(shards, tmp_path):
    reference = make(shards)
    steps = reference.steps_in(0) + 5
    for step in reversed(range(steps)):
        fresh = make(shards, plans=tmp_path / "plans")
        for a, b in zip(fresh.slots(step), reference.slots(step), strict=True):
            assert np.array_equal(a.start, b.start) and np.array_equal(a.length, b.length)


def test_an_order_travels_to_a_worker(shards):
    order = pickle.loads(pickle.dumps(make(shards)))
    for a, b in zip(order.slots(2), make(shards).slots(2), strict=True):
        assert np.array_equal(a.start, b.start)


def global_batches(shards, world, workers, steps):
    """The tokens, labels and positions of each global batch as `world` processes with `workers` workers see it."""
    share = 4 // world
    parts = [list(load(source(shards), range(steps), r * share, (r + 1) * share, workers, False)) for r in range(world)]
    rows = []
    for step in range(steps):
        assert {part[step][0] for part in parts} == {step}
        slots = [slot for part in parts for slot in part[step][1]]
        rows.append([(s.input_ids, s.cu_seqlens, s.predict_index, s.predict_labels, s.predict_weight) for s in slots])
    return rows


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 0), (4, 0), (2, 1)])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(shards, world, workers):
    steps = make(shards).steps_in(0) + 2  # into the second epoch
    for expected, found in zip(
        global_batches(shards, 1, 0, steps), global_batches(shards, world, workers, steps), strict=True
    ):
        assert len(expected) == len(found) == 4
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_sees_the_same_global_batches_in_order(shards, workers):
    """24 slots, which 1, 2, 3, 4, 6 and 8 processes share evenly; hashes of all fields, into the second epoch."""
    vocabulary = Vocabulary(4, np.arange(VOCAB_SIZE) < 5, shards.continuations)

    def hashes(world, workers):
        made = MaskedSlots(make(shards, slots_per_step=24), Masking("token", 0.15, 0.8, 0.1, vocabulary), seed=5)
        steps, share = range(made.order.steps_in(0) + 2), 24 // world
        ranks = [load(made, steps, r * share, (r + 1) * share, workers, False) for r in range(world)]
        found = []
        for parts in zip(*ranks, strict=True):
            state = hashlib.sha256()
            for batch in (slot for _, slots in parts for slot in slots):
                for name in ("input_ids", "cu_seqlens", "predict_index", "predict_labels", "predict_weight"):
                    state.update(getattr(batch, name).numpy().tobytes())
            found.append(state.hexdigest())
        return found

    expected = hashes(1, 0)
    assert len(set(expected)) == len(expected) > 4
    for world in (1, 2, 3, 4, 6, 8):
        assert hashes(world, workers) == expected, world


def test_every_epoch_has_the_tokens_of_the_corpus_once(shards):
    order = make(shards)
    for epoch in range(3):
        assert np.array_equal(np.sort(places(order, epoch)), np.arange(shards.num_tokens))


def test_a_batch_is_what_it_says(shards):
    slot = source(shards).slots(0, 0, 1)[0]
    ids, positions = slot.input_ids[0].clone(), slot.position_ids[0]
    real = slot.predict_weight > 0
    ids[slot.predict_index[real]] = slot.predict_labels[real]  # unmasked again
    bounds = slot.cu_seqlens.tolist()
    for first, last in itertools.pairwise(bounds[: slot.num_sequences + 1]):
        assert ids[first] == SPECIAL_IDS["cls"] and ids[last - 1] == SPECIAL_IDS["sep"]
        assert torch.equal(positions[first:last], torch.arange(last - first))
        assert (ids[first + 1 : last - 1] >= 5).all()
    assert (ids[slot.num_tokens :] == SPECIAL_IDS["pad"]).all()
    assert bounds[-1] == 128 and max(np.diff(bounds)) <= slot.max_seqlen == 32


def test_the_masking_rate_follows_the_step_and_room_stays(shards):
    steps = make(shards).steps_in(0) - 1
    slots = [source(shards, rate=Rate("linear", 0.4, 0.1, steps)).slots(step, 0, 4) for step in range(steps)]
    assert {len(slot.predict_index) for step in slots for slot in step} == {int(np.ceil(0.4 * 128)) + BUDGET_SLACK}
    shares = [sum(float(b.predict_weight.sum()) for b in s) / sum(b.num_tokens for b in s) for s in slots]
    special = 1 - 2 / 27  # of the tokens, about, are not [CLS] or [SEP]
    assert abs(np.mean(shares[:10]) / special - 0.4) < 0.06 and abs(np.mean(shares[-10:]) / special - 0.1) < 0.06
    constant = source(shards, rate=Rate("constant", 0.15, 0.15, steps)).slots(3, 0, 4)
    for a, b in zip(constant, source(shards).slots(3, 0, 4), strict=True):
        assert torch.equal(a.predict_index, b.predict_index) and torch.equal(a.input_ids, b.input_ids)


def test_batches_are_fixed_for_ever(shards):
    """Golden value: 30 steps over two epochs."""
    state, fields = hashlib.sha256(), ("input_ids", "position_ids", "token_type_ids", "cu_seqlens")
    for step in range(30):
        for batch in source(shards).slots(step, 0, 4):
            for name in (*fields, "predict_index", "predict_labels", "predict_weight"):
                state.update(getattr(batch, name).numpy().astype("<i8").tobytes())
    assert state.hexdigest()[:16] == "6f8ac90a98693b80"


def test_evaluation_slots_keep_segments_whole(shards):
    slots = fixed_slots(shards, 32, 128, 10**9)
    assert sum(int(p.length.sum()) for p in slots) == shards.num_tokens
    assert all(p.num_tokens <= 128 for p in slots)
    few = fixed_slots(shards, 32, 128, 256)
    assert sum(p.num_tokens for p in few) <= 256 + 32


def test_nothing_to_train_on_is_said(tmp_path):
    shards = TokenShards(write_shards(tmp_path / "empty", []), "train")
    with pytest.raises(DataError, match="no tokens"):
        make(shards)


def test_keyed_draws_are_fixed_for_ever():
    """Golden values: another hash would change every run's order and masks."""
    assert keyed.key(0, "mask", 1) == keyed.key(0, "mask", 1)
    assert keyed.key(1, 2) != keyed.key(2, 1) and keyed.key("ab") != keyed.key("a", "b")
    draws = keyed.uniform(keyed.key(7), np.arange(200_000))
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert sorted(keyed.permutation(keyed.key(7), 1000)) == list(range(1000))
