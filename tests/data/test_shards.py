"""Token shards: what is written is what is read, it is what the tokenizer says, and damage is named."""

import json
import pickle
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bertpipe.artifact import committing, write_json
from bertpipe.config import Config, RuntimeConfig, ShardsConfig, TokenizerConfig
from bertpipe.data import encoding, shards, tokenizer
from bertpipe.data.encoding import Encoder
from bertpipe.data.shards import ShardWriter, TokenShards, write_index, write_split
from bertpipe.errors import ArtifactError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "languages"
LANGUAGES = ("en", "hi", "ar", "zh", "th")
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def read_language(language: str) -> str:
    return (FIXTURES / f"{language}.txt").read_text(encoding="utf-8")


# --- the format ---

documents_of = st.lists(st.lists(st.lists(st.integers(0, 49), max_size=6), max_size=5), max_size=20)


def read_split(folder: Path, split: str) -> list[list[list[int]]]:
    """The documents, as sentences of ids, that a reader finds."""
    opened = TokenShards(folder, split)
    documents = []
    for shard in range(opened.num_shards):
        tokens, sentences = opened.tokens(shard), opened.sentences(shard).tolist()
        offsets = opened.documents(shard).tolist()
        assert set(offsets) <= set(sentences)
        for start, stop in pairwise(offsets):
            cuts = [x for x in sentences if start <= x <= stop]
            documents.append([tokens[a:b].tolist() for a, b in pairwise(cuts)])
    return documents


