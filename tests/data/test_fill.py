"""Slots are at least 99 % full, on short documents and on Wikipedia, for segments and for pairs."""

import functools

import numpy as np
import pytest

from bertpipe.data.order import Order
from bertpipe.data.pairs import PairOrder
from bertpipe.data.shards import ShardWriter, TokenShards, write_index
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE

ORDERS = {"segments": Order, "nsp": functools.partial(PairOrder, "nsp"), "sop": functools.partial(PairOrder, "sop")}
SLOT_TOKENS = 4096


def write(folder, documents, sentences):
    """Shards of documents and sentences of so many tokens."""
    writer = ShardWriter(folder, "train", VOCAB_SIZE, 200_000)
    writer.add(np.full(int(documents.sum()), 9), documents, sentences)
    write_index(folder, {"train": writer.close()}, np.zeros(VOCAB_SIZE, bool), SPECIAL_IDS, list(SPECIAL_IDS.values()))
    return TokenShards(folder, "train")


def check_fill(shards, kind, length):
    order = ORDERS[kind](shards, 0, length, SLOT_TOKENS, 4)
    steps = order.steps_in(0) - 1  # the last one may be short
    assert steps >= 3
    fill = np.mean([pieces.num_tokens / SLOT_TOKENS for step in range(steps) for pieces in order.slots(step)])
    assert fill >= 0.99


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("length", [128, 512])
def test_short_documents_fill_their_slots(kind, length, tmp_path):
    """Half of them shorter than 45 tokens, as docstrings are."""
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(3.8, 1.1, 3000)).astype(np.int64)
    check_fill(write(tmp_path, lengths, np.stack([lengths // 2, lengths - lengths // 2], 1).ravel()), kind, length)


@pytest.fixture(scope="module")
def wikipedia(real_data, tmp_path_factory):
    """Shards of the lengths of Wikipedia's validation articles and their sentences."""
    pq = pytest.importorskip("pyarrow.parquet")
    from tokenizers import BertWordPieceTokenizer

    from bertpipe.data.encoding import Encoder
    from bertpipe.data.tokenizer import load

    folder = tmp_path_factory.mktemp("wikipedia")
    BertWordPieceTokenizer(str(real_data / "vocab" / "bert-base-uncased-vocab.txt")).save(
        str(folder / "tokenizer.json")
    )
    texts = pq.read_table(real_data / "corpus" / "enwiki-validation.parquet", columns=["text"])["text"].to_pylist()
    _, documents, sentences = Encoder(load(folder), "en").encode(texts[:400])
    return write(folder, documents[documents > 0], sentences)


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("length", [128, 512])
def test_wikipedia_fills_its_slots(kind, length, wikipedia):
    check_fill(wikipedia, kind, length)
