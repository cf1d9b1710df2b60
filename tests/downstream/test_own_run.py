"""From a user's file to scores, predictions and a stock model, by the real command."""

import json
import random
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM, pipeline

from bertpipe.cli import main
from bertpipe.config import Config, FinetuneConfig, TaskConfig
from bertpipe.downstream.finetuning import start_checks, training
from bertpipe.errors import ConfigError
from bertpipe.model import kernels
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.downstream.test_own_task import write_csv
from tests.runs import only

ROOT = Path(__file__).parents[2]
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small BERT with room for 48 tokens."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.3, "max_position_embeddings": 48}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(checkpoint, tmp_path) -> list[str]:
    given = {"finetune.model": checkpoint, "finetune.seeds": 1, "finetune.epochs": 2, "finetune.lr": 1e-2}
    given |= {"finetune.max_length": 40, "finetune.precision": "fp32", "runtime.root": tmp_path / "runs"}
    given |= {"runtime.progress": "false", "runtime.threads": 1}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_yaml_and_a_csv(flags, tmp_path, capsys):
    """configs/own-task.yaml on a file with quotes, line ends in texts, an empty one and one that is too long."""
    draw, rows = random.Random(0), []
    for body in sentences(90):
        rows.append({"topic": draw.choice("ab"), "title": "", "body": body})
        rows[-1]["title"] = 'the "array",\n' if rows[-1]["topic"] == "a" else "a list"
    rows[3] |= {"title": "", "body": ""}
    rows[4]["body"] = "array " * 200
    data = {"train": write_csv(tmp_path / "my.csv", rows)}
    data["test"] = write_csv(tmp_path / "unknown.csv", [{"title": "a list", "body": "x"}] * 3)
    given = json.dumps({split: str(path) for split, path in data.items()})
    command = ["finetune", "--config", str(ROOT / "configs" / "own-task.yaml"), *flags, "--finetune.task.data", given]
    command += ["--finetune.task.name", "my"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "my validation: 9 examples, 9 held out of train\n" in printed
    assert "my train: 81 examples, 1 with an empty text, 1 cut to max length\n" in printed
    assert "has no pooler; it starts random" in printed

    folder = only(tmp_path / "runs", "finetune")
    scores = json.loads((folder / "scores.json").read_text())["tasks"]["my"]
    assert scores["labels"] == ["a", "b"] and (scores["num_train"], scores["num_validation"]) == (81, 9)
    assert scores["summary"]["model"]["median"] == scores["summary"]["tfidf"]["median"] == 1.0
    assert list(scores["runs"][0]["scores"]) == ["accuracy", "macro_f1"]
    run = folder / "my" / "runs" / "model-seed-1"
    known = {line["id"]: line["label"] for line in lines(run / "predictions-validation.jsonl")}
    assert known == {i: rows[i]["topic"] for i in known} and len(known) == 9, "ids are rows of the file"
    assert [(line["id"], line["prediction"], "label" in line) for line in lines(run / "predictions-test.jsonl")] == [
        (row, "b", False) for row in range(3)
    ]
    answer = pipeline("text-classification", model=str(folder / "my" / "model"))({"text": "a list", "text_pair": "x"})
    assert answer["label"] == "b"

    shutil.move(tmp_path / "my.csv", tmp_path / "moved.csv")
    command[command.index(given)] = given.replace("my.csv", "moved.csv")
    assert main(command) == 0 and "finetune: done already" in capsys.readouterr().out


def test_a_set_of_labels(flags, tmp_path, capsys):
    """The saved model gives the probabilities of the predictions, in a pipeline that knows nothing of us."""
    rows = [
        {"id": i, "body": b, "tags": [w for w in ("the", "of", "a") if w in b.split()]}
        for i, b in enumerate(sentences(80))
    ]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "multi_label", "data": str(tmp_path / "tags.jsonl"), "text": "body", "label": "tags"}
    assert main(["finetune", *flags, "--finetune.task", json.dumps(task), "--finetune.baselines", "[majority]"]) == 0
    folder = only(tmp_path / "runs", "finetune") / "tags"
    scores = json.loads((folder / "scores.json").read_text())
    assert (
        scores["labels"] == ["a", "of", "the"]
        and scores["metric"] == "f1"
        and set(scores["summary"]) == {"model", "majority"}
    )
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and len(config["id2label"]) == 3
    predicted = lines(folder / "runs" / "model-seed-1" / "predictions-validation.jsonl")
    assert scores["runs"][0]["scores"]["subset_accuracy"] == np.mean([x["prediction"] == x["label"] for x in predicted])
    classify = pipeline("text-classification", model=str(folder / "model"), top_k=None)
    for line in predicted:
        answer = {one["label"]: one["score"] for one in classify([rows[line["id"]]["body"]])[0]}
        expected = dict(zip(scores["labels"], (1 / (1 + np.exp(-np.array(line["logits"])))).tolist(), strict=True))
        assert answer == pytest.approx(expected, abs=1e-5)
        assert {name for name, value in answer.items() if value > 0.5} == set(line["prediction"])


