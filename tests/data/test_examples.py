"""Examples of a task in packed rows: labels of sequences, of tokens, of several choices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.data.batches import Examples, ExampleSlots, pack_examples

PAD = 9


def sequences(lengths):
    """Ids that say which sequence (tens) and which token (units) they are."""
    return [10 * (row + 1) + np.arange(length) for row, length in enumerate(lengths)]


def test_labelled_tokens_by_hand():
    ids = sequences([3, 2, 4])
    labels = [np.array([1, 2]), np.array([], np.int64), np.array([3])]
    data = Examples(
        ids, [x % 2 for x in ids], labels, positions=[np.array([0, 2]), np.array([], np.int64), np.array([1])]
    )
    batch = pack_examples(data, np.array([2, 1, 0]), PAD)
    assert batch.input_ids[0].tolist() == [30, 31, 32, 33, 20, 21, 10, 11, 12]
    assert batch.token_type_ids[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 9] and batch.max_seqlen == 4
    assert batch.example_ids.tolist() == [2, 1, 0]
    assert batch.predict_index.tolist() == [1, 6, 8, 0], "the last is fill"
    assert batch.predict_labels.tolist() == [3, 1, 2, 0] and batch.predict_weight.tolist() == [1, 1, 1, 0]
    assert batch.sequence_labels is None and batch.group_ids is None


def test_choices_by_hand():
    ids = sequences([1, 2, 3, 1, 1, 2])
    data = Examples(ids, [np.zeros_like(x) for x in ids], np.array([1, 0]), choices=3)
    assert len(data) == 2 and data.lengths.tolist() == [6, 4]
    batch = pack_examples(data, np.array([1, 0]), PAD)
    assert batch.input_ids[0].tolist() == [40, 50, 60, 61, 10, 20, 21, 30, 31, 32]
    assert batch.num_sequences == 6 and batch.cu_seqlens.tolist() == [0, 1, 2, 4, 5, 7, 10]
    assert batch.group_ids.tolist() == [0, 0, 0, 1, 1, 1] and batch.example_ids.tolist() == [1, 1, 1, 0, 0, 0]
    assert batch.sequence_labels.tolist() == [0, 1] and batch.predict_index is None


@pytest.mark.parametrize("form", ["positions", "choices"])
def test_without_labels_all_else_is_the_same(form):
    ids, none = sequences([2, 3, 1, 2]), [np.zeros(0, np.int64)] * 4
    types = [np.zeros_like(x) for x in ids]
    if form == "choices":
        known, secret = (Examples(ids, types, labels, choices=2) for labels in (np.array([0, 1]), None))
    else:
        known, secret = (Examples(ids, types, labels, positions=none) for labels in (none, None))
    chosen = np.arange(len(known))
    for batch in (pack_examples(known, chosen, PAD, labelled=False), pack_examples(secret, chosen, PAD)):
        assert batch.sequence_labels is None and batch.predict_labels is None
        whole = pack_examples(known, chosen, PAD)
        for name in ("input_ids", "cu_seqlens", "predict_index", "predict_weight", "group_ids", "example_ids"):
            mine, theirs = getattr(batch, name), getattr(whole, name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), name


@pytest.mark.parametrize("form", ["positions", "choices"])
def test_an_empty_slot_is_one_padding_token(form):
    ids = sequences([2, 3])
    more = {"positions": [np.array([0]), np.array([1])]} if form == "positions" else {"choices": 2}
    labels = [np.array([1]), np.array([2])] if form == "positions" else np.array([1])
    batch = pack_examples(Examples(ids, ids, labels, **more), np.zeros(0, np.int64), PAD)
    assert batch.input_ids.tolist() == [[PAD]] and batch.num_sequences == 0 and batch.num_tokens == 0
    if form == "positions":
        assert batch.predict_index.tolist() == [0] and batch.predict_weight.tolist() == [0]
    else:
        assert len(batch.group_ids) == len(batch.sequence_labels) == 0


@given(st.data())
def test_every_label_of_an_epoch_stands_at_its_token_once(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    ids = sequences(lengths)
    positions = [np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in lengths]
    labels = [x[p] for x, p in zip(ids, positions, strict=True)]  # the label of a token is its id
    examples = Examples(ids, [np.zeros_like(x) for x in ids], labels, positions)
    slots = data.draw(st.integers(1, 3))
    source = ExampleSlots(examples, data.draw(st.integers(1, 5)), slots, seed=1, pad_id=PAD)
    seen = []
    for step in range(source.steps_per_epoch):
        for batch in source.slots(step, 0, slots):
            real = batch.predict_weight > 0
            at = batch.input_ids[0, batch.predict_index[real]]
            assert torch.equal(at, batch.predict_labels[real]) and not real[-1]
            seen += at.tolist()
    assert sorted(seen) == sorted(np.concatenate(labels).tolist())
