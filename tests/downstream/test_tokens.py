"""Token classification: tables read and refused, words and labels through windows, a run of it, the stock pipeline."""

import contextlib
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe import cli
from bertpipe.config import Config
from bertpipe.data.batches import Examples, ExampleSlots
from bertpipe.downstream.finetuning import training
from bertpipe.downstream.publishing import card
from bertpipe.downstream.reporting import compare, understanding
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.encode import encode_words
from bertpipe.downstream.tasks.kind import Outputs, Split
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.tasks.task_sources import WHOLE, FolderOrHub
from bertpipe.errors import ConfigError, DataError
from bertpipe.model.labelled import TokenLabel
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.runs import only
from tests.train.test_loop import STEPS, as_padded, bert, fit, token_labels, trainer_losses

KIND = KINDS["tokens"]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TRAIN = {
    "id": ["0", "1"],
    "tokens": [["Ada", "Lovelace", "wrote"], ["in", "London"]],
    "ner_tags": [["B-PER", "I-PER", "O"], ["O", "B-LOC"]],
}


def write(folder: Path, **splits: dict | pa.Table) -> Path:
    """<folder>/wnut17/<split>.parquet; returns the folder."""
    (folder / "wnut17").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(rows), folder / "wnut17" / f"{split}.parquet")
    return folder


def load(folder: Path, **splits: dict | pa.Table) -> dict[str, Split]:
    return tasks.load("wnut17", str(write(folder, **splits)))


def failure(folder: Path, **splits: dict | pa.Table) -> str:
    """The one line that loading fails with."""
    with pytest.raises(DataError) as caught:
        load(folder, **({"train": TRAIN, "validation": TRAIN} | splits))
    assert "\n" not in str(caught.value) and f"{folder}/wnut17/" in str(caught.value)
    return str(caught.value)