@settings(max_examples=60, deadline=None)
@given(train=documents_of, holdout=documents_of, shard_tokens=st.integers(1, 60))
def test_what_is_written_is_what_is_read(tmp_path_factory, train, holdout, shard_tokens):
    """Packing K6 too: empty sentences and documents leave no trace in any file."""
    folder = tmp_path_factory.mktemp("shards")
    entries = {s: write_split(folder, s, d, 50, shard_tokens) for s, d in (("train", train), ("holdout", holdout))}
    continuations = np.arange(50) % 3 == 0
    write_index(folder, entries, continuations, SPECIAL_IDS, [4, 3, 2, 1, 0])
    for split, documents in (("train", train), ("holdout", holdout)):
        kept = [[s for s in document if s] for document in documents]
        kept = [document for document in kept if document]
        assert read_split(folder, split) == kept
        assert write_split(folder / "kept", split, kept, 50, shard_tokens) == entries[split]
        assert contents(folder / "kept" / split) == contents(folder / split)
        opened = pickle.loads(pickle.dumps(TokenShards(folder, split)))
        flat = [i for document in kept for sentence in document for i in sentence]
        assert opened.num_documents == len(kept) and opened.num_tokens == len(flat)
        assert opened.num_sentences == sum(map(len, kept))
        assert opened.unigrams.tolist() == np.bincount(flat, minlength=50).tolist()
        assert opened.continuations.tolist() == continuations.tolist()
        assert (opened.vocab_size, opened.special_ids, opened.all_special_ids) == (50, SPECIAL_IDS, [0, 1, 2, 3, 4])
        sizes = [len(opened.tokens(shard)) for shard in range(opened.num_shards)]
        assert opened.first_token.tolist() == np.cumsum([0, *sizes]).tolist()
        for shard, size in enumerate(sizes):  # as full as can be, and over-full with a single document only
            assert size <= shard_tokens or len(opened.documents(shard)) == 2
            if shard + 1 < len(sizes):
                assert size + int(opened.documents(shard + 1)[1]) > shard_tokens


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), shard_tokens=st.integers(1, 40), data=st.data())
def test_files_do_not_depend_on_how_documents_are_grouped(tmp_path_factory, lengths, shard_tokens, data):
    """Packing K4: the stream may come in any pieces."""
    documents = [[[(7 * n + i) % 50 for i in range(length)]] for n, length in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("shards")
    expected = write_split(folder, "one", documents, 50, shard_tokens)
    writer, first = ShardWriter(folder, "grouped", 50, shard_tokens), 0
    while first < len(lengths):
        size = data.draw(st.integers(1, len(lengths) - first))
        chosen = np.array(lengths[first : first + size], np.int64)
        tokens = [i for document in documents[first : first + size] for i in document[0]]
        writer.add(np.array(tokens, np.uint32), chosen, chosen)
        first += size
    assert writer.close() == expected
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert names == sorted(path.name for path in (folder / "grouped").iterdir())
    for name in names:
        assert (folder / "one" / name).read_bytes() == (folder / "grouped" / name).read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_a_large_vocabulary_takes_four_bytes(tmp_path, vocab_size, dtype):
    entry = write_split(tmp_path, "train", [[[vocab_size - 1, 0]]], vocab_size, 10)
    write_index(tmp_path, {"train": entry}, np.zeros(vocab_size, bool), SPECIAL_IDS, [])
    tokens = TokenShards(tmp_path, "train").tokens(0)
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype and tokens.tolist() == [vocab_size - 1, 0]


def test_ids_beyond_the_vocabulary_are_never_written(tmp_path):
    with pytest.raises(AssertionError, match="token id 50"):
        write_split(tmp_path, "train", [[[1, 50]]], 50, 10)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


def _shorter(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def _objects(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _other_type, _shorter, _objects])
@pytest.mark.parametrize(
    "name",
    ["train/tokens-00001.npy", "train/documents-00000.npy", "train/sentences-00000.npy", "train/unigrams.npy",
     "continuations.npy"],
)  # fmt: skip
def test_a_damaged_file_is_named_when_it_is_opened(tmp_path, name, damage):
    entry = write_split(tmp_path, "train", [[[5, 6], [7]], [[8, 9]], [[1]]], 50, 4)
    write_index(tmp_path, {"train": entry}, np.zeros(50, bool), SPECIAL_IDS, [])
    TokenShards(tmp_path, "train")
    damage(tmp_path / name)
    with pytest.raises(ArtifactError) as caught:
        TokenShards(tmp_path, "train")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_offsets_and_index_are_checked(tmp_path):
    entry = write_split(tmp_path, "train", [[[5, 6], [7]]], 50, 4)
    write_index(tmp_path, {"train": entry}, np.zeros(50, bool), SPECIAL_IDS, [])
    with pytest.raises(ArtifactError, match="'holdout'"):
        TokenShards(tmp_path, "holdout")
    for offsets, found in (([1, 2, 3], "1 to 3"), ([0, 2, 4], "0 to 4")):
        np.save(tmp_path / "train" / "sentences-00000.npy", np.array(offsets, np.int64))
        with pytest.raises(ArtifactError, match=f"sentences-00000.npy: offsets run from {found}, expected 0 to 3"):
            TokenShards(tmp_path, "train")
    (tmp_path / "shards.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"shards.json: not readable"):
        TokenShards(tmp_path, "train")
    (tmp_path / "shards.json").unlink()
    with pytest.raises(ArtifactError, match="make it with `bertpipe shards`"):
        TokenShards(tmp_path, "train")


# --- encoding ---


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    texts = [read_language(language) for language in LANGUAGES]
    return tokenizer.train_vocabulary(lambda: iter(texts), TokenizerConfig(vocab_size=2000, strip_accents=False))


@pytest.fixture(scope="module")
def berts(vocabulary) -> list[Tokenizer]:
    """BERT tokenizers: cased and uncased, accents kept and stripped."""
    made = []
    for lowercase, strip_accents in ((True, None), (True, False), (False, False), (False, True)):
        bare = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
        bare.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        bare.add_special_tokens(list(tokenizer.SPECIAL_TOKENS))
        bare.encode_special_tokens = True
        made.append(bare)
    return made


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [read_language("en")], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return bare


def check_encoding(bare: Tokenizer, texts: list[str], language: str = "en") -> np.ndarray:
    """Assert that the encoder's ids are the tokenizer's; returns the sentences' lengths."""
    ids, documents, sentences = Encoder(bare, language).encode(texts)
    expected = [bare.encode(text, add_special_tokens=False).ids for text in texts]
    assert documents.tolist() == [len(e) for e in expected]
    assert ids.tolist() == [i for e in expected for i in e]
    assert (sentences > 0).all() and sentences.sum() == len(ids)
    assert set(np.cumsum(documents[documents > 0]).tolist()) <= set(np.cumsum(sentences).tolist())
    return sentences


# Everything that has ever made a difference: sentence ends, white space of all kinds, controls, accents, CJK, emoji.
pieces_of = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [*"\x00\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2028\u2029\u200b\u200d\ufeff\ufffd\u3000\r\n\t "]
    ),
    st.sampled_from(
        [". ", "? ", "!", "。", "।", "؟", "...", "\n\n", ".\u0301", "≠", "\u037e", "İ", "ß", "ǅ", "가", "が"]
    ),
    st.sampled_from(
        ["The tower", "e\u0301", "[SEP]", "[MASK].", "Dr. Smith", "नदी है", "河水", "แม่น้ำ", "البئر", "👩‍🔬", "##s"]
    ),
)
texts_of = st.lists(st.lists(pieces_of, max_size=8).map("".join), max_size=4)


