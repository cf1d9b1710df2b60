"""SQuAD from real files to official predictions: what is read, what is refused, and a whole run by the command."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForMaskedLM

from bertpipe.cli import main
from bertpipe.config import Config
from bertpipe.downstream.finetuning import training
from bertpipe.downstream.reporting import compare, runs
from bertpipe.downstream.reporting.understanding import understand
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.tasks.kinds.answers import Gold
from bertpipe.downstream.tasks.squad_metric import normalize
from bertpipe.errors import ConfigError, DataError
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.launch import launch
from tests.runs import only

NILE = "The river Nile is in Africa. The Nile is long."


def question(name, text, *answers, **more):
    """`answers`: (text, answer_start)"""
    return {"id": name, "question": text, "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


def article(title, *paragraphs):
    """`paragraphs`: (context, [questions])"""
    return {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs]}


def official(path: Path, *articles) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False), encoding="utf-8")
    return path


def parquet(path: Path, **columns) -> Path:
    """The Hub's columns; `columns` replaces some, None takes one away."""
    answers = [{"text": ["Africa"], "answer_start": [21]}, {"text": ["long", "Nile"], "answer_start": [41, 33]}]
    rows = {"id": ["a", "b"], "title": ["Nile"] * 2, "context": [NILE] * 2, "question": ["Where?", "How long?"]}
    rows = {name: value for name, value in (rows | {"answers": answers} | columns).items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


GOOD = article(
    "Nile", (NILE, [question("a", "Where?", ("Africa", 21)), question("b", "How?", ("long", 41), ("Nile", 33))])
)


def failure(data: Path, task: str = "squad") -> str:
    """The one line that loading fails with."""
    with pytest.raises(DataError) as caught:
        tasks.load(task, str(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- good data --------------------------------------------------------------------------------------------------------


def test_json_and_parquet_give_the_same(tmp_path):
    for split in ("train", "validation"):
        parquet(tmp_path / "hub" / "squad" / f"{split}.parquet", question=["Where?", "How?"])
    official(tmp_path / "json" / "squad" / "train-v1.1.json", GOOD)
    official(tmp_path / "json" / "squad" / "dev-v1.1.json", GOOD)
    splits = tasks.load("squad", str(tmp_path / "json"))
    assert splits == tasks.load("squad", str(tmp_path / "hub"))
    assert splits == tasks.load("squad", str(tmp_path / "json" / "squad")), "the files' own folder"
    assert list(splits) == ["train", "validation"]
    assert splits["train"].texts == [("Where?", NILE), ("How?", NILE)] and splits["train"].ids == ["a", "b"]
    assert splits["train"].labels == [[Gold("Africa", 21, 27)], [Gold("long", 41, 45), Gold("Nile", 33, 37)]]
    assert splits["train"].label_names is None and splits["train"].counts == {}


def test_no_answer_is_one_for_squad_v2_alone(tmp_path):
    plausible = question("c", "Who?", is_impossible=True, plausible_answers=[{"text": "Nile", "answer_start": 10}])
    given = question("d", "Who?", ("Nile", 10), is_impossible=True)
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        official(tmp_path / name, GOOD, article("Who", (NILE, [plausible, given])))
    splits = tasks.load("squad_v2", str(tmp_path))
    assert [len(golds) for golds in splits["validation"].labels] == [1, 2, 0, 0]
    assert "question 'c' has no answer; remove it, or take the task squad_v2" in failure(tmp_path)


@pytest.mark.parametrize("answers", [None, [None, None], [{"text": [], "answer_start": []}] * 2])
@pytest.mark.parametrize("task", ["squad", "squad_v2"])
def test_a_test_split_without_answers_is_predicted_only(tmp_path, task, answers):
    parquet(tmp_path / task / "train.parquet")
    parquet(tmp_path / task / "validation.parquet")
    parquet(tmp_path / task / "test.parquet", answers=answers)
    assert tasks.load(task, str(tmp_path))["test"].labels is None


def test_without_ids_questions_are_called_by_their_rows(tmp_path):
    for split in ("train", "validation"):
        parquet(tmp_path / "squad" / f"{split}.parquet", id=None)
    assert tasks.load("squad", str(tmp_path))["train"].ids == [0, 1]


def test_a_test_json_without_answers(tmp_path):
    bare = {"title": "x", "paragraphs": [{"context": NILE, "qas": [{"id": "t", "question": "Where?"}]}]}
    for name, content in (("train.json", GOOD), ("dev.json", GOOD), ("test.json", bare)):
        official(tmp_path / name, content)
    split = tasks.load("squad", str(tmp_path))["test"]
    assert split.labels is None and split.ids == ["t"]


def test_empty_texts_are_kept_and_said(tmp_path):
    odd = article("x", (NILE, [question("a", " ", ("long", 41))]), ("", [question("b", "Where?")]))
    official(tmp_path / "train.json", odd)
    official(tmp_path / "dev.json", odd)
    split = tasks.load("squad_v2", str(tmp_path))["train"]
    assert len(split) == 2 and split.counts == {"with_an_empty_text": 2}


CONTEXT = "Moss grows here.  Moss and\u00a0fern\ngrow. " + "x " * 60 + "The fern is old."


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("Moss", 18, "Moss"),
        ("Moss", 20, "Moss"),  # nearer to the second
        ("Moss and fern grow.", 0, "Moss and\u00a0fern\ngrow."),  # white space, and the only one
        ("The fern", -1, "The fern"),
        ("old", 10**9, "old"),
        ("fern", len(CONTEXT) - 20, "fern"),
    ],
)
def test_an_answer_is_moved_to_where_it_stands(tmp_path, text, start, found):
    content = article("x", (CONTEXT, [question("a", "?", (text, start))]))
    official(tmp_path / "train.json", content)
    official(tmp_path / "dev.json", content)
    split = tasks.load("squad", str(tmp_path))["train"]
    ((gold,),) = split.labels
    assert gold.text == text and CONTEXT[gold.start : gold.end] == found
    others = [i for i in range(len(CONTEXT)) if CONTEXT.startswith(found, i)]
    assert gold.start == min(others, key=lambda i: abs(i - start))
    assert split.counts == ({} if gold.start == start else {"answers_moved_to_where_their_text_is": 1})


# --- one file ---------------------------------------------------------------------------------------------------------


def many(path: Path, num_articles: int, num_paragraphs: int = 2) -> Path:
    """Of each article some paragraphs with two questions."""
    return official(
        path,
        *(
            article(
                f"title {a}",
                *(
                    (f"{a} {p} word", [question(f"{a}-{p}-{q}", "Which?", ("word", 4)) for q in range(2)])
                    for p in range(num_paragraphs)
                ),
            )
            for a in range(num_articles)
        ),
    )


def test_one_file_is_divided_by_articles(tmp_path):
    path = many(tmp_path / "questions.json", 9)
    splits = tasks.load("squad", str(path))
    articles = {split: {name.split("-")[0] for name in rows.ids} for split, rows in splits.items()}
    assert not articles["train"] & articles["validation"] and len(articles["train"] | articles["validation"]) == 9
    assert len(articles["validation"]) == 2 and len(splits["validation"]) == 8 and len(splits["train"]) == 28
    assert splits["validation"].counts == {"articles_held_out_of_the_only_file": 2} and splits["train"].counts == {}
    assert splits == tasks.load("squad", str(tmp_path)), "and the same if its folder is given"
    assert "test" not in splits


def test_few_articles_are_divided_by_paragraphs(tmp_path):
    splits = tasks.load("squad_v2", str(many(tmp_path / "one.json", 1, 6)))
    contexts = {split: {context for _, context in rows.texts} for split, rows in splits.items()}
    assert not contexts["train"] & contexts["validation"] and len(contexts["validation"]) == 2
    assert splits["validation"].counts["paragraphs_held_out_of_the_only_file"] == 2
    assert "one paragraph can't be for training and for validation" in failure(many(tmp_path / "one.json", 1, 1))


def test_nothing_trained_is_nothing_divided(tmp_path):
    path = many(tmp_path / "questions.json", 9)
    splits = tasks.load("squad", str(path), train=False)
    assert list(splits) == ["validation"] and len(splits["validation"]) == 36
    assert splits["validation"].counts == {}
    official(tmp_path / "train.json", GOOD)
    path.rename(tmp_path / "dev.json")
    (tmp_path / "train.json").write_text("damaged")
    assert len(tasks.load("squad", str(tmp_path), train=False)["validation"]) == 36, "the training file is not read"


def test_identity_follows_the_files_that_are_read(tmp_path):
    official(tmp_path / "train.json", GOOD)
    many(tmp_path / "dev.json", 3)
    both, one = (tasks.identify(["squad"], str(tmp_path), train=train) for train in (True, False))
    assert both != one
    many(tmp_path / "train.json", 2)
    assert tasks.identify(["squad"], str(tmp_path)) != both
    assert tasks.identify(["squad"], str(tmp_path), train=False) == one


# --- bad data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"data": [\n{"title": }]}', "not JSON at line 2, column 11 (character 21): Expecting value"),
        (b"", "not JSON at line 1, column 1 (character 0): Expecting value"),
        (b'{"data": [{"title": "caf\xe9"}]}', "byte 24 is not UTF-8; write the file again as UTF-8"),
        (b"[" * 100_000, "not readable as JSON (maximum recursion depth exceeded"),
        (b"[]", "no list 'data'; SQuAD's layout is data[].paragraphs[]"),
        (b'{"data": {"id": 1}}', "no list 'data'"),
        (b'{"data": [{"context": "x", "question": "y"}]}', "data[0]: no list 'paragraphs'"),
        (b'{"data": [3]}', "data[0]: no list 'paragraphs'"),
        (b'{"data": [{"paragraphs": [{"qas": []}]}]}', "data[0].paragraphs[0]: no text 'context'"),
        (b'{"data": [{"paragraphs": [{"context": "x"}]}]}', "data[0].paragraphs[0]: no list 'qas'"),
        (b'{"data": []}', "no rows"),
    ],
)
def test_a_file_that_is_not_squad(tmp_path, content, said):
    path = tmp_path / "dev.json"
    path.write_bytes(content)
    assert failure(path).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": 3}, ": no text 'id'"),
        ({"question": None}, ": no text 'question'"),
        ({"question": "\ud83d?"}, ": 'question' holds half a character at 0"),
        ({"answers": "long"}, ": no list 'answers'"),
        ({"answers": [{"text": "long"}]}, ".answers[0]: no whole number 'answer_start'"),
        ({"answers": [{"text": "long", "answer_start": "41"}]}, ".answers[0]: no whole number 'answer_start'"),
        ({"answers": [{"text": "long", "answer_start": True}]}, ".answers[0]: no whole number 'answer_start'"),
        ({"answers": [{"text": "long", "answer_start": 2**70}]}, ".answers[0]: 'answer_start' is 1180591620"),
        ({"answers": ["long"]}, ".answers[0]: no text 'text'"),
    ],
)
def test_a_question_that_is_not_squad(tmp_path, changes, said):
    path = tmp_path / "x.json"
    wrong = question("b", "How?", ("long", 41)) | changes
    content = {"data": [article("x", (NILE, [question("a", "Where?", ("Africa", 21)), wrong]))]}
    path.write_text(json.dumps(content))
    assert failure(path).startswith(f"{path}: data[0].paragraphs[0].qas[1]{said}")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (("Amazon", 4), "its answer 'Amazon' is not in the context; correct or remove it"),
        (("africa", 21), "its answer 'africa' is not in the context"),
        (("Nile", 900), "its answer 'Nile' is 2 times in the context, nowhere near answer_start 900; correct that"),
        ((" ", 3), "an answer is empty; leave answers empty where there is none"),
    ],
)
def test_an_answer_that_is_not_in_its_context(tmp_path, answer, said):
    path = official(tmp_path / "x.json", GOOD, article("y", (NILE, [question("bad", "Where?", answer)])))
    for task in ("squad", "squad_v2"):
        assert failure(path, task).startswith(f"{path}: question 'bad': {said}")