def coded(rows: dict, names=NAMES):
    """The same rows with codes for tags, as `datasets` writes them: names in the metadata."""
    import datasets

    codes = [[names.index(tag) if tag in names else -1 for tag in row] for row in rows["ner_tags"]]
    features = {"tokens": datasets.List(datasets.Value("string")), "id": datasets.Value("string")}
    features["ner_tags"] = datasets.List(datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict(rows | {"ner_tags": codes}, features=datasets.Features(features))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tags_as_text(tmp_path):
    splits = load(tmp_path, train=TRAIN, validation={name: rows[1:] for name, rows in TRAIN.items()})
    train, validation = splits["train"], splits["validation"]
    assert train.texts == [("Ada", "Lovelace", "wrote"), ("in", "London")] and train.ids == ["0", "1"]
    assert train.label_names == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER"), "I-LOC too, which only another text may have"
    assert [row.tolist() for row in train.labels] == [[2, 4, 0], [0, 1]] and train.labels[0].dtype == np.int64
    assert validation.label_names == train.label_names and validation.labels[0].tolist() == [0, 1]
    assert train.counts == {}


def test_tags_as_codes_with_names(tmp_path):
    """Files that `datasets` wrote; a validation split with tags as text is understood in the codes of training."""
    (tmp_path / "wnut17").mkdir()
    coded(TRAIN).to_parquet(str(tmp_path / "wnut17" / "train.parquet"))
    splits = load(tmp_path, validation=TRAIN)
    for split in splits.values():
        assert split.label_names == NAMES and [row.tolist() for row in split.labels] == [[1, 2, 0], [0, 3]]


def test_the_hubs_data_set(tmp_path, monkeypatch):
    """A repository without scripts and configurations; here a folder, which `datasets` reads in the same way."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation", "test"):
        coded(TRAIN).to_parquet(str(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet"))
    source, task = FolderOrHub("a copy", str(tmp_path / "repo"), WHOLE), tasks.get("conll2003")
    splits = source.load(task, None)
    assert list(splits) == ["train", "validation", "test"] and splits["test"].label_names == NAMES
    assert splits["test"].texts == splits["train"].texts == [tuple(row) for row in TRAIN["tokens"]]
    assert source.identify(task, None, None)["hub"] == str(tmp_path / "repo")


@pytest.mark.parametrize(
    "tags", [None, [[-1, -1, -1], [-1, -1]], [[None] * 3, [None] * 2], [None, None], pa.nulls(2)], ids=str
)
def test_secret_test_tags_give_no_labels(tmp_path, tags):
    test = pa.table({"tokens": TRAIN["tokens"]} | ({} if tags is None else {"ner_tags": tags}))
    split = load(tmp_path, train=TRAIN, validation=TRAIN, test=test)["test"]
    assert split.labels is None and len(split) == 2 and split.ids == [0, 1] and split.label_names


@pytest.mark.parametrize("tags", [[[-1, -1, -1], [-1, -1]], [None, None], pa.nulls(2)], ids=str)
def test_validation_without_any_tag_is_for_predictions(tmp_path, tags):
    secret = pa.table({"tokens": TRAIN["tokens"], "ner_tags": tags})
    assert load(tmp_path, train=TRAIN, validation=secret)["validation"].labels is None
    assert "column 'ner_tags'" in failure(tmp_path, train=secret), "what is trained on needs them"
    assert "no column 'ner_tags'" in failure(tmp_path, validation={"tokens": TRAIN["tokens"]})


def test_iob_errors_are_kept_and_counted(tmp_path):
    """IOB1 begins most entities with I-; conlleval takes them for entities, and so do we."""
    iob1 = TRAIN | {"ner_tags": [["I-PER", "I-PER", "O"], ["I-PER", "I-LOC"]]}
    splits = load(tmp_path, train=iob1, validation=TRAIN)
    assert splits["train"].counts == {"entities_that_begin_with_I": 3} and splits["validation"].counts == {}
    predicted = splits["train"].labels
    assert KIND.score(tasks.get("wnut17"), splits["train"], predicted)["f1"] == 1
    assert {kind: row["num_gold"] for kind, row in KIND.details(splits["train"], predicted)["per_type"].items()} == {
        "LOC": 1,
        "PER": 2,
    }


def tokens(*rows):
    return TRAIN | {"tokens": list(rows)}


def tags(*rows):
    return TRAIN | {"ner_tags": list(rows)}


BAD = {
    "no lists": (TRAIN | {"tokens": ["Ada Lovelace", "in London"]}, "column 'tokens' holds string, not lists"),
    "no words": (tokens([1, 2, 3], [4, 5]), "column 'tokens' holds lists of int64, not of text (one word each)"),
    "null word": (tokens(["a", None, "b"], ["c", "d"]), "row 0: column 'tokens' holds a null"),
    "null sentence": (tokens(["a", "b", "c"], None), "row 1: column 'tokens' is null"),
    "empty sentence": (tokens(["a", "b", "c"], []), "row 1: column 'tokens' is an empty list"),
    "null tags": (tags(["O", "O", "O"], None), "row 1: column 'ner_tags' is null"),
    "null tag": (tags(["O", "O", "O"], ["O", None]), "row 1: column 'ner_tags' holds a null"),
    "too few tags": (tags(["O", "O", "O"], ["O"]), "row 1: column 'ner_tags' has 1 tags for 2 words"),
    "no tag": (tags(["O", "O", "O"], ["O", "PER"]), "row 1, word 1: column 'ner_tags': 'PER' is neither O nor B-"),
    "a scheme unknown": (tags(["O", "L-PER", "O"], ["O", "O"]), "row 0, word 1: column 'ner_tags': 'L-PER' is neither"),
    "numbers": (tags([0.5, 1.0, 0.0], [0.0, 0.0]), "column 'ner_tags' holds lists of double, not of tags"),
    "codes without names": (tags([0, 1, 2], [0, 1]), "column 'ner_tags' holds codes and doesn't say of which tags"),
    "no column": ({"words": [["a"]], "ner_tags": [["O"]]}, "no column 'tokens'; it has words, ner_tags"),
    "no rows": (pa.table(TRAIN).slice(0, 0), "train.parquet: no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused(tmp_path, name):
    rows, message = BAD[name]
    assert message in failure(tmp_path, train=rows)


def test_a_tag_that_training_does_not_have_is_refused(tmp_path):
    other = tags(["B-PER", "I-PER", "O"], ["O", "B-SHIP"])
    message = failure(tmp_path, validation=other)
    assert "validation.parquet: row 1, word 1: column 'ner_tags': the tag 'B-SHIP' is not among those of the" in message
    assert "(O, B-LOC, B-PER, I-LOC, I-PER)" in message


@pytest.mark.parametrize(("tag", "fault"), [("none", "the code -1 is -1: label the word")])
def test_a_code_that_means_nothing_is_refused(tmp_path, tag, fault):
    (tmp_path / "wnut17").mkdir()
    coded(tags(["O", "O", "O"], ["O", tag])).to_parquet(str(tmp_path / "wnut17" / "train.parquet"))
    with pytest.raises(DataError, match=f"train.parquet: row 1: column 'ner_tags': {fault}"):
        load(tmp_path, validation=TRAIN)


def test_codes_that_mean_something_else_than_in_training_are_refused(tmp_path):
    (tmp_path / "wnut17").mkdir()
    coded(TRAIN).to_parquet(str(tmp_path / "wnut17" / "train.parquet"))
    coded(TRAIN, NAMES[::-1]).to_parquet(str(tmp_path / "wnut17" / "validation.parquet"))
    with pytest.raises(DataError, match=r"validation\.parquet: column 'ner_tags' names its codes .* the training data"):
        load(tmp_path)


def test_words_that_are_not_utf8_are_refused(tmp_path):
    flat = pa.array([b"Ada", b"caf\xe9", b"c", b"d", b"e"]).view(pa.string())
    words = pa.ListArray.from_arrays(pa.array([0, 3, 5], pa.int32()), flat)
    table = pa.table(TRAIN).set_column(1, "tokens", words)
    assert "row 0: column 'tokens' is not UTF-8" in failure(tmp_path, train=table)


# --- words and windows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def settings_of(**fields):
    return Config(finetune={"tasks": "wnut17", **fields}).finetune


def sentences(*texts, labelled=True):
    labels = [np.arange(len(words)) % len(NAMES) for words in texts]
    return Split([tuple(words) for words in texts], labels if labelled else None, list(range(len(texts))), NAMES)


def assert_equals_stock(split, tokenizer, encoded):
    """Sentences that fit: the stock tokenizer's ids, labels at its first piece of each word."""
    assert len(encoded.examples) == len(split)
    for row, words in enumerate(split.texts):
        stock = tokenizer([list(words)], is_split_into_words=True)
        ids, places = encoded.examples.input_ids[row], encoded.examples.positions[row]
        seen = set(stock.word_ids(0)) - {None}
        silent = [places[word] for word in range(len(words)) if word not in seen]
        assert (ids[silent] == tokenizer.unk_token_id).all()
        assert np.delete(ids, silent).tolist() == stock["input_ids"][0], "but for words without pieces"
        owners = np.insert(np.array(stock.word_ids(0), object), np.array(silent, int) - np.arange(len(silent)), "-")
        heard = [word for word in range(len(words)) if word in seen]
        assert [owners.tolist().index(word) for word in heard] == places[heard].tolist()
        assert encoded.examples.labels[row].tolist() == split.labels[row].tolist()
        assert not encoded.examples.token_type_ids[row].any() and len(places) == len(words)


def test_a_word_without_pieces_keeps_its_label_and_shifts_none(tokenizer):
    split = sentences(["the", "\u200b", "value"], ["\x00"], ["", "array", "\u200b"])
    encoded = KIND.encode(split, tokenizer, settings_of())
    assert tokenizer.convert_ids_to_tokens(encoded.examples.input_ids[0]) == ["[CLS]", "the", "[UNK]", "value", "[SEP]"]
    assert encoded.examples.positions[0].tolist() == [1, 2, 3]
    assert encoded.counts == {"words_without_pieces": 4} and encoded.num_truncated == 0
    assert_equals_stock(split, tokenizer, encoded)


WORDS = st.one_of(st.sampled_from(TEXT.split()), st.text(max_size=6), st.text("abnx", min_size=1, max_size=9))


@settings(max_examples=50)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=8), min_size=1, max_size=4))
def test_any_words_are_encoded_as_the_stock_tokenizer_does(tokenizer, texts):
    split = sentences(*texts)
    assert_equals_stock(split, tokenizer, KIND.encode(split, tokenizer, settings_of(max_length=512)))