@settings(max_examples=150, deadline=None)
@given(texts=texts_of, language=st.sampled_from(LANGUAGES))
@example(texts=["a\x1cb. c\x85d? e"], language="en")
@example(texts=["", " ", "\u200b", "x"], language="en")
@example(texts=["ab\u2e53Cd. \U0001144bneva\U0001144bTower"], language="en")  # end a sentence, but no word: newer marks
def test_ids_are_those_of_the_whole_document(berts, texts, language):
    for bare in berts:
        check_encoding(bare, texts, language)


@settings(max_examples=100, deadline=None)
@given(texts=texts_of)
@example(texts=["", "One. Two", "  "])
def test_other_tokenizers_are_encoded_by_offsets(byte_level, berts, texts):
    assert not Encoder(byte_level, "en").by_words and Encoder(berts[0], "en").by_words
    check_encoding(byte_level, texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_both_ways_agree_on_real_prose(berts, language):
    text = read_language(language)
    by_words = check_encoding(berts[1], [text], language)
    by_offsets = Encoder(berts[1], language)
    by_offsets.by_words = False
    assert by_offsets.encode([text])[2].tolist() == by_words.tolist()
    if language in ("en", "zh", "ar", "hi"):  # one sentence a line, but for abbreviations and quotations
        assert 36 <= len(by_words) <= 46


def test_sentences_start_where_a_reader_would_start_them(berts):
    ids, _, sentences = Encoder(berts[0], "en").encode(["Dr. Smith came at 3.14 today. Was he late? No!\n\nThe end"])
    words = [berts[0].decode(part.tolist()) for part in np.split(ids, np.cumsum(sentences)[:-1])]
    assert words == [berts[0].decode(berts[0].encode(s).ids) for s in
                     ("Dr. Smith came at 3.14 today.", "Was he late?", "No!", "The end")]  # fmt: skip


@pytest.mark.parametrize(("separator", "times"), [(" ", 450), (",", 450), ("\n", 20), ("河", 20)])
def test_giant_documents_equal_the_whole(berts, byte_level, separator, times):
    """Up to 1.2 million characters: of words, and without any white space to cut at."""
    text = read_language("en").replace(" ", separator).replace("\n", separator) * times
    assert len(text) > 2_500 * times
    check_encoding(berts[0], [text])
    if separator == " ":
        check_encoding(byte_level, [text])


def test_a_giant_word_is_unknown_and_whole(berts):
    ids, documents, _ = Encoder(berts[0], "en").encode(["tower " + "x" * 1_000_000 + " tower"])
    assert documents.tolist() == [len(ids)] and ids.tolist().count(1) == 1


def test_forgetting_words_changes_nothing(berts, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_WORDS", 20)
    monkeypatch.setattr(encoding, "BLOCK_WORDS", 50)
    encoder = Encoder(berts[0], "en")
    for language in ("en", "ar", "en"):
        text = read_language(language)
        assert encoder.encode([text])[0].tolist() == berts[0].encode(text, add_special_tokens=False).ids
        assert len(encoder._numbers) < 120


# --- the stage ---


def write_corpus(folder: Path, train: list[str], holdout: list[str], fingerprint: str = "c" * 64) -> Path:
    """A corpus artifact of two sources, a part each, with row groups of three documents, as many units of work."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with committing(folder, fingerprint=fingerprint, parents={}) as (scratch, _):
        for split, texts in (("train", train), ("holdout", holdout)):
            (scratch / split).mkdir()
            half = len(texts) // 2
            for part, chosen in enumerate((texts[:half], texts[half:])):
                ids = [f"{split}-{part}-{n}" for n in range(len(chosen))]
                table = pa.table({"id": ids, "source": ids, "text": chosen})
                path = scratch / split / f"part-{part:05d}.parquet"
                pq.write_table(table, path, compression="zstd", row_group_size=3, write_page_checksum=True)
        row = {"parts": {"train": 1, "holdout": 1}}
        write_json(scratch / "ledger.json", {"sources": {"one": row, "two": row}})
    return folder


TRAIN = [line for language in LANGUAGES for line in read_language(language).splitlines()] + ["\u200b\u200b", "[SEP] a"]
HOLDOUT = ["A bell rang. The tower fell!", "Children sang [MASK] songs. 河水。好"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(root / "corpus", TRAIN, HOLDOUT)
    config = Config(tokenizer=TokenizerConfig(vocab_size=1500, strip_accents=False))
    with committing(root / "tokenizer", fingerprint="t" * 64, parents={"corpus": "c" * 64}) as (scratch, counts):
        tokenizer.run(config, {"corpus": corpus}, scratch, counts)
    return {"corpus": corpus, "tokenizer": root / "tokenizer"}


def make(inputs: dict[str, Path], out: Path, workers: int = 1) -> dict:
    counts: dict = {}
    config = Config(shards=ShardsConfig(shard_tokens=700), runtime=RuntimeConfig(workers=workers, progress=False))
    shards.run(config, inputs, out, counts)
    return counts


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("made")
    return out, make(inputs, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_hold_the_corpus_in_order(inputs, made):
    out, counts = made
    bare = tokenizer.load(inputs["tokenizer"])
    for split, texts in (("train", TRAIN), ("holdout", HOLDOUT)):
        expected = [bare.encode(text, add_special_tokens=False).ids for text in texts]
        found = [[i for sentence in document for i in sentence] for document in read_split(out, split)]
        assert found == [ids for ids in expected if ids]
        assert counts[split]["documents_in"] == len(texts) == counts[split]["documents"] + counts[split]["empty"]
        assert counts[split]["characters"] == sum(map(len, texts))
    assert counts["train"]["empty"] == 1 and TokenShards(out, "train").num_shards > 3
    assert len(read_split(out, "holdout")[0]) == 2
    present = np.concatenate([np.flatnonzero(TokenShards(out, split).unigrams) for split in ("train", "holdout")])
    assert not {0, 2, 3, 4} & set(present.tolist()), "a special token stands in the text"
    pieces = (inputs["tokenizer"] / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert TokenShards(out, "train").continuations.tolist() == [piece.startswith("##") for piece in pieces]
    index = json.loads((out / "shards.json").read_text(encoding="utf-8"))
    assert index["corpus_fingerprint"] == "c" * 64 and index["tokenizer_fingerprint"] == "t" * 64
    assert index["special_ids"] == SPECIAL_IDS and index["dtype"] == "uint16"
    assert sorted(path.name for path in out.iterdir()) == ["continuations.npy", "holdout", "shards.json", "train"]


def test_two_workers_write_the_same_bytes(inputs, made, tmp_path):
    make(inputs, tmp_path, workers=2)
    assert contents(tmp_path) == contents(made[0])


RUN = """
import sys, json
from pathlib import Path
from bertpipe.config import Config, RuntimeConfig, ShardsConfig
from bertpipe.data import shards
config = Config(shards=ShardsConfig(shard_tokens=700), runtime=RuntimeConfig(workers=1, progress=False))
shards.run(config, {"corpus": Path(sys.argv[1]), "tokenizer": Path(sys.argv[2])}, Path(sys.argv[3]), {})
"""


def test_a_killed_run_goes_on(inputs, made, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(inputs["corpus"]), str(inputs["tokenizer"]), str(out)]
    process = subprocess.Popen(command)
    while process.poll() is None and not list(out.glob("units/train-*")):
        pass  # until its first unit stands
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "shards.json").exists()
    make(inputs, out)
    assert contents(out) == contents(made[0])


def test_a_rerun_takes_finished_units_as_they_are(inputs, made, tmp_path):
    units = shards.list_units(inputs["corpus"], "train", tmp_path / "units")
    assert len(units) > 60
    shards.encode_unit(inputs["tokenizer"], "en", units[1])
    units[1].result.replace(units[0].result)  # were unit 0 made again, this would not show
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "tokens-00099.npy").write_bytes(b"left by an interrupted run")
    make(inputs, tmp_path)
    found, expected = read_split(tmp_path, "train"), read_split(made[0], "train")
    assert found[:3] == expected[3:6] and found[3:] == expected[3:]
    assert not (tmp_path / "train" / "tokens-00099.npy").exists()


def test_a_tokenizer_of_another_corpus_is_refused(inputs, tmp_path):
    other = write_corpus(tmp_path / "other", TRAIN[:4], HOLDOUT, fingerprint="d" * 64)
    with pytest.raises(ArtifactError) as caught:
        make({**inputs, "corpus": other}, tmp_path / "out")
    assert "c" * 64 in str(caught.value) and "d" * 64 in str(caught.value)


def test_inputs_without_manifest_are_refused(inputs, tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        make({**inputs, "tokenizer": tmp_path}, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_corpus_is_named(inputs, tmp_path, workers):
    corpus = write_corpus(tmp_path / "corpus", TRAIN, HOLDOUT)
    path = corpus / "train" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet: not readable"):
        make({**inputs, "corpus": corpus}, tmp_path / "out", workers)


def test_a_corpus_without_holdout_makes_an_empty_split(inputs, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", TRAIN[:5], [])
    make({**inputs, "corpus": corpus}, tmp_path / "out")
    opened = TokenShards(tmp_path / "out", "holdout")
    assert (opened.num_shards, opened.num_tokens, opened.num_documents) == (0, 0, 0)
    assert opened.first_token.tolist() == [0] and opened.unigrams.sum() == 0


def test_ids_of_the_published_vocabulary(real_data, inputs, tmp_path):
    config = Config(tokenizer=TokenizerConfig(adopt=str(real_data / "vocab" / "bert-base-uncased-vocab.txt")))
    with committing(tmp_path / "tokenizer", fingerprint="p" * 64, parents={}) as (scratch, counts):
        tokenizer.run(config, {"corpus": inputs["corpus"]}, scratch, counts)
    corpus = write_corpus(tmp_path / "corpus", ["Hello world. Hello!"], [])
    make({"corpus": corpus, "tokenizer": tmp_path / "tokenizer"}, tmp_path / "out")
    opened = TokenShards(tmp_path / "out", "train")
    assert opened.tokens(0).tolist() == [7592, 2088, 1012, 7592, 999]
    assert opened.sentences(0).tolist() == [0, 3, 5]
    assert opened.special_ids == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
