"""Test predictions in the scorers' formats: files, columns, names of labels, order."""

import csv
import json
from pathlib import Path

import pytest

from bertpipe.downstream.finetuning import submission
from bertpipe.downstream.tasks.tasks import TASKS
from tests.downstream.tuning import scores, tune


def make(folder: Path, task: str, rows: dict[str, list[dict]], labels: list[str] | None) -> dict:
    """What the stage leaves of a task: predictions of splits, and its part of scores.json."""
    run = folder / task / "runs" / "model-seed-3"
    run.mkdir(parents=True)
    for split, lines in rows.items():
        (run / f"predictions-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [
        {"init": init, "seed": seed, "folder": f"{task}/runs/{init}-seed-{seed}"}
        for init in ("scratch", "model")
        for seed in (2, 3)
    ]
    return {"runs": runs, "model_seed": 3, "labels": labels}


def answers(*predictions) -> list[dict]:
    return [{"id": number, "prediction": prediction} for number, prediction in enumerate(predictions)]


@pytest.mark.parametrize(
    ("task", "split", "labels", "rows", "name", "text"),
    [
        ("cola", "test", ["unacceptable", "acceptable"], answers("acceptable", "unacceptable"), "CoLA.tsv",
         "index\tprediction\n0\t1\n1\t0\n"),
        ("wnli", "test", ["not_entailment", "entailment"], answers("entailment"), "WNLI.tsv",
         "index\tprediction\n0\t1\n"),
        ("rte", "test", ["entailment", "not_entailment"], answers("not_entailment", "entailment"), "RTE.tsv",
         "index\tprediction\n0\tnot_entailment\n1\tentailment\n"),
        ("mnli", "test_mismatched", ["entailment", "neutral", "contradiction"], answers("neutral"), "MNLI-mm.tsv",
         "index\tprediction\n0\tneutral\n"),
        ("mnli", "ax", ["entailment", "neutral", "contradiction"], answers("contradiction"), "AX.tsv",
         "index\tprediction\n0\tcontradiction\n"),
        ("stsb", "test", None, answers(-0.25, 2.34567, 7), "STS-B.tsv",
         "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"),
        ("boolq", "test", ["False", "True"], answers("True", "False"), "BoolQ.jsonl",
         '{"idx": 0, "label": "true"}\n{"idx": 1, "label": "false"}\n'),
        ("copa", "test", None, answers(1), "COPA.jsonl", '{"idx": 0, "label": 1}\n'),
        ("cb", "test", ["entailment", "contradiction", "neutral"], answers("neutral"), "CB.jsonl",
         '{"idx": 0, "label": "neutral"}\n'),
    ],
)  # fmt: skip
def test_each_task_in_its_scorers_format(tmp_path, task, split, labels, rows, name, text):
    told = submission.write(tmp_path, {task: make(tmp_path, task, {split: rows}, labels)})
    assert (tmp_path / "submission" / name).read_text() == text
    assert told[0] == f"submission/: {name}"


def test_rows_are_in_order_of_their_index_and_numbered_where_it_is_none(tmp_path):
    labels = ["negative", "positive"]
    shuffled = [{"id": number, "prediction": labels[number == 2]} for number in (2, 0, 1)]
    gaps = [{"id": number, "prediction": labels[number == 9]} for number in (4, 9)]
    tables = {
        "sst2": make(tmp_path, "sst2", {"test": shuffled}, labels),
        "qqp": make(tmp_path, "qqp", {"test": gaps}, labels),
    }
    submission.write(tmp_path, tables)
    assert (tmp_path / "submission/SST-2.tsv").read_text() == "index\tprediction\n0\t0\n1\t0\n2\t1\n"
    assert (tmp_path / "submission/QQP.tsv").read_text() == "index\tprediction\n0\t0\n1\t1\n"


def test_a_command_writes_them_and_names_what_is_missing(trial, tmp_path, capsys):
    import shutil

    start = Path(shutil.copytree(trial, tmp_path / "start"))
    (start / "glue/cola/test.parquet").unlink()
    folder = tune(start, tmp_path / "runs", tasks=["rte", "cola", "stsb"])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (folder / "submission").iterdir()) == ["RTE.tsv", "STS-B.tsv"]
    assert "submission/: STS-B.tsv, RTE.tsv\nnothing to submit, as there are no predictions: cola (test)\n" in printed
    assert "GLUE's scorer also wants CoLA.tsv, SST-2.tsv, MRPC.tsv, QQP.tsv, MNLI-m.tsv" in printed
    with (folder / "submission/RTE.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    task = scores(folder)["rte"]
    best = next(run for run in task["runs"] if run["seed"] == task["model_seed"])
    lines = [json.loads(line) for line in (folder / best["folder"] / "predictions-test.jsonl").open()]
    assert [(row["index"], row["prediction"]) for row in rows] == [(str(x["id"]), x["prediction"]) for x in lines]


def test_every_task_of_glue_has_a_file():
    glue = {(name, split) for name, task in TASKS.items() if task.source == "glue" for split in task.predicted}
    assert glue <= submission.FILES.keys()


def test_without_a_task_of_the_benchmarks_nothing_is_written_or_said(tmp_path):
    assert submission.write(tmp_path, {"docs": make(tmp_path, "docs", {"test": answers("numpy")}, ["numpy"])}) == []
    assert not (tmp_path / "submission").exists()
