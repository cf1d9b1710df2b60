"""Pairs of segments are built as BERT's and ALBERT's are, each epoch anew, and fill their slots."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bertpipe.data import keyed
from bertpipe.data.batches import MaskedSlots
from bertpipe.data.masking import Masking, Vocabulary
from bertpipe.data.pairs import MIN_PAIR, SHORT, PairOrder, Text, draw_pairs, truncate
from bertpipe.data.shards import TokenShards, write_index, write_split
from bertpipe.errors import DataError
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE

KEY = keyed.key(5, "pairs", 0)


def text_of(documents):
    """Documents, lists of sentence lengths, as a Text."""
    lengths = [n for document in documents for n in document]
    bounds = np.cumsum([0, *lengths])
    ends = np.cumsum([0, *map(len, documents)])
    zero = np.zeros(1, np.int64)
    return Text(bounds, ends, zero, zero, zero, zero, bounds[ends[:-1]])


def write(folder, documents, shard_tokens=1000):
    """Shards with documents of sentences of so many tokens."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    ids = [[rng.integers(5, VOCAB_SIZE, n).tolist() for n in document] for document in documents]
    entry = write_split(folder, "train", ids, VOCAB_SIZE, shard_tokens)
    continues = np.zeros(VOCAB_SIZE, bool)
    continues[100::3] = True
    write_index(folder, {"train": entry}, continues, SPECIAL_IDS, list(SPECIAL_IDS.values()))
    return TokenShards(folder, "train")


def some_documents(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 25, rng.integers(1, 12)).tolist() for _ in range(count)]


def make(shards, kind="nsp", **changes):
    fields = {"seed": 3, "sequence_length": 48, "slot_tokens": 200, "slots_per_step": 4} | changes
    return PairOrder(kind, shards, **fields)


def source(shards, kind="nsp", **changes):
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIAL_IDS.values())] = True
    masking = Masking("whole_word", 0.15, 0.8, 0.1, Vocabulary(4, special, shards.continuations))
    return MaskedSlots(make(shards, kind, **changes), masking, seed=5)


def build_one_by_one(documents, longest):
    """Pairs of BERT's construction (Devlin et al. 2019, A.2), sentence by sentence and token by token.

    Returns {first token of A: (documents of A and B, tokens of A and B, label)}.
    """
    bounds = np.cumsum([0, *(n for document in documents for n in document)])
    firsts = np.cumsum([0, *map(len, documents)])
    pairs = {}
    for number, document in enumerate(documents):
        at = 0
        while at < len(document):
            place = np.array([bounds[firsts[number] + at]])

            def draw(name, place=place):
                return keyed.uniform(keyed.key(KEY, name), place)[0]

            target = 2 + int(draw("length") * (longest - 1)) if draw("short") < SHORT else longest
            chunk = []
            while at + len(chunk) < len(document) and sum(chunk) < target:
                chunk.append(document[at + len(chunk)])
            cut = 1 if len(chunk) == 1 else 1 + int(draw("cut") * (len(chunk) - 1))
            a, b, other = sum(chunk[:cut]), sum(chunk[cut:]), number
            if random := len(chunk) == 1 or draw("next") < 0.5:
                other = [d for d in range(len(documents)) if d != number][int(draw("document") * (len(documents) - 1))]
                start = int(draw("sentence") * len(documents[other]))
                b = 0
                for length in documents[other][start:]:
                    b += length
                    if a + b >= target:
                        break
                at += cut
            else:
                at += len(chunk)
            while a + b > longest:
                a, b = (a - 1, b) if a > b else (a, b - 1)
            pairs[int(place[0])] = (number, other, a, b, int(random))
    return pairs


documents_lists = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=2, max_size=12)


@settings(deadline=None, max_examples=60)
@given(documents_lists, st.integers(30, 80))
def test_pairs_are_those_built_one_by_one(documents, longest):
    text = text_of(documents)
    pairs = draw_pairs(text, "nsp", longest, KEY)
    expected, found = build_one_by_one(documents, longest), {}
    begins = text.sentences[text.documents]
    for (a, b), (size_a, size_b), label in zip(pairs.start, pairs.length, pairs.label, strict=True):
        owners = [int(np.searchsorted(begins, x, "right")) - 1 for x in (a, b)]
        first = max(place for place in expected if place <= a)  # where A began before it was cut
        found[first] = (*owners, int(size_a), int(size_b), int(label))
        assert a + size_a <= begins[owners[0] + 1] and b + size_b <= begins[owners[1] + 1], "inside their documents"
    assert found == expected


