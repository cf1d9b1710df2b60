"""Fine-tuning with every tracker on: each run stands there under a name of its own, with the lines of its record."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bertpipe import artifact, cli
from bertpipe.pipeline import Pipeline
from bertpipe.train import boards, trackers
from bertpipe.train.tracking import named
from tests.boards import dashboard, fetch, tensorboard_scalars, wandb_history, wandb_rows
from tests.downstream import tuning

LOG_EVERY = 2


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tuning.write_checkpoint(folder / "model")
    tuning.write_task(folder / "glue", "sst2")
    return folder


def tune(start: Path, root: Path, *names: str, **finetune) -> Path:
    cfg = tuning.config(start, root, epochs=2, **finetune)
    runtime = cfg.runtime.model_copy(update={"trackers": list(names), "log_every": LOG_EVERY, "project": "trial"})
    pipeline = Pipeline(cfg.model_copy(update={"runtime": runtime}))
    pipeline.run("finetune")
    return pipeline.locate("finetune")


@pytest.fixture(scope="module")
def tracked(start, tmp_path_factory) -> Path:
    """Two seeds, and a baseline that is not trained by steps."""
    return tune(start, tmp_path_factory.mktemp("tracked"), *boards.TRACKERS, baselines="majority")


@pytest.fixture(scope="module")
def expected(tracked) -> dict[str, dict[int, dict[str, float]]]:
    """Each run's name, and what trackers are to show of it by step."""
    runs = {}
    made = {name: artifact.read_manifest(tracked.parent / "cells" / name) for name in tuning.cells(tracked.parent)}
    for cell, seed in ((name, facts["seed"]) for name, facts in made.items() if facts["init"] == "model"):
        folder, steps = tracked / "sst2" / "runs" / f"model-seed-{seed}", dict[int, dict[str, float]]()
        for name in ("metrics", "speed"):
            for line in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()):
                if name == "speed" or "loss" not in line or line["step"] % LOG_EVERY == 0:
                    step, figures = named(name, line)
                    steps[step] = steps.get(step, {}) | figures
        runs[f"sst2-model-seed-{seed}-{cell.removeprefix('sst2-')}"] = steps
    assert len(runs) == 2
    return runs


def test_every_tracker_holds_each_run(tracked, expected):
    root = tracked.parent
    assert all(
        "eval/accuracy" in run[4] and {"train/loss", "speed/seconds"} <= run[2].keys() for run in expected.values()
    )
    assert {path.name for path in (root / "tensorboard").iterdir()} == expected.keys()
    for name, steps in expected.items():
        shown: dict[int, dict[str, float]] = {}
        for figure, points in tensorboard_scalars(root / "tensorboard" / name).items():
            for step, value in points:
                shown.setdefault(step, {})[figure] = value
        assert shown == {s: {k: float(np.float32(v)) for k, v in line.items()} for s, line in steps.items()}
        (path,) = root.glob(f"wandb/offline-run-*/run-{name}.wandb")
        assert dict(wandb_history(path)) == steps
        (run,) = [row["run"] for row in wandb_rows(path) if row["type"] == "run"]
        assert run["config"]["update"]["run"] == {"task": "sst2", "init": "model", "seed": int(name.split("-")[3])}
    assert len(list(root.glob("wandb/offline-run-*"))) == 2


def test_the_dashboard_shows_them_side_by_side(tracked, expected):
    with dashboard(tracked, "--no-open") as (address, _):
        base = address.partition("?")[0]
        runs = json.loads(fetch(f"{base}api/get_runs_for_project", {"project": "trial"}))["data"]
        assert {run["name"] for run in runs} == expected.keys()
        for name, steps in expected.items():
            shown: dict[int, dict[str, float]] = {}
            for row in json.loads(fetch(f"{base}api/get_logs", {"project": "trial", "run": name}))["data"]:
                shown.setdefault(row["step"], {}).update({k: v for k, v in row.items() if "/" in k})
            assert shown == steps


def test_trackers_change_no_result(start, tracked, tmp_path):
    plain = tune(start, tmp_path, baselines="majority")
    assert plain.name == tracked.name
    assert tuning.contents(plain / "sst2") == tuning.contents(tracked / "sst2")


def test_one_that_was_given_up_is_not_waited_for_again(start, tmp_path, monkeypatch, capsys):
    """It costs its time once, not once a run."""
    (tmp_path / "trackio" / "trial.db").mkdir(parents=True)  # so that it can't write
    monkeypatch.setattr(trackers, "given_up", [])
    tune(start, tmp_path, "trackio", "tensorboard")
    err = capsys.readouterr().err
    assert err.count("trackio: failed while") == 1 and trackers.given_up == ["trackio"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_wandb_says_once_for_all_runs_how_to_upload_them(start, tmp_path, capsys):
    tune(start, tmp_path, "wandb")
    out = capsys.readouterr().out
    assert f"wandb: no key, so offline; upload later with: wandb sync {tmp_path}/wandb/offline-run-*\n" in out
    assert out.count("wandb: ") == 1 and len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_the_time_of_a_run_leaves_waiting_for_trackers_out(start, tmp_path, monkeypatch):
    def wait(copies) -> None:
        for copy in copies:
            copy.waited = 1000.0

    monkeypatch.setattr(trackers, "finish", wait)
    (run, _) = tuning.scores(tune(start, tmp_path, "tensorboard"))["sst2"]["runs"]
    assert -1000 < run["wall_seconds"] < -900


def flags(start: Path, root: Path) -> list[str]:
    settings = {"model": start / "model", "data": start / "glue", "tasks": "sst2", "epochs": 1, "max_length": 32}
    given = [word for name, value in settings.items() for word in (f"--finetune.{name}", str(value))]
    return ["finetune", *given, "--runtime.root", str(root)]


def test_finished_runs_are_told_to_none(start, tmp_path, capsys):
    note = "note: runtime.trackers hear of a run while it trains, so nothing of this one is sent"
    for more in ([], ["--runtime.trackers", "tensorboard"]):
        assert cli.main(flags(start, tmp_path) + more) == 0
        assert (note in capsys.readouterr().out) is bool(more)
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wand", "trackio"])
def test_one_that_cannot_be_is_refused_before_anything_is_loaded(start, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert cli.main([*flags(start, tmp_path), "--runtime.trackers", name]) == 2
    assert "runtime.trackers: " in capsys.readouterr().err and not list(tmp_path.glob("finetune-*"))
