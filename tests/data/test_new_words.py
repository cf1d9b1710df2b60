"""A corpus's words in an adopted vocabulary: new words are one token, every other text keeps its ids."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.artifact import committing
from bertpipe.config import Config, TokenizerConfig
from bertpipe.data import new_words, tokenizer_report
from bertpipe.data import tokenizer as stage
from bertpipe.data.corpus import PartWriter, content_hash
from bertpipe.data.encoding import Encoder
from bertpipe.errors import ConfigError

LETTERS = ["a", "b", "c"]
PIECES = [*LETTERS, *(f"##{c}" for c in LETTERS), "ab", "##bc", "cab"]
OLD = [*stage.SPECIAL_TOKENS, *PIECES]
TEXT = "abcabc abcabc abcabc cabcab, cab ab bca! bca bca\nq q é Abcabc once"


def write_vocabulary(folder: Path, pieces: list[str] = OLD) -> Path:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


def grown(texts: list[str], num: int, pieces: list[str] = OLD, min_frequency: int = 1):
    """(adopted tokenizer, the same with words added, the words)"""
    config = TokenizerConfig(adopt="x", add_tokens=num, min_frequency=min_frequency)
    old, new = (stage._bert_tokenizer(pieces, config) for _ in range(2))
    words = new_words.add_words(new, texts, config)
    return old.backend_tokenizer, new.backend_tokenizer, words


def greedy(word: str, vocabulary: set[str]) -> list[str]:
    """WordPiece's longest match first (Devlin et al. 2019; the published tokenization.py), [UNK] if it gets stuck."""
    pieces, start = [], 0
    while start < len(word):
        ends = [e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in vocabulary]
        if not ends:
            return ["[UNK]"]
        pieces.append(("##" if start else "") + word[start : ends[0]])
        start = ends[0]
    return pieces


def test_the_words_that_save_most_are_added_in_that_order():
    _, new, words = grown([TEXT], 3)
    # abcabc, 4 times (once capitalised), is ab ##c ##a ##bc: saves 4 x 3. bca, 3 times, is b ##c ##a: 3 x 2.
    # cabcab is cab ##c ##a ##b: saves 3. Unknown words count their characters: once 4, q twice 1, ! and , and e 1.
    assert words == ["abcabc", "bca", "once"]
    assert new.token_to_id("abcabc") == len(OLD) and new.token_to_id("bca") == len(OLD) + 1
    assert grown([TEXT], 9)[2] == ["abcabc", "bca", "once", "cabcab", "q", "!", ",", "e"]
    assert grown([TEXT], 9, min_frequency=2)[2] == ["abcabc", "bca", "q"]


words_of_letters = st.text(alphabet="abc", min_size=1, max_size=7)
texts = st.lists(st.one_of(words_of_letters, st.sampled_from(["q", "qa", "aq", ",", "É", "ABC"])), max_size=9).map(
    " ".join
)


@settings(max_examples=150, deadline=None)
@given(corpus=texts, num=st.integers(1, 5), text=st.one_of(texts, st.text(max_size=30)))
def test_only_words_that_begin_with_a_new_one_change(corpus, num, text):
    old, new, words = grown([corpus], num)
    before, after = old.get_vocab(), new.get_vocab()
    assert len(words) <= num and sorted(after.values()) == list(range(len(after)))
    assert {piece: after[piece] for piece in before} == before
    assert list(after.keys() - before.keys() - set(words)) == []
    for word in words:
        assert new.encode(word, add_special_tokens=False).ids == [after[word]]
    for stretch in text.split():
        for word, _ in new.pre_tokenizer.pre_tokenize_str(new.normalizer.normalize_str(stretch)):
            was, now = (t.encode(word, add_special_tokens=False).tokens for t in (old, new))
            assert now == greedy(word, set(after))
            assert now == was or word.startswith(tuple(words))
            assert now != ["[UNK]"] or was == ["[UNK]"]
    if not any(word in new.normalizer.normalize_str(text) for word in words):
        assert new.encode(text).ids == old.encode(text).ids


