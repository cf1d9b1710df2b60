"""Encoded examples equal the stock tokenizer's own output for each example alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from bertpipe.downstream.tasks import encode, tasks

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer():
    letters = list("abcdefg")
    pieces = SPECIAL + letters + [f"##{letter}" for letter in letters] + ["the", "cab", "bed"]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)


def assert_equals_stock(texts, tokenizer, max_length):
    encoded = encode.encode_texts(texts, tokenizer, max_length)
    assert len(encoded.input_ids) == len(encoded.token_type_ids) == len(texts)
    num_truncated = 0
    for sides, ids, types in zip(texts, encoded.input_ids, encoded.token_type_ids, strict=True):
        batch = [[side] for side in sides]  # a bare second text of "" would count as none
        stock = tokenizer(*batch, truncation="longest_first", max_length=max_length)
        assert ids.dtype == types.dtype == np.int64
        assert [ids.tolist()] == stock["input_ids"]
        assert [types.tolist()] == stock["token_type_ids"]
        num_truncated += len(tokenizer(*batch)["input_ids"][0]) > max_length
    assert encoded.num_truncated == num_truncated


def test_a_pair_by_hand(tokenizer):
    encoded = encode.encode_texts([("the cab", "bed")], tokenizer, 8)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[0]) == ["[CLS]", "the", "cab", "[SEP]", "bed", "[SEP]"]
    assert encoded.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert encoded.num_truncated == 0


def test_the_longer_side_is_cut_first(tokenizer):
    encoded = encode.encode_texts([("a b c d e f", "bed")], tokenizer, 8)
    assert tokenizer.decode(encoded.input_ids[0]) == "[CLS] a b c d [SEP] bed [SEP]"
    assert encoded.num_truncated == 1


@given(
    st.lists(st.tuples(st.text("abg x", max_size=30), st.text("abg x", max_size=30)), max_size=8), st.integers(8, 24)
)
def test_any_pairs(tokenizer, texts, max_length):
    assert_equals_stock(texts, tokenizer, max_length)


@given(st.lists(st.tuples(st.text(max_size=30)), max_size=8), st.integers(8, 24))
def test_any_single_texts(tokenizer, texts, max_length):
    assert_equals_stock(texts, tokenizer, max_length)


def test_chunks_change_nothing(tokenizer, monkeypatch):
    texts = [("a" * (row % 40), "the bed") for row in range(53)]
    whole = encode.encode_texts(texts, tokenizer, 16)
    monkeypatch.setattr(encode, "CHUNK", 7)
    pieces = encode.encode_texts(texts, tokenizer, 16)
    assert [ids.tolist() for ids in pieces.input_ids] == [ids.tolist() for ids in whole.input_ids]
    assert pieces.truncated == whole.truncated and pieces.num_truncated > 0


def test_too_long_texts_are_not_warned_about(tokenizer, caplog):
    """The stock tokenizer's "sequence length is longer than" is about a call that is cut afterwards."""
    encode.encode_texts([("a " * 100,)], tokenizer, 16)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte"])
@pytest.mark.parametrize("max_length", [16, 128])
def test_real_data(name, max_length, real_data):
    tokenizer = BertTokenizer(str(real_data / "vocab" / "bert-base-uncased-vocab.txt"))
    texts = tasks.load(name, str(real_data / "glue"))["validation"].texts
    assert_equals_stock(texts, tokenizer, max_length)