@pytest.mark.parametrize("column", ["question", "context", "answers"])
def test_a_missing_column(tmp_path, column):
    parquet(tmp_path / "squad" / "train.parquet", **{column: None})
    parquet(tmp_path / "squad" / "validation.parquet")
    assert f"train.parquet: no column '{column}'; it has" in failure(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answers": ["Africa", "long"]}, "column 'answers' holds string, not the lists text and answer_start"),
        (
            {"answers": [{"text": ["Africa"]}] * 2},
            "column 'answers' holds struct<text: list<element: string>>, not the",
        ),
        (
            {"answers": [{"text": "Africa", "answer_start": 21}] * 2},
            "column 'answers' holds struct<text: string, answe",
        ),
        (
            {"answers": [{"text": ["Africa"], "answer_start": [21]}, {"text": ["long"], "answer_start": []}]},
            "row 1: column 'answers' needs a whole number in answer_start for each text",
        ),
        ({"answers": [{"text": ["Africa"], "answer_start": [21]}, None]}, "question 'b' has no answer"),
        ({"id": ["a", "a"]}, "row 1: column 'id' is 'a', not an id of this question alone"),
        ({"id": ["a", None]}, "row 1: column 'id' is null"),
        ({"context": [NILE, None]}, "row 1: column 'context' is null"),
        ({"question": [1, 2]}, "column 'question' holds int64, not text"),
    ],
)
def test_a_table_that_is_not_squad(tmp_path, columns, said):
    parquet(tmp_path / "squad" / "train.parquet")
    parquet(tmp_path / "squad" / "validation.parquet", **columns)
    assert f"validation.parquet: {said}" in failure(tmp_path)