@settings(max_examples=100)
@given(
    st.lists(st.lists(WORDS, min_size=1, max_size=40), min_size=1, max_size=4), st.integers(8, 30), st.integers(0, 5)
)
def test_no_label_of_a_long_sentence_is_lost_or_counted_twice(tokenizer, texts, max_length, stride):
    split = sentences(*texts)
    whole = KIND.encode(split, tokenizer, settings_of(max_length=512)).examples
    encoded = KIND.encode(split, tokenizer, settings_of(max_length=max_length, stride=stride))
    examples, places = encoded.examples, encoded.notes
    assert encoded.num_truncated == 0 and examples.lengths.max() <= max_length
    found = [[] for _ in texts]
    for item, (ids, positions, labels) in enumerate(
        zip(examples.input_ids, examples.positions, examples.labels, strict=True)
    ):
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and len(positions)
        sentence, words = places.sentence[item], places.word[item] + np.arange(len(positions))
        start = whole.positions[sentence][words[0]] - positions[0]  # of the window in the sentence's tokens
        assert ids[1:-1].tolist() == whole.input_ids[sentence][start + 1 : start + len(ids) - 1].tolist()
        assert (whole.positions[sentence][words] == start + positions).all(), "each at its word's first piece"
        found[sentence] += zip(words.tolist(), labels.tolist(), strict=True)
    assert found == [list(enumerate(labels.tolist())) for labels in split.labels]
    num_long = sum(len(ids) > max_length for ids in whole.input_ids)
    assert encoded.counts.get("sentences_in_windows", 0) == num_long
    assert encoded.counts.get("windows", 0) == sum((places.sentence == n).sum() for n in range(len(texts))
                                                   if len(whole.input_ids[n]) > max_length)  # fmt: skip

    codes = np.concatenate(examples.labels)  # a model that knows the answers, item by item
    logits = np.eye(len(NAMES), dtype=np.float32)[codes] * 3
    outputs = Outputs(logits, np.append(0, np.cumsum(TokenLabel.num_rows(examples))))
    predicted = KIND.decide(split, encoded, outputs)
    assert [row.tolist() for row in predicted] == [row.tolist() for row in split.labels]
    line = KIND.line(split, encoded, outputs, predicted, len(texts) - 1)
    assert line["prediction"] == line["label"] and len(line["probability"]) == len(
        texts[-1]
    )  # fmt: skip


