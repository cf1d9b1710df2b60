"""Runs of every form of task, trained by the command, read back from what they wrote: the scores made anew are those of
scores.json to the last bit, the report shows each, and two checkpoints are compared on all."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertpipe.cli import main
from bertpipe.config import Config
from bertpipe.downstream.reporting import compare, report, runs
from bertpipe.downstream.tasks.kinds import KINDS
from tests.downstream.conftest import TEXT
from tests.downstream.test_answers import article, official, question
from tests.downstream.test_choices import scenes
from tests.downstream.test_tokens import invented
from tests.downstream.tuning import write_checkpoint, write_task
from tests.runs import only

TASKS = {
    "sst2": "classification",
    "stsb": "regression",
    "swag": "choices",
    "wnut17": "tokens",
    "squad_v2": "answers",
    "topics": "multi_label",
}
NUM = 30


def write_data(folder: Path) -> list[str]:
    """Small data of every form below `folder`; the flags that name them."""
    draw, words = random.Random(0), TEXT.split()
    write_task(folder, "sst2")
    write_task(folder, "stsb")
    for name, rows in (("swag", scenes), ("wnut17", lambda size: invented(size, size))):
        for split, size in (("train", 40), ("validation", NUM)):
            (folder / name).mkdir(exist_ok=True)
            pq.write_table(pa.table(rows(size)), folder / name / f"{split}.parquet")
    for split, size in (("train", 40), ("dev", NUM // 2)):
        paragraphs = []
        for row in range(size):
            context = [*draw.choices([word for word in words if word != "shape"], k=9), "shape"]
            span = ("shape", len(" ".join([*context[:-1], ""])))
            asked = [question(f"{split}{row}", "the given", span), question(f"{split}{row}-none", "no names")]
            paragraphs.append((" ".join(context), asked))
        official(folder / "squad_v2" / f"{split}-v2.0.json", article("x", *paragraphs))
    texts = [" ".join(draw.choices(words, k=6)) for _ in range(60)]
    tags = [[word for word in ("the", "of", "array") if word in text.split()] for text in texts]
    pq.write_table(pa.table({"text": texts, "tags": tags}), folder / "mine.parquet")
    own = {"kind": "multi_label", "data": str(folder / "mine.parquet"), "text": "text", "label": "tags"}
    return ["--finetune.task", json.dumps(own | {"name": "topics"}), "--finetune.data", str(folder)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Two artifacts: two checkpoints, each on a task of every form."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data")
    made = []
    for name, seeds in (("a", "1"), ("b", "2")):
        model = write_checkpoint(folder / name)
        arguments = [*data, "--finetune.model", str(model), "--finetune.seeds", seeds, "--finetune.epochs", "1"]
        arguments += ["--finetune.lr", "1e-2" if name == "a" else "1e-3", "--finetune.precision", "fp32"]
        arguments += ["--finetune.max_length", "32", "--finetune.max_query_length", "4", "--finetune.batch_size", "16"]
        arguments += ["--runtime.root", str(folder / f"runs-{name}"), "--runtime.progress", "false"]
        arguments += ["--runtime.threads", "1", "--finetune.tasks", *(task for task in TASKS if task != "topics")]
        assert main(["finetune", *arguments]) == 0
        made.append(only(folder / f"runs-{name}", "finetune"))
    return made


def test_there_is_a_task_of_every_form():
    assert set(TASKS.values()) == set(KINDS)


@pytest.mark.parametrize("name", TASKS)
def test_predictions_make_the_scores(trained, name):
    for folder, num_runs in zip(trained, (1, 2), strict=True):
        found = list(runs.find(folder / name))
        assert [run.seed for run in found] == [1, 2][:num_runs]
        for run in found:
            assert (run.task.name, run.task.kind) == (name, TASKS[name])
            lines = run.lines("validation")
            assert all(line["text"] for line in lines)
            assert run.kind.score(run.task, *run.parse(lines)) == run.result["scores"]


def test_every_task_is_compared(trained):
    rows = {row.task: row for row in compare.compare(*trained, 200)}
    assert set(rows) == set(TASKS)
    for name, row in rows.items():
        best = [runs.best(runs.find(folder / name)) for folder in trained]
        assert (row.score_a, row.score_b) == tuple(run.headline() for run in best)
        assert row.difference.lowest <= row.difference.value <= row.difference.highest
        assert row.num_resamples == 200 and row.seeds is None
        right = [{line["id"] for line in run.lines("validation") if runs.is_right(line)} for run in best]
        if name == "stsb":
            assert row.only_a is None
        else:
            assert (row.only_a, row.only_b) == (len(right[0] - right[1]), len(right[1] - right[0]))
    assert len(list(compare.table(*trained, list(rows.values())))) == 3 + len(TASKS) + 1


def test_the_report_shows_every_task(trained, tmp_path):
    report.run(Config(), {"finetune": trained[1]}, tmp_path, {})
    facts = json.loads((tmp_path / "report.json").read_text())["understanding"]
    page = (tmp_path / "report.html").read_text()
    assert set(facts) == set(TASKS)
    for number, name in enumerate(facts):
        assert f'<h3 class="task">{name}</h3>' in page
        assert f'id="figure-task{number}_loss"' in page and f'id="figure-task{number}_length"' in page
        assert facts[name]["mistakes"] and facts[name]["num_examples"] >= 6