@settings(deadline=None, max_examples=60)
@given(documents_lists, st.sampled_from(["nsp", "sop"]))
def test_labels_are_right_and_no_sentence_is_left_out(documents, kind):
    """With room for whole documents nothing is truncated, so pairs can be read off."""
    text = text_of(documents)
    pairs = draw_pairs(text, kind, 10_000, KEY)
    begins = text.sentences[text.documents]
    document = np.searchsorted(begins, pairs.start, "right") - 1
    ends = pairs.start + pairs.length
    random = pairs.label == 1
    if kind == "nsp":
        assert (document[random, 0] != document[random, 1]).all()
        assert (pairs.start[~random, 1] == ends[~random, 0]).all() and (
            document[~random, 0] == document[~random, 1]
        ).all()
        assert np.isin(pairs.start, text.sentences).all() and np.isin(ends, text.sentences).all()
        seen = [(s, e) for s, e in zip(pairs.start[:, 0], ends[:, 0], strict=True)]
        seen += [(s, e) for s, e in zip(pairs.start[~random, 1], ends[~random, 1], strict=True)]
    else:
        assert (document[:, 0] == document[:, 1]).all()
        assert (pairs.start[~random, 1] == ends[~random, 0]).all() and (pairs.start[random, 0] == ends[random, 1]).all()
        seen = [(s, e) for n in range(2) for s, e in zip(pairs.start[:, n], ends[:, n], strict=True)]
    tokens = np.concatenate([np.arange(s, e) for s, e in seen] or [np.zeros(0, np.int64)])
    left_out = sum(sizes == 1 for sizes in map(sum, documents)) if kind == "sop" else 0  # one token is no pair
    assert len(np.unique(tokens)) == len(tokens)
    assert left_out <= text.sentences[-1] - len(tokens) <= (left_out if kind == "nsp" else sum(map(len, documents)))


def test_the_shares_are_those_of_the_papers():
    text = text_of([[5] * 400] * 300)
    longest = 60
    pairs = draw_pairs(text, "nsp", longest, KEY)
    assert abs(pairs.label.mean() - 0.5) < 0.02
    full = pairs.length.sum(1) == longest
    assert abs((~full).mean() - SHORT) < 0.02  # documents' ends, too, give short ones
    sizes = np.bincount(pairs.length[full, 0] // 5)[1:12]
    assert stats.chisquare(sizes).pvalue > 1e-9 and len(sizes) == 11  # A is 1 to 11 of 12 sentences
    other = pairs.start[pairs.label == 1, 1] // 2000
    assert stats.chisquare(np.bincount(other, minlength=300)).pvalue > 1e-9
    swapped = draw_pairs(text, "sop", longest, KEY)
    assert abs(swapped.label.mean() - 0.5) < 0.02


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=20), st.integers(5, 200))
def test_truncation_is_that_of_bert_token_by_token(sizes, longest):
    length = np.array(sizes)
    start, short = truncate(np.full(length.shape, 1000), length, longest, KEY, np.arange(len(length)))
    for (a, b), found in zip(sizes, short, strict=True):
        while a + b > longest:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert found.tolist() == [a, b]
    assert (start >= 1000).all() and (start + short <= 1000 + length).all()


def test_front_and_end_are_cut_alike():
    count = 20_000
    start, _ = truncate(np.zeros((count, 2), np.int64), np.full((count, 2), 100), 60, KEY, np.arange(count))
    for column in start.T:  # 70 coins each
        assert abs(column.mean() - 35) < 0.25 and abs(column.var() - 17.5) < 1