def test_byte_level_tokenizers_see_the_space_before_a_word(tmp_path):
    """Without it they'd read the words of a sentence as one: RoBERTa's and ModernBERT's need `add_prefix_space`."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([TEXT] * 9, 400, special_tokens=special, show_progress=False)
    trained.save_model(str(tmp_path))
    plain, spaced = (tr.RobertaTokenizer.from_pretrained(tmp_path, add_prefix_space=on) for on in (False, True))
    split = sentences(TEXT.split()[:30], ["", "the", " value"])
    expected = [x["input_ids"] for x in (spaced(list(words), is_split_into_words=True) for words in split.texts)]
    assert expected[0] != plain(list(split.texts[0]), is_split_into_words=True)["input_ids"]
    for tokenizer in (plain, spaced):
        rows = KIND.encode(split, tokenizer, settings_of(max_length=200)).examples.input_ids
        assert rows[0].tolist() == expected[0]
        assert rows[1].tolist() == [0, 3, *expected[1][1:]], "the empty word is <unk>"


def test_every_word_is_tokenized_once(tokenizer, monkeypatch):
    monkeypatch.setattr("bertpipe.downstream.tasks.encode.CHUNK", 2)
    pieces = encode_words(["the", "array", "the", "zebra", "value"], tokenizer)
    assert list(pieces) == ["the", "array", "zebra", "value"]
    assert all(ids.tolist() == tokenizer(word, add_special_tokens=False)["input_ids"] for word, ids in pieces.items())


def test_a_stride_that_leaves_nothing_new_is_refused(tokenizer):
    with pytest.raises(
        ConfigError, match=r"finetune\.stride: windows of 14 tokens of text that share 14 never advance"
    ):
        KIND.encode(sentences(["the"]), tokenizer, settings_of(max_length=16, stride=14))


@pytest.mark.parametrize("max_length", [16, 128])
def test_real_data(max_length, real_data):
    splits = tasks.load("wnut17", str(real_data / "ner"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3394, "validation": 1007}
    assert len(splits["train"].label_names) == 13 and splits["validation"].counts == {"entities_that_begin_with_I": 1}
    split = splits["validation"]
    tokenizer = tr.BertTokenizer(str(real_data / "vocab" / "bert-base-uncased-vocab.txt"))
    encoded = KIND.encode(split, tokenizer, settings_of(max_length=max_length))
    assert np.concatenate(encoded.examples.labels).tolist() == np.concatenate(split.labels).tolist()
    assert encoded.counts["words_without_pieces"] == 4 and encoded.examples.lengths.max() <= max_length
    if max_length == 128:
        assert_equals_stock(split, tokenizer, encoded)
    else:
        assert encoded.counts["sentences_in_windows"] > 400


# --- a run ------------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_trainer(tmp_path):
    rng = np.random.default_rng(0)
    ids = [np.concatenate([[2], rng.integers(5, 200, n), [3]]) for n in rng.integers(2, 40, 100)]
    positions = [np.flatnonzero(np.arange(len(x)) % rng.integers(1, 4) == 1) for x in ids]
    labels = [(x[p] > 100).astype(np.int64) for x, p in zip(ids, positions, strict=True)]
    source = ExampleSlots(Examples(ids, [np.zeros_like(x) for x in ids], labels, positions), 16, 2, seed=0, pad_id=0)
    batches = [as_padded(source.slots(step, 0, 2), token_labels) for step in range(STEPS)]
    expected = trainer_losses(bert(tr.AutoModelForTokenClassification, num_labels=2), batches, tmp_path / "trainer")
    found = fit(TokenLabel(bert(tr.AutoModelForTokenClassification, num_labels=2)), source, tmp_path / "ours")
    assert np.mean(expected[-5:]) < np.mean(expected[:5])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


TAG_OF = {"names": "B-PER", "given": "I-PER", "file": "B-LOC"}


def invented(size: int, seed: int, most: int = 12) -> dict:
    """Sentences in which each word always has the same tag, but for one of them, which nobody can tell."""
    draw, units = random.Random(seed), ["names given", "file", "the value", "of", "array", "is", "a", "new"]
    texts = [" ".join(draw.choices(units, k=draw.randint(2, most))).split() for _ in range(size)]
    tagged = [
        [TAG_OF.get(word) or ("B-LOC" if word == "new" and draw.random() < 0.2 else "O") for word in text]
        for text in texts
    ]
    return {"tokens": texts, "ner_tags": tagged}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, str]:
    """The folder of data, that of a finished run of the command on it, and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = tr.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.1, **sizes)
    tr.BertForMaskedLM(config).save_pretrained(folder / "model")
    data = write(folder / "ner", train=invented(200, 1), validation=invented(60, 2, 40), test=invented(20, 3))
    run = ["finetune", "--finetune.tasks", "all", "--finetune.data", data, "--finetune.model", folder / "model"]
    run += ["--finetune.seeds", "1", "--finetune.epochs", "2", "--finetune.lr", "5e-3", "--finetune.max_length", "24"]
    run += ["--finetune.batch_size", "8"]
    run += ["--finetune.precision", "fp32", "--finetune.baselines", "majority", "--runtime.threads", "1"]
    run += ["--runtime.root", folder / "runs", "--runtime.progress", "false"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([str(argument) for argument in run]) == 0
    return data, only(folder / "runs", "finetune") / "wnut17", printed.getvalue()


def test_a_run_learns_and_says_how_well_each_type_is_found(made):
    _, folder, printed = made
    scores = json.loads((folder / "scores.json").read_text())
    model, baseline = scores["runs"]
    assert 0.85 < model["scores"]["f1"] < 1
    assert scores["metric"] == "f1" and scores["kind"] == "tokens" and scores["labels"][0] == "O"
    assert {"precision", "recall", "f1", "accuracy", "test_f1"} < model["scores"].keys()
    for split in ("validation", "test"):
        per_type = model["per_type" if split == "validation" else "test_per_type"]
        assert list(per_type) == ["LOC", "PER"] and all(row["num_gold"] for row in per_type.values())
        right, gold = (sum(row[name] for row in per_type.values()) for name in ("num_right", "num_gold"))
        recall = model["scores"]["recall" if split == "validation" else "test_recall"]
        assert recall == pytest.approx(right / gold)
    assert baseline["init"] == "majority" and baseline["per_type"]["PER"]["f1"] == 1
    assert scores["truncated"] == 0 and scores["counts"]["validation"]["sentences_in_windows"] > 10
    assert " sentences in windows, " in printed and f"f1 {model['scores']['f1']:.3f}" in printed


def test_predictions_come_with_words_and_in_the_columns_of_conlleval(made):
    data, folder, _ = made
    table = pq.read_table(data / "wnut17" / "validation.parquet").to_pylist()
    run = folder / "runs" / "model-seed-1"
    lines = [json.loads(line) for line in (run / "predictions-validation.jsonl").open()]
    assert [line["text"] for line in lines] == [row["tokens"] for row in table]
    assert [line["label"] for line in lines] == [row["ner_tags"] for row in table] != [x["prediction"] for x in lines]
    sentences = (run / "predictions-validation.conll").read_text().removesuffix("\n").split("\n\n")
    columns = [[line.split(" ") for line in sentence.splitlines()] for sentence in sentences]
    assert columns == [[list(row) for row in zip(x["text"], x["label"], x["prediction"], strict=True)] for x in lines]
    assert (run / "predictions-test.jsonl").is_file() and (run / "predictions-test.conll").is_file()


def test_columns_without_gold_tags_and_with_odd_words():
    split = sentences(["a b", "", "c\u2028"], ["d"], labelled=False)
    columns = KIND.files(split, [np.array([0, 1, 2]), np.array([0])])
    assert columns == {"conll": "a_b O\n_ B-PER\nc_ I-PER\n\nd O\n"}


def test_the_saved_model_is_a_stock_one_that_gives_the_packed_logits(made):
    data, folder, _ = made
    settings = settings_of(data=str(data), max_length=24)
    job = training.prepare("wnut17", settings, str(folder / "model"))
    lines = [json.loads(line) for line in (folder / "runs/model-seed-1/predictions-validation.jsonl").open()]
    stock = tr.AutoModelForTokenClassification.from_pretrained(folder / "model").eval()
    encoded = job.encoded["validation"]
    with torch.no_grad():
        logits = [
            stock(input_ids=torch.from_numpy(ids)[None]).logits[0, positions]
            for ids, positions in zip(encoded.examples.input_ids, encoded.examples.positions, strict=True)
        ]
    surest = torch.cat(logits).softmax(-1).max(-1)
    np.testing.assert_allclose(surest.values, np.concatenate([line["probability"] for line in lines]), atol=1e-5)
    named = [stock.config.id2label[int(code)] for code in surest.indices]
    assert named == [tag for line in lines for tag in line["prediction"]]

    pipe = tr.pipeline("token-classification", str(folder / "model"), ignore_labels=[], device="cpu")
    short = [n for n in range(len(lines)) if (encoded.notes.sentence == n).sum() == 1][:5]
    for number in short:
        line, places = lines[number], encoded.examples.positions[np.flatnonzero(encoded.notes.sentence == number)[0]]
        tokens = {row["index"]: row for row in pipe([line["text"]], is_split_into_words=True)[0]}
        assert [tokens[place]["entity"] for place in places] == line["prediction"]
        np.testing.assert_allclose([tokens[p]["score"] for p in places], line["probability"], atol=1e-5)
    assert short


def test_the_report_and_the_comparison_read_a_run_back(made):
    _, folder, _ = made
    facts = understanding.understand(folder)
    model = json.loads((folder / "scores.json").read_text())["runs"][0]
    assert facts["per_type"] == model["per_type"] and facts["score"] == model["scores"]["f1"]
    lines = [json.loads(line) for line in (folder / "runs/model-seed-1/predictions-validation.jsonl").open()]
    wrong = [
        (-sure, row, word)
        for row, line in enumerate(lines)
        for word, sure in enumerate(line["probability"])
        if line["prediction"][word] != line["label"][word]
    ]
    assert facts["num_wrong"] == len(wrong) > 0 and np.trace(facts["confusion"]["counts"]) > len(wrong)
    _, row, word = min(wrong)
    mistake = facts["mistakes"][0]
    assert mistake["id"] == lines[row]["id"] and f"[{lines[row]['text'][word]}]" in mistake["text"][0]
    assert (mistake["label"], mistake["prediction"]) == (lines[row]["label"][word], lines[row]["prediction"][word])
    assert mistake["gold_probability"] == lines[row]["label_probability"][word] < mistake["probability"]
    assert all(x["lowest"] <= x["score"] <= x["highest"] for x in facts["by_length"]["bins"])

    (same,) = compare.compare(folder / "runs/model-seed-1", folder / "runs/model-seed-1", resamples=2_000)
    assert same.difference.value == same.difference.lowest == same.difference.highest == 0
    assert same.score_a == model["scores"]["f1"] and same.num_resamples == 2_000, "the quick way"


def test_the_card_names_the_pipeline_and_which_split_a_score_is_of(made):
    _, folder, _ = made
    facts = {"finetune": {"wnut17": json.loads((folder / "scores.json").read_text())}, "artifacts": []}
    cfg = Config(publish={"repo": "someone/tagger", "task": "wnut17"}, finetune={"tasks": "wnut17"})
    data = card.card_data(cfg, facts)
    assert data.pipeline_tag == "token-classification" and data.datasets == ["flaitenberger/wnut_17"]
    assert 'pipeline("token-classification", model="someone/tagger")' in card.usage(cfg, facts)
    found = {(result.task_type, result.dataset_split, result.metric_type) for result in data.eval_results}
    assert {("token-classification", split, "f1") for split in ("validation", "test")} < found
    assert {result.dataset_name for result in data.eval_results} == {"WNUT-17"}


def test_weighted_f1_is_that_of_the_examples_as_often():
    draw = np.random.default_rng(0)
    texts = [["a"] * n for n in (3, 5, 1, 4)]
    split, predicted = (sentences(*texts), [draw.integers(0, len(NAMES), len(words)) for words in texts])
    task, weights = tasks.get("wnut17"), np.array([[1, 1, 1, 1], [2, 0, 0, 3], [0, 0, 1, 0]])
    found = KIND.weighted(task, split, predicted)(weights)
    for row, score in zip(weights, found, strict=True):
        drawn = np.repeat(np.arange(4), row)
        again = replace(split, labels=[split.labels[n] for n in drawn], texts=[split.texts[n] for n in drawn])
        assert KIND.score(task, again, [predicted[n] for n in drawn])["f1"] == pytest.approx(score)
