"""Several sources mixed by weight: their shares of the text trained on, every document in its turn, the same bits."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.data.batches import MaskedSlots
from bertpipe.data.masking import Masking, Vocabulary
from bertpipe.data.mixture import MixedShards, describe, open_train
from bertpipe.data.order import Order
from bertpipe.data.pairs import PairOrder
from bertpipe.data.shards import INDEX, TokenShards
from bertpipe.errors import ArtifactError, ConfigError
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, write_shards

SIZES = (60, 25, 115)  # documents of each source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lengths = np.random.default_rng(4).integers(1, 90, sum(SIZES)).tolist()
    return write_shards(tmp_path_factory.mktemp("s"), lengths, 700, sources=np.repeat([0, 1, 2], SIZES).tolist())


def make(shards, window_tokens=1 << 28, seed=3, slots_per_step=4):
    return Order(shards, seed, 32, 128, slots_per_step, window_tokens=window_tokens)


def visits(order, plain, epoch):
    """int64 [tokens of the split]: how often an epoch visits each token."""
    numbers = {plain.tokens(shard).filename: shard for shard in range(plain.num_shards)}
    first = sum(order.steps_in(e) for e in range(epoch))
    counts = np.zeros(plain.num_tokens, np.int64)
    for step in range(first, first + order.steps_in(epoch)):
        slots = order.slots(step)
        assert sum(len(p.length) for p in slots), "no step without text"
        for p in slots:
            for shard, start, length in zip(p.shard, p.start, p.length, strict=True):
                number = numbers[order.shards.tokens(int(shard)).filename]
                counts[plain.first_token[number] + start :][:length] += 1
    return counts


def tokens_of_sources(plain, counts):
    """Sum of `counts`, one a token of the split, by source."""
    return np.bincount(np.repeat(plain.source, np.diff(plain.first_token)), counts, len(plain.sources))


def test_a_shard_holds_one_source(folder):
    plain = TokenShards(folder, "train")
    assert plain.sources == ["source 0", "source 1", "source 2"]
    assert (np.diff(plain.source) >= 0).all() and set(plain.source.tolist()) == {0, 1, 2}
    documents = [len(plain.documents(s)) - 1 for s in range(plain.num_shards)]
    assert np.bincount(plain.source, documents).tolist() == list(SIZES)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, 5, 0.3), (0, 1, 3), (7, 0, 0), (1e-3, 1, 1e-2)])
def test_each_source_has_the_share_of_its_weight(folder, weights):
    plain, order = TokenShards(folder, "train"), make(MixedShards(folder, "train", weights))
    epochs = np.array([tokens_of_sources(plain, visits(order, plain, epoch)) for epoch in range(12)])
    wanted = np.array(weights) / sum(weights)
    assert np.allclose(epochs.sum(0) / epochs.sum(), wanted, atol=0.01)
    there = tokens_of_sources(plain, np.ones(plain.num_tokens))[wanted > 0].sum()
    assert abs(epochs.sum(1).mean() / there - 1) < 0.03, "an epoch has as many tokens as the sources together"


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0, 0.05, 0.4, 1, 1.7, 6]), min_size=3, max_size=3).filter(any),
    window=st.sampled_from([1, 900, 1 << 28]),
    seed=st.integers(0, 2**40),
)
def test_no_document_waits_longer_than_the_others(folder, weights, window, seed):
    """After any n epochs each token of a source has been visited floor(n v) or ceil(n v) times, documents whole."""
    plain, mixed = TokenShards(folder, "train"), MixedShards(folder, "train", weights)
    order = make(mixed, window, seed)
    total = np.zeros(plain.num_tokens, np.int64)
    of_token = np.repeat(plain.source, np.diff(plain.first_token))
    edges = np.concatenate([plain.documents(s)[:-1] + plain.first_token[s] for s in range(plain.num_shards)])
    for epoch in range(4):
        total += visits(order, plain, epoch)
        expected = np.array([share.visits for share in mixed.mixture])[of_token] * (epoch + 1)
        assert (total >= np.floor(expected - 1e-6)).all() and (total <= np.ceil(expected + 1e-6)).all()
        whole = np.repeat(total[edges], np.diff(np.append(edges, plain.num_tokens)))
        assert np.array_equal(total, whole)


def test_weights_of_the_sources_own_sizes_change_nothing(folder):
    plain = TokenShards(folder, "train")
    weights = tokens_of_sources(plain, np.ones(plain.num_tokens))
    mixed = MixedShards(folder, "train", weights.tolist())
    for ours, theirs in zip(make(mixed).slots(2), make(plain).slots(2), strict=True):
        assert all(np.array_equal(getattr(ours, n), getattr(theirs, n)) for n in ("shard", "start", "length"))
    assert type(open_train(folder, [])) is TokenShards and describe(plain) == []


def masked(order, shards, step):
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIAL_IDS.values())] = True
    masking = Masking("token", 0.15, 0.8, 0.1, Vocabulary(4, special, shards.continuations))
    return MaskedSlots(order, masking, seed=5).slots(step, 0, order.slots_per_step)


def test_a_text_that_comes_twice_in_an_epoch_is_masked_in_two_ways(tmp_path):
    lengths = [28] * 20
    folder = write_shards(tmp_path, lengths, 10_000, sources=[0] * 10 + [1] * 10)
    mixed = MixedShards(folder, "train", [1, 9])
    order = Order(mixed, 3, 32, 1024, 1)
    (slot,) = masked(order, mixed, 0)
    pieces = order.slots(0)[0]
    masks = {}
    for index, (shard, start) in enumerate(zip(pieces.shard, pieces.start, strict=True)):
        first, last = slot.cu_seqlens[index : index + 2].tolist()
        kept = slot.predict_index[slot.predict_weight > 0]
        chosen = tuple((kept[(kept >= first) & (kept < last)] - first).tolist())
        masks.setdefault((mixed.source[shard], start), []).append(chosen)
    twice = [found for (source, _), found in masks.items() if source == 1]
    assert len(twice) == 10 and all(len(found) in (1, 2) for found in twice)
    assert sum(len(found) for found in twice) == 18
    assert sum(len(found) == 2 and found[0] != found[1] for found in twice) >= 7


def test_the_same_in_other_processes_and_from_any_step(folder):
    mixed = MixedShards(folder, "train", (0.2, 5, 0.3))
    order, copy = make(mixed, 900), pickle.loads(pickle.dumps(make(mixed, 900)))
    steps = range(order.steps_in(0) + 3)
    first = [[x.input_ids.numpy().tobytes() for x in masked(order, mixed, step)] for step in steps]
    again = [[x.input_ids.numpy().tobytes() for x in masked(copy, copy.shards, step)] for step in reversed(steps)]
    assert first == again[::-1]
    assert hashlib.sha256(b"".join(first[0])).hexdigest()[:16] == "be7836c982398ba5"


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_pairs_are_of_visited_documents_alone(folder, kind):
    plain, weights = TokenShards(folder, "train"), (0.1, 3, 1)
    for window in (1, 900, 1 << 28):
        order = PairOrder(kind, MixedShards(folder, "train", weights), 3, 32, 128, 4, window_tokens=window)
        segments = make(order.shards)
        for epoch in range(2):
            visited = visits(segments, plain, epoch) > 0
            seen = visits(order, plain, epoch)
            assert not seen[~visited].any()
            if kind == "sop":  # of what is visited all but a few tokens that were cut off
                assert (seen[visited] > 0).mean() > 0.8


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], "1 weights for the 3 entries of corpus.sources: source 0, source 1, source 2"),
        ([1, 1, 1, 1], "4 weights for the 3 entries"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, weights, said):
    with pytest.raises(ConfigError, match=said):
        MixedShards(folder, "train", weights)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 1e-12, 1], "each document of source 1 0 times.*give it a larger weight, or 0"),
        ([1e-3, 1e4, 0], "each document of source 0 .*larger weight"),
    ],
)
def test_weights_out_of_all_proportion_are_refused(folder, weights, said):
    with pytest.raises(ConfigError, match=said):
        MixedShards(folder, "train", weights)


def test_the_largest_numbers_are_weights_too(folder):
    mixture = MixedShards(folder, "train", [1e308, 1e308, 0]).mixture
    assert [share.epoch for share in mixture] == [0.5, 0.5, 0]


def test_a_source_that_would_come_thousands_of_times_is_refused(tmp_path):
    folder = write_shards(tmp_path, [60] * 90 + [1], 10_000, sources=[0] * 90 + [1])
    with pytest.raises(ConfigError, match=r"each document of source 1 2700\.5 times, .*smaller weight"):
        MixedShards(folder, "train", [1, 1])


def test_a_next_sentence_from_elsewhere_is_from_another_document(tmp_path):
    """The one document of the second source is visited ten times an epoch, beside itself in every window."""
    folder = write_shards(tmp_path, [30] * 60 + [600], 500, sources=[0] * 60 + [1])
    mixed = MixedShards(folder, "train", [1, 3])
    for window in (1, 1 << 28):
        order, random = PairOrder("nsp", mixed, 3, 32, 128, 4, window_tokens=window), 0
        for step in range(order.steps_in(0)):
            for p in order.slots(step):
                for pair in np.flatnonzero(p.labels):
                    documents = set()
                    for n in (2 * pair, 2 * pair + 1):
                        edges = mixed.documents(int(p.shard[n]))
                        inside = np.searchsorted(edges, p.start[n], side="right") - 1
                        documents.add(int(mixed.text_place[p.shard[n]] + edges[inside]))
                    assert len(documents) == 2
                    random += 1
        assert random > 20


def test_an_epoch_of_one_document_has_the_pairs_that_it_has(tmp_path):
    """Source 1 comes 1.5 times an epoch, source 0 in every other: then no sentence is from elsewhere."""
    folder = write_shards(tmp_path, [300, 300], sources=[0, 1])
    order = PairOrder("nsp", MixedShards(folder, "train", [1, 3]), 3, 32, 128, 4)
    assert {order.locate(step)[0] for step in range(30)} >= set(range(5))
    found = {}
    for step in range(30):
        for p in order.slots(step):
            documents, labels = found.setdefault(order.locate(step)[0], (set(), set()))
            documents |= set(order.shards.source[p.shard].tolist())
            labels |= set(p.labels.tolist())
    assert {(len(documents), *sorted(labels)) for documents, labels in found.values()} <= {(1, 0), (2, 0, 1), (2, 1)}
    assert {len(documents) for documents, _ in found.values()} == {1, 2}


def test_a_source_without_text_wants_no_weight(tmp_path):
    folder = write_shards(tmp_path, [30, 40], sources=[0, 2])
    with pytest.raises(ConfigError, match="source 1 has weight 2 and no text; give it weight 0"):
        MixedShards(folder, "train", [1, 2, 1])
    assert [share.visits for share in MixedShards(folder, "train", [3, 0, 4]).mixture] == [1, 0, 1]


def test_shards_that_say_nothing_of_sources_are_refused(tmp_path):
    folder = write_shards(tmp_path, [30, 40])
    index = json.loads((folder / INDEX).read_text())
    del index["sources"]
    (folder / INDEX).write_text(json.dumps(index))
    assert TokenShards(folder, "train").num_tokens == 70
    with pytest.raises(ArtifactError, match="says nothing of sources"):
        MixedShards(folder, "train", [1])


def test_the_figures_of_a_mixture_are_said(folder):
    lines = describe(MixedShards(folder, "train", (1, 1, 2)))
    assert (
        len(lines) == 3
        and lines[2].startswith("source 2: ")
        and "50.0% of an epoch" in lines[2]
        and "times on average" in lines[2]
    )
