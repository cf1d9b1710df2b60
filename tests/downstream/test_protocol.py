"""How runs become a score: the grid, the best epoch, failed runs, the median and its spread, warm starts, the table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertpipe import artifact
from bertpipe.downstream.finetuning import cells, grid, published, summary, table, training
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.downstream.tasks.tasks import TASKS
from bertpipe.errors import ArtifactError, ConfigError
from bertpipe.pipeline import Pipeline
from tests.downstream.tuning import config, contents, scores, tune
from tests.launch import launch
from tests.runs import only

DIVERGING = 1e30


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gridded(trial, tmp_path_factory) -> tuple[Path, Path]:
    """A root and its artifact: two rates, one of which diverges, two seeds, and both baselines."""
    root = tmp_path_factory.mktemp("gridded")
    more = {"lr": [DIVERGING, 1e-2], "batch_size": 2, "baselines": ["majority", "scratch"]}
    return root, tune(trial, root, **more)


def test_every_point_is_scored_and_the_best_median_is_chosen(gridded):
    folder = gridded[1]
    task = scores(folder)["sst2"]
    runs = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("sst2/runs/*/scores.json")}
    names = [
        f"{init}-lr-{lr}-batch-2-epochs-1-seed-{s}"
        for init in ("model", "scratch")
        for lr in ("1e+30", "0.01")
        for s in (1, 2)
    ]
    assert sorted(runs) == sorted([*names, "majority-seed-1"])
    assert [(row["init"], row["lr"], row["chosen"]) for row in task["grid"]] == [
        ("model", 1e30, False), ("model", 0.01, True), ("scratch", 1e30, False), ("scratch", 0.01, True)
    ]  # fmt: skip
    for row in task["grid"]:
        own = {s: runs[f"{row['init']}-lr-{row['lr']}-batch-2-epochs-1-seed-{s}"] for s in (1, 2)}
        assert row["scores"] == {str(seed): run["scores"].get("accuracy") for seed, run in own.items()}
    assert {(run["init"], run.get("lr")) for run in task["runs"]} == {
        ("model", 0.01),
        ("scratch", 0.01),
        ("majority", None),
    }
    assert all((folder / run["folder"] / "scores.json").is_file() for run in task["runs"])
    assert task["summary"]["model"]["point"] == {"lr": 0.01, "batch_size": 2, "epochs": 1}
    best = max((run for run in task["runs"] if run["init"] == "model"), key=lambda run: run["scores"]["accuracy"])
    assert task["model_seed"] == best["seed"]


def test_the_model_kept_is_that_of_the_chosen_points_best_run(gridded, trial):
    """By its logits, in the stock class."""
    import pyarrow.parquet as pq

    folder = gridded[1]
    task = scores(folder)["sst2"]
    (best,) = [run for run in task["runs"] if (run["init"], run["seed"]) == ("model", task["model_seed"])]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "sst2/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "sst2/model")
    texts = pq.read_table(trial / "glue/sst2/validation.parquet")["sentence"].to_pylist()
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
    said = torch.tensor([line["logits"] for line in lines_of(folder / best["folder"] / "predictions-validation.jsonl")])
    torch.testing.assert_close(said, logits, atol=3e-5, rtol=0)


def test_a_run_that_diverges_is_counted_named_and_costs_no_other(gridded):
    folder = gridded[1]
    run = json.loads((folder / f"sst2/runs/model-lr-{DIVERGING}-batch-2-epochs-1-seed-1/scores.json").read_text())
    assert run["scores"] == {} and run["best_epoch"] is None
    assert run["failed"].startswith("diverged: step 7: loss nan") and ";" not in run["failed"]
    row = scores(folder)["sst2"]["grid"][0]
    assert (row["num_runs"], row["num_failed"], "median_of_sound" in row) == (2, 2, False)
    assert row["median"] == row["lowest"] == run["floor"], "what the majority's answer scores"
    assert artifact.verify(folder) == []


def test_where_all_runs_diverge_there_is_no_model_but_an_artifact(trial, tmp_path, capsys):
    folder = tune(trial, tmp_path, lr=DIVERGING, seeds=1)
    task = scores(folder)["sst2"]
    assert (task["model"], task["model_seed"]) == (None, None) and not (folder / "sst2/model").exists()
    assert "logits on validation are not finite" in task["runs"][0]["failed"], "there are too few steps to stop at"
    assert artifact.verify(folder) == []
    printed = capsys.readouterr().out
    assert "1 of 1" in printed and "sst2 model seed 1 failed: diverged: epoch 1" in printed
    assert "nothing to submit, as there are no predictions: sst2 (test)" in printed
    with pytest.raises(ArtifactError, match=r"finetune.warm_start: every run of sst2 diverged"):
        tune(trial, tmp_path, tasks=["rte", "sst2"], lr=DIVERGING, seeds=1, warm_start="sst2")


def test_without_a_grid_names_are_as_they_were(trial):
    settings = config(trial, trial, baselines=["tfidf", "scratch"]).finetune
    names = [run.name(several=False) for run in grid.runs(settings, TASKS["sst2"])]
    assert names == ["model-seed-1", "model-seed-2", "scratch-seed-1", "scratch-seed-2", "tfidf-seed-1"]
    names = [run.name(several=False) for run in grid.runs(settings, TASKS["stsb"])]
    assert "tfidf-seed-1" not in names, "it has no classes"


def finished(root: Path, lr: float, seed: int, score: float | None) -> cells.Cell:
    """A cell of a run that came to `score`, or diverged."""
    run = grid.Run("model", seed, grid.Point(lr, 8, 1))
    one = cells.Cell("sst2", run, config(root, root).finetune, "", root / "cells" / f"{run.name(True)}")
    with one.committing() as (scratch, _):
        scores = {} if score is None else {"accuracy": score}
        artifact.write_json(
            scratch / "scores.json", {"scores": scores, "floor": 0.6, "failed": None if scores else "diverged: so"}
        )
    return one


def test_a_point_that_diverges_is_never_chosen_over_one_with_scores(tmp_path):
    """Although each of its runs counts as 0.6 in its own median, and the others come to less."""
    runs = {(1.0, 1): None, (1.0, 2): None, (2.0, 1): 0.5, (2.0, 2): 0.4, (3.0, 1): 0.9, (3.0, 2): None}
    made = [finished(tmp_path, lr, seed, score) for (lr, seed), score in runs.items()]
    assert [one.run.point.lr for one in summary.choose(made, "model", "accuracy")] == [2.0, 2.0]
    assert summary.best(made, "accuracy").run.point.lr == 3.0 and summary.best(made[:2], "accuracy") is None
    assert [row["chosen"] for row in summary.grid_rows(made, "accuracy")] == [False, True, False]


def test_models_are_kept_that_may_still_be_the_best(tmp_path):
    """Of the leading point that is done, and of points that are not."""
    done = [finished(tmp_path, lr, seed, lr + seed / 10) for lr in (0.1, 0.5, 0.3) for seed in (1, 2)]
    begun = [finished(tmp_path, 0.05, 1, 0.05), finished(tmp_path, 0.05, 2, 0.04)]
    missing = cells.Cell("sst2", grid.Run("model", 3, begun[0].run.point), begun[0].settings, "", tmp_path / "none")
    kept = summary.wanted([*done, *begun, missing], "model", "accuracy")
    assert [(one.run.point.lr, one.run.seed) for one in kept] == [(0.5, 2), (0.05, 1)]


def test_points_are_the_product_in_order_and_names_tell_them_apart(trial):
    settings = config(trial, trial, lr=[2e-5, 3e-5, 2.0000001e-5], epochs=[2, 3], batch_size=[16, 32]).finetune
    points = grid.points(settings)
    assert len(points) == 12 and points[0] == grid.Point(2e-5, 16, 2) and points[1] == grid.Point(2e-5, 16, 3)
    names = [run.name(several=True) for run in grid.runs(settings, TASKS["sst2"])]
    assert len(set(names)) == 24 and "model-lr-3e-05-batch-32-epochs-3-seed-1" in names
    one = grid.at(settings, points[5])
    assert grid.point_of(one) == points[5] and one.max_length == settings.max_length


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": []}, r"finetune.seeds: \[\] must be at least one seed, each once"),
        ({"lr": []}, r"finetune.lr: \[\] must be at least one value, each once"),
        ({"lr": [1e-4, 0.0001]}, r"finetune.lr: .* each once"),
        ({"epochs": [2, 2]}, r"finetune.epochs: .* each once"),
        ({"baselines": ["scratch", "oracle"]}, r"finetune.baselines: 'oracle' is not one of majority, tfidf, scratch"),
        ({"tasks": ["rte"], "warm_start": "mnli"}, r"finetune.warm_start: 'mnli' is not among finetune.tasks: rte"),
        ({"tasks": ["cola"], "warm_start": "cola"}, r"finetune.warm_start: none of rte, mrpc, stsb is among"),
        ({"tasks": ["rte"], "warm_start": "rte"}, r"finetune.warm_start: none of rte, mrpc, stsb is among"),
    ],
)
def test_what_makes_no_runs_is_refused(trial, monkeypatch, changed, message):
    monkeypatch.setitem(TASKS, "mnli", TASKS.get("mnli", TASKS["rte"]))
    with pytest.raises(ConfigError, match=message):
        grid.check(config(trial, trial, **changed).finetune)


# --- the best epoch ---------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_where_the_score_has_not_risen(trial, tmp_path):
    """The epochs before are those of the patient run, to the bit, so the schedule is the same."""
    epochs, seeds = 6, [1, 2, 3]
    whole, cut = (tune(trial, tmp_path, epochs=epochs, seeds=seeds, patience=p) for p in (None, 1))
    lengths = []
    for seed in seeds:
        patient, hasty = (f / f"sst2/runs/model-seed-{seed}" for f in (whole, cut))
        history, seen = (json.loads((f / "scores.json").read_text())["by_epoch"] for f in (patient, hasty))
        stop = next((n for n in range(2, epochs + 1) if history[n - 1] <= max(history[: n - 1])), epochs)
        assert seen == history[:stop]
        assert lines_of(hasty / "metrics.jsonl") == lines_of(patient / "metrics.jsonl")[: stop * 3]
        assert json.loads((hasty / "scores.json").read_text())["best_epoch"] == int(np.argmax(seen)) + 1
        lengths.append(stop)
    assert min(lengths) < epochs and len(set(lengths)) > 1


# --- failed runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs(trial) -> dict[str, training.Job]:
    settings = config(trial, trial).finetune
    return {name: training.prepare(name, settings, str(trial / "model")) for name in ("sst2", "stsb")}


def fail(job: training.Job, logits: np.ndarray) -> str | None:
    outputs = Outputs(logits.astype(np.float32), np.arange(len(logits) + 1))
    return training.failure(job, outputs, job.score("validation", job.decide("validation", outputs)))


def test_a_collapse_is_named(jobs):
    job = jobs["sst2"]
    gold = job.splits["validation"].labels
    right = np.eye(2)[gold]
    majority = np.bincount(job.splits["train"].labels).argmax()
    assert job.floor == np.mean(gold == majority)
    for code, name in enumerate(("negative", "positive")):
        assert fail(job, np.tile(np.eye(2)[code], (len(gold), 1))) == f"predicts {name!r} for every example"
    assert fail(job, right) is None
    assert fail(job, 1 - right) == f"scores 0.000, no more than the same answer to every example ({job.floor:.3f})"
    almost = np.tile(np.eye(2)[majority], (len(gold), 1))
    wrong = np.flatnonzero(gold != majority)[:1]
    almost[wrong] = right[wrong]
    assert fail(job, almost) is None, "one better than the majority's answer"
    lost = np.flatnonzero(gold == majority)[:1]
    almost[lost] = 1 - right[lost]
    assert fail(job, almost).startswith(f"scores {job.floor:.3f}, no more than"), "as good, and with two answers"


def test_a_regression_that_answers_one_number_has_failed(jobs):
    job = jobs["stsb"]
    gold = job.splits["validation"].labels[:, None]
    assert job.floor == 0
    assert fail(job, np.full_like(gold, 2.5)) == "predicts 2.5 for every example"
    assert fail(job, gold) is None and fail(job, gold + 5) is None
    assert fail(job, -gold).startswith("scores -1.000, no more than")


def outcome(score: float | None, floor: float, failed: bool) -> dict:
    return {
        "scores": {} if score is None else {"f1": score},
        "floor": floor,
        "failed": "so" if failed or score is None else None,
    }


@given(
    st.lists(st.tuples(st.floats(-1, 1) | st.none(), st.booleans()), min_size=1, max_size=9),
    st.floats(-1, 1),
)
def test_the_summary_counts_every_run(runs, floor):
    outcomes = [outcome(score, floor, failed) for score, failed in runs]
    figures = summary.summarise(outcomes, "f1")
    known = [score for score, _ in runs if score is not None]
    worst = min([floor, *known])
    values = [worst if score is None else score for score, _ in runs]
    for key, share in {"lowest": 0, "lower_quartile": 25, "median": 50, "upper_quartile": 75, "highest": 100}.items():
        assert figures[key] == pytest.approx(np.percentile(values, share))
    sound = [score for score, failed in runs if score is not None and not failed]
    assert (figures["num_runs"], figures["num_failed"]) == (len(runs), len(runs) - len(sound))
    assert ("median_of_sound" in figures) == (0 < len(sound) < len(runs))
    if "median_of_sound" in figures:
        assert figures["median_of_sound"] == pytest.approx(np.median(sound))


# --- warm start -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warmed(trial, tmp_path_factory) -> tuple[Path, Path]:
    """A root and its artifact: rte and stsb from the best model of cola, sst2 not."""
    root = tmp_path_factory.mktemp("warmed")
    return root, tune(
        trial, root, tasks=["rte", "sst2", "cola", "stsb"], warm_start="cola", seeds=1, baselines="scratch"
    )


def test_the_task_to_start_from_goes_first_and_the_table_keeps_its_order(warmed):
    folder = warmed[1]
    assert list(scores(folder)) == ["rte", "sst2", "cola", "stsb"]
    written = {name: (folder / name / "scores.json").stat().st_mtime_ns for name in scores(folder)}
    assert min(written, key=written.get) == "cola"


def test_a_checkpoint_and_the_task_that_made_it_are_the_same_start(warmed, trial, tmp_path):
    folder = warmed[1]
    again = tune(trial, tmp_path, tasks=["rte", "stsb"], warm_start=str(folder / "cola/model"), seeds=1)
    cold = tune(trial, tmp_path, tasks=["rte", "stsb", "sst2"], seeds=1, baselines="scratch")
    for task in ("rte", "stsb"):
        weights = [contents(path / task / "model")["model.safetensors"] for path in (folder, again, cold)]
        assert weights[0] == weights[1] != weights[2]
        scratch = [contents(path / task / "runs/scratch-seed-1") for path in (folder, cold)]
        assert scratch[0]["predictions-validation.jsonl"] == scratch[1]["predictions-validation.jsonl"]
    assert contents(folder / "sst2") == contents(cold / "sst2")
    assert len(json.loads((folder / "stsb/model/config.json").read_text())["id2label"]) == 1


def test_where_a_warm_start_lies_is_not_what_it_is(warmed, trial, tmp_path):
    first = warmed[1] / "cola/model"
    other = Path(shutil.copytree(first, tmp_path / "other"))
    names = [
        Pipeline(config(trial, tmp_path, tasks="rte", warm_start=str(path))).locate("finetune")
        for path in (first, other)
    ]
    assert names[0] == names[1]
    (other / "config.json").write_text((other / "config.json").read_text().replace("{", "{ ", 1))
    assert Pipeline(config(trial, tmp_path, tasks="rte", warm_start=str(other))).locate("finetune") != names[0]


def test_body_and_pooler_are_taken_and_the_head_is_new(warmed, trial):
    start = AutoModelForSequenceClassification.from_pretrained(warmed[1] / "cola/model")
    settings = config(trial, trial).finetune
    job = training.prepare("rte", settings, str(warmed[1] / "cola/model"), new_head=True)
    models = [training.build(job, settings, "model", seed) for seed in (1, 1, 2)]
    for name, tensor in start.bert.state_dict().items():
        assert all(torch.equal(tensor, model.bert.state_dict()[name]) for model in models), name
    assert any("pooler" in name for name in start.bert.state_dict())
    first, same, other = (model.classifier.weight for model in models)
    assert (
        torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, start.classifier.weight)
    )
    assert models[0].config.id2label == {0: "entailment", 1: "not_entailment"}


def test_a_warm_start_that_is_no_checkpoint_is_named(trial, tmp_path):
    with pytest.raises(ConfigError, match=r"finetune.warm_start.*/nowhere"):
        tune(trial, tmp_path, tasks="rte", warm_start="/nowhere/at/all", seeds=1)


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_go_through_divergence_patience_and_a_remade_model_together(trial, tmp_path):
    given = {"lr": [DIVERGING, 1e-2], "batch_size": 6, "slots_per_step": 2, "epochs": 3, "patience": 1, "seeds": 1}
    given |= {"data": trial / "glue", "model": trial / "model", "tasks": "[rte, cola]", "warm_start": "cola"}
    given |= {"precision": "fp32", "max_length": 32}
    arguments = ["finetune", "--runtime.root", tmp_path / "runs", "--runtime.progress", "false"]
    arguments += [f"--finetune.{key}={value}" for key, value in given.items()]
    printed = launch(2, *arguments).done()
    assert printed.count("run 4 of 4:") == 1 and printed.count("median [quartiles]") == 1
    tasks = scores(only(tmp_path / "runs", "finetune"))
    assert all(task["grid"][0]["num_failed"] == 1 for task in tasks.values())
    for unit in (tmp_path / "runs/cells").glob("rte-*-model"):
        shutil.rmtree(unit)
    again = launch(2, *arguments, "--finetune.seeds=[1]").done()
    assert "rte: 2 of 2 runs are there already" in again and "run " not in again.replace("runs", "")

    victim = next((tmp_path / "runs/cells").glob("cola-*/predictions-validation.jsonl"))
    victim.write_text(victim.read_text() + " ")
    refused = launch(2, *arguments, "--finetune.seeds=[1, 2]")
    assert refused.wait() == [2, 2], refused.text()
    told = [line for line in refused.text().splitlines() if line.startswith("bertpipe: ")]
    assert len(told) == 2 and "Traceback" not in refused.text()
    assert told[0].startswith(f"bertpipe: {victim}: ") and "delete" in told[0]
    assert told[1].startswith("bertpipe: cola: rank 1 of 2 waited in vain: rank 0 ")


# --- the table --------------------------------------------------------------------------------------------------------


def row(**more) -> dict:
    figures = {
        "median": 0.5,
        "lower_quartile": 0.45,
        "upper_quartile": 0.6,
        "num_runs": 3,
        "num_failed": 1,
        "median_of_sound": 0.55,
    }
    one = {"init": "model", "seed": 2, "failed": "predicts 'x' for every example"}
    base = {"metric": "matthews_correlation", "summary": {"model": figures}, "runs": [one], "grid": [], "published": []}
    base["further"] = {}
    return base | more


def test_the_table_says_what_was_scored_what_failed_and_what_others_score():
    single = {"model": {"median": 0.25, "num_runs": 1, "num_failed": 0, "lower_quartile": 0.25, "upper_quartile": 0.25}}
    paper = {"split": "dev", "source": "A 2019", "same_metric": True}
    tables = {
        "cola": row(published=[{"model": "BERT", "score": 0.6, **paper}]),
        "mine": row(metric="f1", runs=[], summary=single | {"majority": {"median": 0.1}}, further={"test_f1": 0.2}),
        "qqp": row(
            metric="f1",
            runs=[],
            summary=single,
            published=[{"model": "BERT", "score": 0.7, **paper, "same_metric": None}],
        ),
    }
    assert table.lines(tables) == [
        "task  metric                median [quartiles]    failed  majority",
        "cola  matthews correlation  0.500 [0.450, 0.600]  1 of 3  -",
        "mine  f1                    0.250                 0 of 1  0.100",
        "qqp   f1                    0.250                 0 of 1  -",
        "cola model seed 2 failed: predicts 'x' for every example",
        "cola model: the median of the sound runs is 0.550",
        "mine test f1: median 0.200",
        "                    cola                   qqp",
        "this model, dev     0.500 (1 of 3 failed)  0.250",
        "BERT, dev (A 2019)  0.600                  0.700*",
        "* of two metrics; the paper doesn't say which, or whether their mean",
    ]


def test_the_table_names_the_chosen_point(gridded):
    text = (gridded[1] / "table.txt").read_text()
    assert text.splitlines()[0].split()[-1] == "chosen" and "lr 0.01 batch 2 epochs 1" in text.splitlines()[1]


def test_published_scores_are_those_of_the_papers():
    """Spot checks: Devlin et al. 2019, Table 1 (test); Sanh et al. 2019, Table 1 (dev)."""
    found = {(one["model"], one["split"]): one for one in published.of("cola")}
    assert {key: one["score"] for key, one in found.items()} == {
        ("BERT-base", "dev"): 0.563,
        ("DistilBERT", "dev"): 0.513,
        ("BERT-large", "dev"): 0.606,
        ("BERT-base", "test"): 0.521,
        ("BERT-large", "test"): 0.605,
    }
    assert published.of("docs") == []
    for line in published.ROWS:
        assert line.split in ("dev", "test") and "20" in line.source and "Table" in line.source
        assert all(0 < score < 100 for score in line.scores.values()) and {*line.unclear} <= {*line.scores}
