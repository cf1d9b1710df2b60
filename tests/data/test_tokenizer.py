"""The tokenizer stage on five languages: what it writes is stock BERT, repeatable, and tells what it loses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.artifact import committing
from bertpipe.config import Config, TokenizerConfig
from bertpipe.data import tokenizer as stage
from bertpipe.data.corpus import PartWriter, content_hash
from bertpipe.errors import ArtifactError, ConfigError, DataError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "languages"
LANGUAGES = ("en", "hi", "ar", "zh", "th")
LINES_PER_DOCUMENT = 4


def read_language(language: str) -> list[str]:
    lines = (FIXTURES / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    return ["\n".join(lines[i : i + LINES_PER_DOCUMENT]) for i in range(0, len(lines), LINES_PER_DOCUMENT)]


def write_corpus(folder: Path, train: list[str], holdout: list[str] = ()) -> Path:
    with committing(folder, fingerprint="c" * 64, parents={}) as (scratch, _):
        for split, texts in (("train", train), ("holdout", holdout)):
            (scratch / split).mkdir()
            writer = PartWriter(scratch / split, 1 << 30)
            for text in texts:
                writer.add(content_hash(text.encode()).hex(), "test", text, len(text.encode()))
            writer.close()
    return folder


def make(corpus: Path, out: Path, **options) -> dict:
    """Run the stage; its counts."""
    counts: dict = {}
    stage.run(Config(tokenizer=TokenizerConfig(**options)), {"corpus": corpus}, out, counts)
    return counts


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {la: write_corpus(root / la, read_language(la)[:-2], read_language(la)[-2:]) for la in LANGUAGES}


@pytest.fixture(scope="module")
def trained(corpora, tmp_path_factory) -> dict[str, Path]:
    """A tokenizer for each language, with vowel signs kept."""
    root = tmp_path_factory.mktemp("tokenizers")
    for language, corpus in corpora.items():
        make(corpus, root / language, vocab_size=700, strip_accents=False, model_max_length=77)
    return {language: root / language for language in LANGUAGES}


def squeeze(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_trained_tokenizer_is_a_stock_bert_one(language, trained):
    from transformers import AutoTokenizer, BertTokenizer

    folder = trained[language]
    stock, ours = AutoTokenizer.from_pretrained(folder), stage.load(folder)
    assert type(stock) is BertTokenizer and stock.model_max_length == 77
    assert stock.convert_ids_to_tokens(range(5)) == list(stage.SPECIAL_TOKENS)
    assert stage.read_special_ids(folder) == ({"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, [0, 1, 2, 3, 4])
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and lines == stock.convert_ids_to_tokens(range(len(stock))) and len(lines) <= 700
    for text in read_language(language):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert stock(text).input_ids == [2, *ids, 3]
        assert stock(text, "b").token_type_ids == [0] * (len(ids) + 2) + [1] * 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_comes_back(language, trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained[language])
    for text in read_language(language)[:-2]:  # all its characters were seen in training
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert squeeze(tokenizer.decode(ids, skip_special_tokens=True)) == squeeze(text.lower())


@pytest.mark.parametrize("language", LANGUAGES)
def test_report_measures_the_holdout(language, corpora, trained):
    report = json.loads((trained[language] / "report.json").read_text(encoding="utf-8"))
    texts, tokenizer = read_language(language)[-2:], stage.load(trained[language])
    encodings = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = sum(len(encoding.ids) for encoding in encodings)
    words = sum(len(set(encoding.word_ids)) for encoding in encodings)
    assert report["measured_on"] == "holdout" and report["trained"] is True
    assert report["documents"] == 2 and report["tokens"] == tokens and report["words"] == words
    assert report["tokens_per_word"] == pytest.approx(tokens / words, abs=1e-5)
    assert report["unknown_rate"] == pytest.approx(sum(e.ids.count(1) for e in encodings) / tokens, abs=1e-5)
    assert sum(report["document_tokens"].values()) == 2
    assert sum(int(n) * count for n, count in report["word_tokens"].items()) == tokens
    assert len(report["longest_tokens"][0]) == max(map(len, tokenizer.get_vocab()))


@pytest.mark.parametrize(
    ("language", "script"), [("en", None), ("hi", "Devanagari"), ("ar", "Arabic"), ("zh", None), ("th", "Thai")]
)
def test_deleting_vowel_signs_is_warned_of(language, script, corpora, trained, tmp_path, capsys):
    warnings = make(corpora[language], tmp_path / "stripped", vocab_size=700)["warnings"]  # lowercase strips by default
    found = [warning for warning in warnings if "tokenizer.strip_accents: false" in warning]
    printed = capsys.readouterr().err
    if script is None:
        assert not found and "strip_accents" not in printed
    else:
        assert len(found) == 1 and script in found[0] and found[0] in printed
    kept = json.loads((trained[language] / "report.json").read_text(encoding="utf-8"))
    assert not kept["deleted_marks"] and "strip_accents" not in " ".join(kept["warnings"])


def test_a_high_unknown_rate_is_warned_of(corpora, tmp_path):
    counts = make(corpora["zh"], tmp_path / "out", vocab_size=700, limit_alphabet=50)
    assert counts["unknown_rate"] > 0.1 and "[UNK]" in counts["warnings"][0]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
import sys, json
from pathlib import Path
from bertpipe.config import TokenizerConfig
from bertpipe.data.tokenizer import draw_sample, train_vocabulary
for corpus, limit in json.loads(sys.argv[1]):
    settings = TokenizerConfig(vocab_size=400, limit_alphabet=limit)
    print(json.dumps(train_vocabulary(draw_sample(Path(corpus), "train", 6000, 0), settings)))
"""