def test_no_word_becomes_unknown_by_a_missing_continuation():
    """Without "##d", a ##bcd would turn into ab and nothing: the characters of longer pieces come along."""
    pieces = [*stage.SPECIAL_TOKENS, "a", "##b", "##bcd", "##c"]
    old, new, words = grown(["ab ab"], 1, pieces)
    assert words == ["ab"]
    assert old.encode("abcd", add_special_tokens=False).tokens == ["a", "##bcd"]
    assert new.encode("abcd", add_special_tokens=False).tokens == ["ab", "##c", "##d"]
    assert new_words.split_added(old, new) == [[1], [5, 6]]  # "d" was unknown; ab was a ##b


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_words_are_counted_as_the_tokenizer_sees_them(documents):
    tokenizer = stage._bert_tokenizer(OLD, TokenizerConfig()).backend_tokenizer
    expected = Counter(
        word
        for text in documents
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    assert new_words.count_words(tokenizer, documents) == expected


@settings(max_examples=60, deadline=None)
@given(corpus=texts, num=st.integers(1, 5))
def test_each_new_entry_knows_its_old_pieces(corpus, num):
    old, new, words = grown([corpus], num)
    origins = new_words.split_added(old, new)
    vocabulary = old.get_vocab()
    assert origins == [[vocabulary[p] for p in greedy(word, set(vocabulary))] for word in words]
    assert new_words.split_added(old, old) == []
    if words:
        assert new_words.split_added(new, old) is None


def test_another_vocabulary_is_no_grown_one():
    old, new, _ = grown([TEXT], 2)
    swapped = stage._bert_tokenizer([*OLD[:-1], "x", OLD[-1]], TokenizerConfig()).backend_tokenizer
    assert new_words.split_added(old, swapped) is None and new_words.split_added(swapped, new) is None


# --- the stage ---


def make(tmp_path: Path, train: str, holdout: str, **options) -> tuple[Path, dict]:
    corpus, counts = tmp_path / "corpus", {}
    with committing(corpus, fingerprint="c" * 64, parents={}) as (scratch, _):
        for split, text in (("train", train), ("holdout", holdout)):
            (scratch / split).mkdir()
            writer = PartWriter(scratch / split, 1 << 30)
            writer.add(content_hash(text.encode()).hex(), "test", text, len(text.encode()))
            writer.close()
    config = Config(tokenizer=TokenizerConfig(adopt=str(write_vocabulary(tmp_path)), **options))
    stage.run(config, {"corpus": corpus}, tmp_path / "out", counts)
    return tmp_path / "out", counts


def test_the_stage_writes_a_stock_tokenizer_and_says_what_is_saved(tmp_path):
    from transformers import AutoTokenizer, BertTokenizer

    out, counts = make(tmp_path, TEXT, "abcabc bca abcabcb cab", add_tokens=2, min_frequency=2)
    stock = AutoTokenizer.from_pretrained(out)
    assert type(stock) is BertTokenizer and len(stock) == len(OLD) + 2 and counts["added_words"] == 2
    assert (out / "vocab.txt").read_text().splitlines() == [*OLD, "abcabc", "bca"]
    assert set(stock.added_tokens_decoder) == set(range(5))  # the new words are none of them
    assert stock("abcabc bca abcabcb [MASK]").input_ids == [2, 14, 15, 14, 9, 4, 3]
    assert Encoder(stage.load(out), "en").by_words  # shards keep their fast path
    report = json.loads((out / "report.json").read_text())
    # before: ab ##c ##a ##bc, b ##c ##a, ab ##c ##a ##bc ##b, cab; now: abcabc, bca, abcabc ##b, cab
    assert report["tokens_per_word"] == 5 / 4 and report["tokens"] == 5 and report["vocab_size"] == len(OLD) + 2
    assert report["added"] == {
        "words": 2,
        "examples": ["abcabc", "bca"],
        "tokens_per_word_before": 13 / 4,
        "tokens_saved": 8,
        "share_saved": round(8 / 13, 6),
        "unknown_rate_before": 0.0,
    }
    assert stage.read_special_ids(out) == ({"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, [0, 1, 2, 3, 4])


def test_nothing_to_add_is_warned_of_and_changes_nothing(tmp_path):
    out, counts = make(tmp_path, "ab cab", "ab", add_tokens=5)
    assert counts["added_words"] == 0 and "only 0 words" in counts["warnings"][-1]
    assert (out / "vocab.txt").read_text().splitlines() == OLD


def test_the_same_corpus_gives_the_same_bytes(tmp_path):
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folders.append(make(tmp_path / name, TEXT * 3, "ab", add_tokens=4)[0])
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_a_folder_s_words_can_be_added_to_twice(tmp_path):
    out, _ = make(tmp_path, TEXT, "ab", add_tokens=1)
    config = TokenizerConfig(adopt=str(out), add_tokens=1)
    tokenizer = stage.adopt(config)
    assert new_words.add_words(tokenizer, [TEXT], config) == ["bca"]
    assert tokenizer("abcabc bca").input_ids == [2, 14, 15, 3]


# --- what can't grow ---


def test_words_are_added_to_an_adopted_tokenizer_alone():
    with pytest.raises(ConfigError, match=r"^tokenizer\.add_tokens: adds to an adopted tokenizer"):
        stage.identify(TokenizerConfig(add_tokens=5), None)


def other_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    yield bpe, "BPE"
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    yield unigram, "Unigram"
    slow = stage._bert_tokenizer(OLD, TokenizerConfig())
    slow.add_tokens(["new"])
    yield slow.backend_tokenizer, "'new'"
    gap = stage._bert_tokenizer(OLD, TokenizerConfig()).backend_tokenizer
    gap.model = models.WordPiece(gap.get_vocab() | {"later": 99}, unk_token="[UNK]")
    yield gap, "gaps"


@pytest.mark.parametrize(("backend", "message"), list(other_tokenizers()), ids=lambda value: str(value)[:9])
def test_other_tokenizers_are_refused(backend, message):
    with pytest.raises(ConfigError, match=rf"^tokenizer\.add_tokens: .*{message}"):
        new_words.check_grows(backend)


def test_the_comparison_of_an_empty_text():
    empty = {"tokens": 0, "tokens_per_word": 0.0, "unknown_rate": 0.0, "warnings": []}
    assert tokenizer_report.compare(empty, dict(empty), ["x"], 1)["added"]["share_saved"] == 0.0