def test_validation_without_labels_is_predicted_by_the_last_epoch(flags, tmp_path, capsys):
    rows = [{"body": body, "topic": "ab"["the" in body.split()]} for body in sentences(40)]
    data = {"train": write_csv(tmp_path / "a.csv", rows), "test": write_csv(tmp_path / "b.csv", rows[:9])}
    data["validation"] = write_csv(tmp_path / "c.csv", [row | {"topic": -1} for row in rows[:9]])
    task = {"kind": "classification", "text": "body", "label": "topic", "data": {s: str(p) for s, p in data.items()}}
    command = ["finetune", *flags, "--finetune.task", json.dumps(task), "--finetune.baselines", "[majority]"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "a validation: 9 examples, 9 without labels so predicted but not scored\n" in printed
    assert "not scored: no labels" in printed
    folder = only(tmp_path / "runs", "finetune") / "a"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["summary"]["model"]["median"] is None and scores["runs"][0]["best_epoch"] == 2
    assert set(scores["runs"][0]["scores"]) == {"test_accuracy", "test_macro_f1"}, "test has labels"
    run = folder / "runs" / "model-seed-1"
    assert [x["prediction"] for x in lines(run / "predictions-validation.jsonl")] == [
        x["prediction"] for x in lines(run / "predictions-test.jsonl")
    ]
    assert (folder / "model" / "config.json").is_file()
    assert main(["all", *command[1:], "--publish.task", "a"]) == 0, "report and card do without scores"
    card = ModelCard.load(only(tmp_path / "runs", "publish") / "model" / "README.md").data.to_dict()
    (entry,) = card["model-index"][0]["results"]
    assert entry["dataset"]["split"] == "test" and [one["type"] for one in entry["metrics"]] == ["accuracy", "f1"]
    capsys.readouterr()
    assert main([*command, "--finetune.lr", "[1e-3, 1e-2]"]) == 2
    assert "a: validation has no labels, so nothing says which of several values is best" in capsys.readouterr().err


def test_tags_to_predict_alone(checkpoint, tmp_path, capsys):
    """Validation of which no word is labelled: a run, its files, but no scores."""
    rows = [{"words": text.split(), "tags": ["O" if n % 2 else "B-X" for n, _ in enumerate(text.split())]}
            for text in sentences(20)]  # fmt: skip
    for name, kept in (("train", rows), ("validation", [row | {"tags": None} for row in rows[:5]])):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    task = {"kind": "tokens", "text": "words", "label": "tags", "data": str(tmp_path / "own")}
    given = ["--finetune.model", str(checkpoint), "--finetune.seeds", "1", "--finetune.epochs", "1"]
    given += ["--finetune.max_length", "40", "--runtime.root", str(tmp_path / "runs"), "--runtime.progress", "false"]
    assert main(["finetune", *given, "--finetune.task", json.dumps(task)]) == 0
    assert "own validation: 5 examples, 5 without labels so predicted but not scored" in capsys.readouterr().out
    run = only(tmp_path / "runs", "finetune") / "own" / "runs" / "model-seed-1"
    assert all("label" not in row and len(row["prediction"]) == len(row["text"])
               for row in lines(run / "predictions-validation.jsonl"))  # fmt: skip
    assert (run / "predictions-validation.conll").read_text().count("\n\n") == 4


def test_ids_of_any_type_are_written(flags, tmp_path):
    """They used to fail behind the training, when predictions were written."""
    rows = sentences(24)
    days = [datetime(2026, 1, 1) + timedelta(days=number) for number in range(24)]
    table = pa.table({"id": days, "body": rows, "topic": ["ab"["the" in row.split()] for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    task = {"kind": "classification", "text": "body", "label": "topic", "data": str(tmp_path / "a.parquet")}
    assert main(["finetune", *flags, "--finetune.task", json.dumps(task)]) == 0
    run = only(tmp_path / "runs", "finetune") / "a" / "runs" / "model-seed-1"
    assert {row["id"] for row in lines(run / "predictions-validation.jsonl")} < set(map(str, days))


def test_a_head_for_other_labels_is_replaced_and_that_is_told(flags, tmp_path, capsys):
    """The model of one task as the start of another, and as it is."""
    rows = [{"body": body, "topic": "abc"[n % 3]} for n, body in enumerate(sentences(24))]
    task = {
        "kind": "classification",
        "text": "body",
        "label": "topic",
        "data": str(write_csv(tmp_path / "x.csv", rows)),
    }
    assert main(["finetune", *flags, "--finetune.task", json.dumps(task)]) == 0
    model = only(tmp_path / "runs", "finetune") / "x" / "model"
    two = task | {"data": str(write_csv(tmp_path / "y.csv", [row | {"topic": row["topic"] == "a"} for row in rows]))}
    again = ["finetune", *flags, "--finetune.model", str(model), "--finetune.task", json.dumps(two)]
    kernels.say_once.cache_clear()
    capsys.readouterr()
    assert main([*again, "--runtime.root", str(tmp_path / "second")]) == 0
    assert (
        "its head is for other labels (classifier.bias [3], here [2]); a new one is trained" in capsys.readouterr().out
    )
    assert main([*again, "--runtime.root", str(tmp_path / "third"), "--finetune.epochs", "0"]) == 2
    assert "is for other labels (classifier.bias [3], here [2])" in capsys.readouterr().err


def test_a_text_longer_than_the_model_and_a_pair_of_which_one_side_fits(checkpoint, tmp_path):
    """finetune.max_length can't exceed the model's positions; what is longer is cut from the longer side."""
    rows = [{"a": "array " * (200 + n), "b": "the list", "c": str(n % 2)} for n in range(8)]
    path = str(write_csv(tmp_path / "x.csv", rows))
    data = {"train": path, "validation": path}
    task = TaskConfig(kind="classification", data=data, text=["a", "b"], label="c", name="x")
    with pytest.raises(ConfigError, match=r"finetune\.max_length: 64 exceeds the model's 48 positions; use at most 48"):
        settings = FinetuneConfig(task=task, max_length=64)
        training.build(training.prepare("x", settings, str(checkpoint)), settings, "model", 1)
    job = training.prepare("x", FinetuneConfig(task=task, max_length=48), str(checkpoint))
    ids = job.encoded["train"].examples.input_ids
    assert {len(one) for one in ids} == {48} and job.encoded["train"].num_truncated == 8
    assert job.tokenizer.decode(ids[0]).endswith("array [SEP] the list [SEP]"), "the short side is whole"


# --- checkpoints whose tokenizer is another's ------------------------------------------------------------------------


def built(folder: Path, tmp_path: Path):
    rows = [{"a": body, "c": str(n % 2)} for n, body in enumerate(sentences(8))]
    task = TaskConfig(kind="classification", data=str(write_csv(tmp_path / "x.csv", rows)), text="a", label="c")
    settings = Config(finetune={"task": task, "max_length": 16}).finetune
    job = training.prepare("x", settings, str(folder))
    return job, training.build(job, settings, "model", 1)


def changed(checkpoint: Path, folder: Path, file: str, change) -> Path:
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    (folder / "vocab.txt").unlink()
    return folder


def test_a_tokenizer_with_ids_beyond_the_models_rows(checkpoint, tmp_path):
    """By its highest id, not by how many it has."""
    folder = changed(checkpoint, tmp_path / "m", "tokenizer.json", lambda c: c["model"]["vocab"].update(shape=999))
    with pytest.raises(ConfigError, match=r"its tokenizer has 1000 entries but the model only \d+ rows; they are"):
        built(folder, tmp_path)


def test_a_tokenizer_that_pads_with_another_id(checkpoint, tmp_path):
    folder = changed(checkpoint, tmp_path / "m", "config.json", lambda c: c.update(pad_token_id=3))
    with pytest.raises(ConfigError, match=r"pads with id 0, its config\.json says 3; put the model's own tokenizer"):
        built(folder, tmp_path)


def test_no_tokenizer_files(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"finetune\.model: .*m' holds no tokenizer|no tokenizer can be loaded from"):
        built(folder, tmp_path)


def test_a_tokenizer_far_smaller_than_the_model_is_told_of(checkpoint, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    model = BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)
    job, model = built(folder, tmp_path)
    start_checks.tell_of_small(str(folder), job.tokenizer, model)
    printed = capsys.readouterr().out
    assert f"m: its tokenizer has {len(job.tokenizer)} entries, the model 200 rows; is it the model's own?" in printed
    job, model = built(checkpoint, tmp_path)
    start_checks.tell_of_small(str(checkpoint), job.tokenizer, model)
    assert capsys.readouterr().out == ""


def test_real_data_as_csv_scores_as_the_row_of_the_table(flags, real_data, tmp_path):
    """SST-2 through a csv: the same logits, to the bit, and the same score."""
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    data = {}
    for split, count in (("train", 200), ("validation", 100)):
        table = pq.read_table(real_data / "glue" / "sst2" / f"{split}.parquet").slice(0, count)
        pq.write_table(table, tmp_path / "glue" / "sst2" / f"{split}.parquet")
        data[split] = str(write_csv(tmp_path / f"{split}.csv", table.to_pylist()))
    task = {"kind": "classification", "data": data, "text": "sentence", "label": "label", "name": "own"}
    own = ["--finetune.tasks", "sst2", "--finetune.data", str(tmp_path / "glue"), "--finetune.task", json.dumps(task)]
    assert main(["finetune", *flags, *own]) == 0
    folder = only(tmp_path / "runs", "finetune")
    tables = json.loads((folder / "scores.json").read_text())["tasks"]
    assert list(tables) == ["sst2", "own"] and tables["own"]["labels"] == ["0", "1"]
    row, mine = (lines(folder / name / "runs" / "model-seed-1" / "predictions-validation.jsonl") for name in tables)
    assert len(row) == 100 and [line["logits"] for line in row] == [line["logits"] for line in mine]
    scores = {name: table["runs"][0]["scores"]["accuracy"] for name, table in tables.items()}
    assert scores["sst2"] == scores["own"]