def test_training_repeats_in_other_processes(corpora):
    jobs = json.dumps([(str(corpora[language]), limit) for language, limit in (("en", 1000), ("zh", 100), ("hi", 30))])
    runs = [
        run_python(TRAIN, jobs, TOKENIZERS_PARALLELISM=parallel, RAYON_NUM_THREADS=threads)
        for parallel, threads in (("true", "3"), ("true", "1"), ("false", "1"))
    ]
    assert runs[0] == runs[1] == runs[2]
    for line in runs[0].splitlines():
        pieces = json.loads(line)
        assert len(pieces) == len(set(pieces)) > 100


LOAD = """
import sys, json
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "bertpipe" not in sys.modules
print(json.dumps([type(tokenizer).__name__, tokenizer.model_max_length, tokenizer("The old tower.").input_ids]))
"""


def test_the_folder_loads_without_bertpipe(trained):
    name, length, ids = json.loads(run_python(LOAD, trained["en"]))
    tokenizer = stage.load(trained["en"])
    assert (name, length) == ("BertTokenizer", 77) and ids == tokenizer.encode("The old tower.").ids


def test_same_corpus_and_settings_give_the_same_files(corpora, trained, tmp_path):
    make(corpora["hi"], tmp_path, vocab_size=700, strip_accents=False, model_max_length=77)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (trained["hi"] / name).read_bytes(), name


def test_the_vocabulary_has_its_size_and_the_commonest_characters(corpora, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["aaaa aaab bbbb cc cc d", "aaaa ccb 漢 字 漢"])
    texts = stage.draw_sample(corpus, "train", 10**6, 0)
    train = stage.train_vocabulary
    options = {"min_frequency": 1, "vocab_size": 100}
    assert train(texts, TokenizerConfig(**options, limit_alphabet=3))[5:11] == ["a", "b", "c", "##a", "##b", "##c"]
    # Of equally frequent characters (d, 字) the smaller code point stays; one that never continues a word has no "##".
    assert train(texts, TokenizerConfig(**options, limit_alphabet=5))[5:10] == ["a", "b", "c", "d", "漢"]
    assert "##漢" not in train(texts, TokenizerConfig(**options))
    for size in (40, 200, 250):
        zh = stage.draw_sample(corpora["zh"], "train", 10**6, 0)
        assert size - 1 <= len(train(zh, TokenizerConfig(vocab_size=size))) <= size


def test_special_tokens_in_a_text_are_text(trained):
    tokenizer = stage.load(trained["en"])
    ids = tokenizer.encode("see [SEP] and [MASK] here", add_special_tokens=False).ids
    assert not {0, 2, 3, 4} & set(ids)


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text"):
        make(write_corpus(tmp_path / "corpus", []), tmp_path / "out")


def test_without_a_holdout_the_report_is_of_the_training_text(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", read_language("en"))
    assert make(corpus, tmp_path / "out", vocab_size=300)["measured_on"] == "train"


# --- the sample ---


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    max_bytes=st.integers(1, 1500),
    seed=st.integers(0, 3),
)
def test_the_sample_fits_its_budget(tmp_path_factory, sizes, max_bytes, seed):
    texts = [(f"{number} é漢 " * 12)[:size] for number, size in enumerate(sizes)]
    corpus = write_corpus(tmp_path_factory.mktemp("sample") / "corpus", texts)
    read = stage.draw_sample(corpus, "train", max_bytes, seed)
    sample, total = list(read()), sum(len(text.encode()) for text in texts)
    assert sample == list(read())
    taken = sum(len(text.encode()) for text in sample)
    assert taken <= max_bytes
    assert all(any(text.startswith(part) for text in texts) for part in sample)
    if total <= max_bytes:
        assert sample == texts
    else:  # one document at most is cut, and by less than a word; characters are whole
        assert taken > max_bytes - max(len(text.encode()) for text in texts)