def test_an_order_of_pairs_keeps_orders_promises(tmp_path):
    """Every step alone, after any other, from a plan or not, in another process: the same pairs; epochs differ."""
    shards = write(tmp_path / "s", some_documents())
    reference = make(shards)
    steps = reference.steps_in(0) + 4
    expected = [reference.slots(step) for step in range(steps)]
    travelled = pickle.loads(pickle.dumps(make(shards, plans=tmp_path / "plans")))
    for step in reversed(range(steps)):
        for a, b in zip(travelled.slots(step), expected[step], strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    first = {(int(a), int(b)) for step in range(reference.steps_in(0)) for p in expected[step] for a, b in pairs_of(p)}
    second = {(int(a), int(b)) for p in expected[-3] for a, b in pairs_of(p)}
    assert len(second - first) > len(second) / 2


def pairs_of(pieces):
    return (pieces.start + 10**6 * pieces.shard).reshape(-1, 2)


@settings(deadline=None, max_examples=15)
@given(
    documents_lists,
    st.sampled_from(["nsp", "sop"]),
    st.integers(20, 300),
    st.integers(0, 90),
    st.sampled_from([1, 300]),
)
def test_slots_hold_whole_pairs(tmp_path_factory, documents, kind, shard_tokens, extra, window):
    shards = write(tmp_path_factory.mktemp("s") / "s", documents, shard_tokens)
    order = make(shards, kind, slot_tokens=48 + extra, slots_per_step=2, window_tokens=window)
    steps = order.steps_in(0)
    for step in range(steps):
        slots = order.slots(step)
        assert step + 1 == steps or any(len(pieces.length) for pieces in slots)
        for pieces in slots:
            assert len(pieces.length) == 2 * len(pieces.labels) and pieces.num_tokens <= order.slot_tokens
            assert (pieces.length >= 1).all() and (pieces.length.reshape(-1, 2).sum(1) <= 45).all()
            ends = [shards.documents(int(s)) for s in pieces.shard]
            last = pieces.start + pieces.length - 1
            owner = [np.searchsorted(e, x, "right") for e, x in zip(ends, pieces.start, strict=True)]
            assert owner == [np.searchsorted(e, x, "right") for e, x in zip(ends, last, strict=True)]
            together = np.array([(s, o) for s, o in zip(pieces.shard, owner, strict=True)]).reshape(-1, 2, 2)
            same = (together[:, 0] == together[:, 1]).all(1)
            assert (same == (pieces.labels == 0)).all() if kind == "nsp" else same.all()


def test_slots_are_full_but_for_the_last_step(tmp_path):
    order = make(write(tmp_path / "s", some_documents()))
    for step in range(order.steps_in(0) - 1):
        assert all(pieces.num_tokens > order.slot_tokens - MIN_PAIR for pieces in order.slots(step))


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_a_batch_of_pairs_is_what_it_says(kind, tmp_path):
    shards = write(tmp_path / "s", some_documents())
    made = source(shards, kind)
    for slot, pieces in zip(made.slots(1, 0, 4), made.order.slots(1), strict=True):
        ids, kept = slot.input_ids[0].clone(), slot.predict_weight > 0
        ids[slot.predict_index[kept]] = slot.predict_labels[kept]
        assert slot.num_sequences == len(pieces.labels) and slot.sequence_labels.tolist() == pieces.labels.tolist()
        bounds = slot.cu_seqlens.tolist()
        for n in range(slot.num_sequences):
            row, types = ids[bounds[n] : bounds[n + 1]].tolist(), slot.token_type_ids[0, bounds[n] : bounds[n + 1]]
            a, b = (
                shards.tokens(int(pieces.shard[i]))[pieces.start[i] : pieces.start[i] + pieces.length[i]].tolist()
                for i in (2 * n, 2 * n + 1)
            )
            assert row == [2, *a, 3, *b, 3]
            assert types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert not torch.isin(slot.predict_labels[kept], torch.arange(5)).any()


def test_a_share_of_the_slots_is_the_same_alone(tmp_path):
    made = source(write(tmp_path / "s", some_documents()))
    whole = made.slots(2, 0, 4)
    parts = [slot for first in range(4) for slot in made.slots(2, first, first + 1)]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.sequence_labels, b.sequence_labels)


def test_a_long_sentence_is_cut_so_that_all_of_it_is_seen(tmp_path):
    shards = write(tmp_path / "s", [[1000], [7, 8]])
    text = Text.read(shards, np.arange(shards.num_shards), 45)
    parts = np.diff(text.sentences)[:-2]
    assert parts.sum() == 1000 and parts.max() <= 22 and parts.min() >= 20
    assert text.documents.tolist() == [0, len(parts), len(parts) + 2]


def test_a_window_has_two_documents(tmp_path):
    """Shards of one document each, and windows of one shard: they are joined."""
    order = make(write(tmp_path / "s", [[9, 9]] * 7, shard_tokens=18), window_tokens=1)
    assert order.shards.num_shards == 7
    assert [len(group) for group in order._group_shards(0)] == [2, 2, 3]


def test_no_step_begins_where_no_pair_is_left(tmp_path):
    """The slots end with a window's last pair, and no window behind it has one: its documents are of one token each."""
    shards = write(tmp_path, [[16, 16]] * 8 + [[1]] * 40, 40)
    behind = 0
    for seed in range(40):
        order = make(shards, "sop", seed=seed, sequence_length=18, slot_tokens=18, slots_per_step=1, window_tokens=1)
        window, segment, _ = order._plan(0)[-1]  # where the pass that found the steps' starts ended
        assert (window, segment) == (len(order._windows(0)), 0)
        slots = [order.slots(step)[0] for step in range(order.steps_in(0))]
        assert all(len(pieces.length) for pieces in slots)
        cursor = tuple(order._plan(0)[-2])
        behind += order._fill(0, cursor)[1][0] < window
    assert behind, "the case came up"


def test_documents_of_one_token_have_no_order_of_sentences(tmp_path):
    """No epoch has a step: said, rather than looked for without end."""
    shards = write(tmp_path, [[1]] * 40)
    with pytest.raises(DataError, match="100 epochs in a row have nothing to train on"):
        make(shards, "sop").prepare(1)
    assert make(shards, "nsp").steps_in(0) == 1


def test_one_document_makes_no_pairs(tmp_path):
    with pytest.raises(DataError, match="one document; pairs need two"):
        make(write(tmp_path / "s", [[5, 5, 5]]))