def test_files_that_are_missing_or_double(tmp_path):
    assert f"{tmp_path}/nowhere: no such file or folder" in failure(tmp_path / "nowhere")
    assert f"{tmp_path}: no file train* (.json or .parquet), which squad needs for train" in failure(tmp_path)
    for name in ("train-v1.1.json", "train-v2.0.json", "dev-v1.1.json"):
        official(tmp_path / "squad" / name, GOOD)
    assert "train-v1.1.json and train-v2.0.json both look like train; keep one of them" in failure(tmp_path)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a masked-LM checkpoint, model/, and SQuAD 2.0 JSON of long contexts, data/."""
    folder, draw = tmp_path_factory.mktemp("start"), random.Random(0)
    tokenizer = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.3}  # so that tokens get logits of their own
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")

    def paragraph(split, number):
        """Of two questions the one for the shape has an answer."""
        words = draw.choices([word for word in TEXT.split() if word != "shape"], k=draw.randint(4, 60))
        place = draw.randrange(len(words))
        words[place] = "shape"
        span = ("shape", len(" ".join([*words[:place], ""])))
        qas = [question(f"{split}-{number}", "the given type", span)]
        return " ".join(words), [*qas, question(f"{split}-{number}-none", "no names in module")]

    for split, size in (("train", 40), ("dev", 12)):
        official(folder / "data" / f"{split}-v2.0.json", article("x", *(paragraph(split, n) for n in range(size))))
    bare = article("x", *(paragraph("test", n) for n in range(3)))
    for row in bare["paragraphs"]:
        for asked in row["qas"]:
            del asked["answers"]
    official(folder / "data" / "test-v2.0.json", bare)
    return folder


ARGUMENTS = ["--finetune.max_length", "32", "--finetune.max_query_length", "4", "--finetune.seeds", "1"]
ARGUMENTS += ["--finetune.precision", "fp32", "--finetune.slots_per_step", "2", "--runtime.progress", "false"]
ARGUMENTS += ["--finetune.max_answer_length", "5", "--runtime.threads", "1"]


def finetune(*arguments) -> list[str]:
    return ["finetune", *ARGUMENTS, *map(str, arguments)]


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> Path:
    """The artifact of a run on squad_v2."""
    root = tmp_path_factory.mktemp("trained")
    options = ["--finetune.tasks", "squad_v2", "--finetune.data", start / "data", "--finetune.model", start / "model"]
    assert (
        main(
            finetune(
                *options,
                "--finetune.epochs",
                8,
                "--finetune.lr",
                1e-2,
                "--finetune.batch_size",
                8,
                "--runtime.root",
                root,
            )
        )
        == 0
    )
    return only(root, "finetune")


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def official_f1(prediction: str, golds: list[str]) -> float:
    """By the definition, with precision and recall."""
    scores = []
    for gold in golds or [""]:
        found, wanted = normalize(prediction).split(), normalize(gold).split()
        same = sum((Counter(found) & Counter(wanted)).values())
        precision, recall = same / max(1, len(found)), same / max(1, len(wanted))
        scores.append(2 * precision * recall / (precision + recall) if same else float(found == wanted))
    return max(scores)


def test_predictions_are_in_the_official_format_and_give_the_scores(start, trained):
    run = trained / "squad_v2" / "runs" / "model-seed-1"
    scores = read(run / "scores.json")["scores"]
    rows = [qa for part in read(start / "data" / "dev-v2.0.json")["data"][0]["paragraphs"] for qa in part["qas"]]
    predictions, odds = (read(run / f"predictions-validation.{ending}") for ending in ("json", "null_odds.json"))
    assert list(predictions) == list(odds) == [row["id"] for row in rows]
    golds = [[answer["text"] for answer in row["answers"]] for row in rows]
    assert scores["f1"] > 0.8, "it learns that shape is asked for"
    values = [official_f1(predictions[row["id"]], gold) for row, gold in zip(rows, golds, strict=True)]
    assert scores["f1"] == scores["best_f1"] == pytest.approx(np.mean(values))
    assert scores["NoAns_f1"] == pytest.approx(np.mean(values[1::2]))
    assert scores["HasAns_f1"] == pytest.approx(np.mean(values[::2]))
    threshold = scores["best_f1_thresh"]
    assert all((predictions[name] == "") == (odds[name] > threshold) for name in odds)
    assert 0 < sum(text == "" for text in predictions.values()) < len(odds), "the threshold tells them apart"
    lines = [json.loads(line) for line in (run / "predictions-validation.jsonl").open(encoding="utf-8")]
    assert {line["id"]: line["prediction"] for line in lines} == predictions
    assert [line["label"] for line in lines] == golds
    assert [line["f1"] for line in lines] == pytest.approx(values)
    assert len(read(run / "predictions-test.json")) == len(read(run / "predictions-test.null_odds.json")) == 6
    shown = [json.loads(line) for line in (run / "predictions-test.jsonl").open(encoding="utf-8")]
    assert len(shown) == 6 and "label" not in shown[0]


def test_the_saved_folder_answers_alike_with_stock_classes_alone(start, trained):
    """One window at a time through transformers; the best span by trying all."""
    run, folder = trained / "squad_v2" / "runs" / "model-seed-1", trained / "squad_v2" / "model"
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    lines = {x["id"]: x for x in map(json.loads, (run / "predictions-validation.jsonl").open(encoding="utf-8"))}
    num_windows = 0
    for part in read(start / "data" / "dev-v2.0.json")["data"][0]["paragraphs"]:
        for asked in part["qas"]:
            best, null = (-np.inf, ""), np.inf
            text = " ".join(asked["question"].split()[:4])
            options = {"truncation": "only_second", "max_length": 32, "stride": 10, "return_overflowing_tokens": True}
            windows = tokenizer([text], [part["context"]], return_offsets_mapping=True, **options)
            num_windows += len(windows["input_ids"])
            for w, ids in enumerate(windows["input_ids"]):
                with torch.no_grad():
                    types = torch.tensor([windows["token_type_ids"][w]])
                    out = model(input_ids=torch.tensor([ids]), token_type_ids=types)
                starts, ends = out.start_logits[0].numpy(), out.end_logits[0].numpy()
                null = min(null, starts[0] + ends[0])
                inside = [i for i, whose in enumerate(windows.sequence_ids(w)) if whose == 1]
                places = windows["offset_mapping"][w]
                for i in inside:
                    for j in range(i, min(i + 5, inside[-1] + 1)):
                        if starts[i] + ends[j] > best[0]:
                            best = (starts[i] + ends[j], part["context"][places[i][0] : places[j][1]])
            line = lines[asked["id"]]
            assert line["score"] == pytest.approx(best[0], abs=1e-4)
            assert line["null_odds"] == pytest.approx(null - best[0], abs=1e-4)
            assert line["answer"] == best[1] and line["prediction"] == ("" if line["withheld"] else best[1])
    assert num_windows > 40


def test_report_and_compare_read_the_run(trained):
    """The scores made anew of what it wrote are its scores."""
    (run,) = runs.find(trained / "squad_v2")
    lines = run.lines("validation")
    split, predicted = run.parse(lines)
    assert dict(run.kind.score(run.task, split, predicted)) == pytest.approx(run.result["scores"])
    uniform = np.ones((1, len(lines)), np.int64)
    assert run.kind.weighted(run.task, split, predicted)(uniform)[0] == pytest.approx(run.result["scores"]["f1"])
    facts = understand(trained / "squad_v2")
    assert facts["num_wrong"] == sum(line["exact"] == 0 for line in lines) == len(facts["mistakes"])
    assert sum(one["num"] for one in facts["by_length"]["bins"]) == len(lines)
    compared = compare.compare(trained, trained)
    assert [row.difference.value for row in compared] == [0.0] and compared[0].only_a == 0


def test_a_model_is_scored_as_it_is_alike_by_any_number_of_processes(start, trained, tmp_path, capsys):
    """`finetune.epochs: 0`, from the folder that training left; and no training file is needed."""
    data = tmp_path / "data"
    official(data / "dev-v2.0.json", *read(start / "data" / "dev-v2.0.json")["data"])
    options = ["--finetune.tasks", "squad_v2", "--finetune.data", data, "--finetune.epochs", "0", "--finetune.seeds", 3]
    options += ["--finetune.model", trained / "squad_v2" / "model", "--runtime.root"]
    assert main(finetune(*options, tmp_path / "one")) == 0
    launch(2, *finetune(*options, tmp_path / "two")).done()
    one, two = (only(tmp_path / name, "finetune") / "squad_v2" for name in ("one", "two"))
    before = trained / "squad_v2" / "runs" / "model-seed-1"
    for ending in ("json", "null_odds.json", "jsonl"):
        name = f"predictions-validation.{ending}"
        files = [(folder / "runs" / "model-seed-1" / name).read_bytes() for folder in (one, two)]
        assert files[0] == files[1] == (before / name).read_bytes()
    scores = read(one / "scores.json")
    assert scores["num_train"] == 0 and len(scores["runs"]) == 1 and scores["runs"][0]["best_epoch"] == 0
    assert scores["runs"][0]["scores"] == read(before / "scores.json")["scores"]
    assert (one / "model" / "model.safetensors").read_bytes() == (
        trained / "squad_v2" / "model" / "model.safetensors"
    ).read_bytes()


def test_answers_do_not_depend_on_how_windows_are_packed(start, trained, monkeypatch):
    settings = Config(
        finetune={"tasks": "squad_v2", "data": str(start / "data"), "max_length": 32, "max_answer_length": 5}
    ).finetune
    job = training.prepare("squad_v2", settings, str(trained / "squad_v2" / "model"))
    place = training.Place(Config(runtime={"threads": 1, "device": "cpu"}).runtime, "fp32")
    model = training.encoders.make_packed(training.build(job, settings, "model", 0))
    found = []
    for tokens in (40, 8_192):
        monkeypatch.setattr(training, "PREDICT_TOKENS", tokens)
        outputs = training.predict(job.head.module(model), job, "validation", place)
        found.append([(answer.text, round(answer.odds, 3)) for answer in job.decide("validation", outputs)])
    assert found[0] == found[1] and len(set(found[0])) > 10


def test_what_was_cut_and_moved_is_told(start, tmp_path, capsys):
    content = read(start / "data" / "dev-v2.0.json")["data"]
    asked = content[0]["paragraphs"][0]["qas"][0]
    asked["answers"][0]["answer_start"] += 1 if asked["answers"][0]["answer_start"] == 0 else -1
    asked["question"] = "a b c d e f g"
    content[0]["paragraphs"].append({"context": "the value of the function", "qas": [question("z", "?", ("value", 4))]})
    path = official(tmp_path / "mine.json", *content)
    options = ["--finetune.tasks", "squad_v2", "--finetune.data", path, "--finetune.model", start / "model"]
    assert main(finetune(*options, "--finetune.epochs", "1", "--runtime.root", tmp_path / "runs")) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"squad_v2 validation: \d+ examples, \d+ paragraphs held out of the only file, \d+ windows\n", said
    )
    told = r"squad_v2 train: \d+ examples, 1 answers moved to where their text is, 1 questions cut, \d+ windows\n"
    assert re.search(told, said)
    scores = read(only(tmp_path / "runs", "finetune") / "squad_v2" / "scores.json")
    assert scores["truncated"] == 1
    assert scores["counts"]["train"]["questions_cut"] == 1


def test_what_is_odd_in_one_file_is_counted_where_it_went(tmp_path):
    path = many(tmp_path / "questions.json", 9)
    content = read(path)
    for number, paper in enumerate(content["data"]):
        paper["paragraphs"][0]["qas"][0]["question"] = " "
        paper["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += number == 0
    path.write_text(json.dumps(content))
    train, validation = tasks.load("squad", str(path)).values()
    assert train.counts == {"with_an_empty_text": 7, "answers_moved_to_where_their_text_is": 1}
    assert validation.counts == {"with_an_empty_text": 2, "articles_held_out_of_the_only_file": 2}


def test_validation_without_answers_is_predicted(start, tmp_path, capsys):
    """With the threshold 0, as nothing says which is best."""
    data = tmp_path / "data"
    shutil.copytree(start / "data", data)
    shutil.copy(data / "test-v2.0.json", data / "dev-v2.0.json")
    options = ["--finetune.tasks", "squad_v2", "--finetune.data", data, "--finetune.model", start / "model"]
    assert main(finetune(*options, "--finetune.epochs", "1", "--runtime.root", tmp_path / "runs")) == 0
    said = capsys.readouterr().out
    assert "6 without labels so predicted but not scored" in said and "not scored: no labels" in said
    run = only(tmp_path / "runs", "finetune") / "squad_v2" / "runs" / "model-seed-1"
    rows = [json.loads(line) for line in (run / "predictions-validation.jsonl").open()]
    assert len(rows) == 6 and all(row["withheld"] == (row["null_odds"] > 0) for row in rows)
    assert read(run / "predictions-validation.json") == {row["id"]: row["prediction"] for row in rows}


def test_without_epochs_a_head_is_needed(start, tmp_path, capsys):
    options = ["--finetune.tasks", "squad_v2", "--finetune.data", start / "data", "--finetune.model", start / "model"]
    options += ["--finetune.epochs", "0", "--runtime.root", tmp_path]
    assert main(finetune(*options)) == 2
    said = capsys.readouterr().err
    assert "finetune.epochs: 0 scores a model as it is, but " in said
    assert "has no qa_outputs.bias, qa_outputs.weight" in said
    assert main(finetune(*options, "--finetune.baselines", "scratch")) == 2
    assert "finetune.baselines: with finetune.epochs: 0 nothing is trained" in capsys.readouterr().err


def test_a_family_without_such_a_head_is_refused_by_name(start, tmp_path):
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    tokenizer = write_tokenizer(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0, "mask_token_id": 4}
    EuroBertForMaskedLM(EuroBertConfig(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained(tmp_path)
    settings = Config(finetune={"data": str(start / "data"), "max_length": 32}).finetune
    job = training.prepare("squad_v2", settings, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no AutoModelForQuestionAnswering for eurobert models; offered are bert"):
        training.build(job, settings, "model", 0)


# --- real data --------------------------------------------------------------------------------------------------------


def test_every_gold_answer_of_xquad_can_be_found(real_data, tmp_path):
    """With logits that point at the gold answer, windows and decoding lose next to nothing."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=str(real_data / "vocab" / "bert-base-uncased-vocab.txt"))
    split = tasks.load("squad", str(real_data / "qa" / "xquad.en.json"), train=False)["validation"]
    assert len(split) == 1190
    kind, settings = KINDS["answers"], Config(finetune={"max_length": 128}).finetune
    encoded = kind.encode(split, tokenizer, settings)
    examples = encoded.examples
    assert len(examples) > 1_500 and examples.lengths.max() == 128 and encoded.counts == {"windows": len(examples)}
    first = np.append(0, np.cumsum(examples.lengths))
    logits = np.zeros((first[-1], 2), np.float32)
    logits[first[:-1] + examples.labels[:, 0], 0] = logits[first[:-1] + examples.labels[:, 1], 1] = 1
    scores = kind.score(tasks.get("squad"), split, kind.decide(split, encoded, Outputs(logits, first)))
    assert scores["exact"] > 0.99 and scores["f1"] > 0.99