def test_the_sample_depends_on_the_seed(tmp_path):
    texts = [f"document {number} with some words" for number in range(400)]
    corpus = write_corpus(tmp_path / "corpus", texts)
    samples = [list(stage.draw_sample(corpus, "train", 3000, seed)()) for seed in (0, 1)]
    chosen = [{texts.index(text) for text in sample if text in texts} for sample in samples]
    assert all(len(c) > 80 for c in chosen) and len(chosen[0] & chosen[1]) < 60
    assert all(150 < np.mean(list(c)) < 250 for c in chosen)  # from the whole corpus, not its beginning


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 20))
def test_long_texts_are_cut_without_loss(text, characters):
    pieces = list(stage.split_long(text, characters))
    assert "".join(pieces) == text
    assert all(len(piece) <= characters for piece in pieces)


# --- adopting ---


def test_the_published_vocabulary_gives_the_published_ids(corpora, real_data, tmp_path):
    from transformers import AutoTokenizer

    counts = make(corpora["en"], tmp_path, adopt=str(real_data / "vocab" / "bert-base-uncased-vocab.txt"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert counts["vocab_size"] == len(tokenizer) == 30_522 and counts["unknown_rate"] == 0
    assert tokenizer("Hello world").input_ids == [101, 7592, 2088, 102]
    assert tokenizer.decode(tokenizer("It's embeddings, café!").input_ids) == "[CLS] it ' s embeddings, cafe! [SEP]"
    published = (real_data / "vocab" / "bert-base-uncased-vocab.txt").read_bytes()
    assert (tmp_path / "vocab.txt").read_bytes() == published
    assert stage.read_special_ids(tmp_path)[0] == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}


def test_an_adopted_folder_keeps_its_pieces_but_not_its_truncation(corpora, trained, tmp_path):
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(trained["th"])
    source.backend_tokenizer.enable_truncation(8)
    source.backend_tokenizer.enable_padding(length=512)
    source.save_pretrained(tmp_path / "source")
    counts = make(corpora["th"], tmp_path / "out", adopt=str(tmp_path / "source"), lowercase=False)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (trained["th"] / "vocab.txt").read_bytes()
    text = "\n".join(read_language("th"))
    ids = stage.load(tmp_path / "out").encode(text).ids
    assert len(ids) > 200 and 0 not in ids and ids == stage.load(trained["th"]).encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 512
    assert counts["vocab_size"] == len(source)


SPECIALS = "".join(f"{token}\n" for token in stage.SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SPECIALS.encode() + b"a\nb\na\n", r"vocab.txt, line 8: 'a' stands in line 6 already"),
        (SPECIALS.encode() + b"a\n\nb\n", r"vocab.txt, line 7: empty"),
        (SPECIALS.encode() + b"a\n\xff\n", r"vocab.txt, line 7: not UTF-8"),
        (b"[PAD]\n[UNK]\n[CLS]\n", r"lacks \[SEP\], \[MASK\]"),
    ],
)
def test_a_malformed_vocabulary_names_its_line(content, message, corpora, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(corpora["en"], tmp_path / "out", adopt=str(tmp_path / "vocab.txt"))


def test_windows_line_ends_are_no_part_of_a_piece(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes((SPECIALS + "a\n##b\n").replace("\n", "\r\n").encode())
    assert stage.read_vocabulary(path) == [*stage.SPECIAL_TOKENS, "a", "##b"]


@pytest.mark.parametrize("name", ["./no/such/place", "no-such-owner/no-such-tokenizer"])
def test_what_cannot_be_adopted_is_refused_in_one_line(name, corpora, tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer\.adopt: [^\n]*$") as caught:
        make(corpora["en"], tmp_path / "out", adopt=name)
    assert name in str(caught.value)


def test_a_folder_that_holds_no_tokenizer_is_refused(corpora, tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer\.adopt: no tokenizer could be loaded from [^\n]*$"):
        make(corpora["en"], tmp_path / "out", adopt=str(tmp_path))


def test_an_adopted_tokenizer_is_identified_by_its_content(tmp_path, trained):
    assert stage.identify(TokenizerConfig(), None) == {}
    for name, content in (("a", SPECIALS), ("b", SPECIALS), ("c", SPECIALS + "x\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(content, encoding="utf-8")
    a, b, c = (stage.identify(TokenizerConfig(adopt=str(tmp_path / name / "vocab.txt")), None) for name in "abc")
    assert a == b != c and a["vocabulary"][0]["sha256"]
    folder = stage.identify(TokenizerConfig(adopt=str(trained["en"])), tmp_path / "hashes.json")
    assert {row["name"] for row in folder["folder"]} >= {"tokenizer.json", "tokenizer_config.json"}
    hub = stage.identify(TokenizerConfig(adopt="no-such-owner/no-such-tokenizer"), None)
    assert hub == {"hub": "no-such-owner/no-such-tokenizer", "revision": None}
    with pytest.raises(ConfigError, match="no file, no folder and no Hub id"):
        stage.identify(TokenizerConfig(adopt=str(tmp_path / "missing")), None)


def test_a_damaged_artifact_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="make it with `bertpipe tokenizer`"):
        stage.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not readable"):
        stage.load(tmp_path)
