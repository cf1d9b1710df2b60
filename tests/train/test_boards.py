"""A run that is killed and goes on, with every tracker on: what they wrote is the record; the dashboard shows it."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from bertpipe import cli
from bertpipe.train import boards, trackers
from bertpipe.train.tracking import named
from tests.boards import dashboard, fetch, tensorboard_scalars, wandb_history, wandb_rows
from tests.kills import pretrain, steps_of, wait_for_checkpoint
from tests.runs import only, prepare

ROOT = Path(__file__).parents[2]
LOG_EVERY = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = prepare(folder)
    for stage in ("corpus", "tokenizer", "shards"):
        assert cli.main([stage, "--config", str(config)]) == 0
    return folder


@pytest.fixture(scope="module")
def resumed(made, tmp_path_factory) -> Path:
    """The finished run; killed after its 15th step at the earliest, and gone on with."""
    root = tmp_path_factory.mktemp("tracked") / "runs"
    more = ["--runtime.trackers", *boards.TRACKERS, "--runtime.project", "trial"]
    started = pretrain(made, root, 1, *more)
    wait_for_checkpoint(started, root, 15)
    started.kill()
    assert steps_of(root)[-1] in range(15, 31)
    said = pretrain(made, root, 1, *more)
    said.done()
    assert "resuming after step" in said.text("out") and "wandb: no key, so offline" in said.text("out")
    assert not [line for line in said.text("err").splitlines() if line.startswith(tuple(boards.TRACKERS))]
    return only(root, "pretrain")


@pytest.fixture(scope="module")
def expected(resumed) -> list[tuple[int, dict[str, float]]]:
    """The lines of the record that trackers are given, in order; train and eval apart from speed."""
    lines = []
    for name in ("metrics", "speed"):
        for text in (resumed / f"{name}.jsonl").read_text().splitlines():
            line = json.loads(text)
            if name == "speed" or "loss" not in line or line["step"] % LOG_EVERY == 0:
                lines.append(named(name, line))
    assert len(lines) == 30 // LOG_EVERY * 2 + 3
    return lines


def by_step(lines: list[tuple[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for step, figures in lines:
        assert not steps[step].keys() & figures.keys(), f"twice at step {step}"
        steps[step] |= figures
    return dict(steps)


def test_wandb_holds_the_record(resumed, expected):
    *before, path = sorted(resumed.parent.glob("wandb/offline-run-*/*.wandb"))
    assert len(before) <= 1 and {file.name for file in before} <= {path.name} == {f"run-{resumed.name}.wandb"}
    assert by_step(wandb_history(path)) == by_step(expected)
    (run,) = [row["run"] for row in wandb_rows(path) if row["type"] == "run"]
    assert (run["run_id"], run["display_name"], run["project"]) == (resumed.name, resumed.name, "trial")
    assert run["config"]["update"]["train"]["steps"] == 30


def test_tensorboard_holds_the_record(resumed, expected):
    folder = resumed.parent / "tensorboard" / resumed.name
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, figures in expected:
        for name, value in figures.items():
            points[name].append((step, float(np.float32(value))))
    assert tensorboard_scalars(folder) == points


def test_trackio_holds_the_record_and_the_dashboard_serves_it(resumed, expected):
    """Read over HTTP, as the page reads it; on this machine's own address alone; Ctrl-C ends it well."""
    with dashboard(resumed, "--no-open") as (address, process):
        base, _, query = address.partition("?")
        assert query == f"project=trial&runs={resumed.name}"
        assert b"<title>Trackio" in fetch(address)
        rows = json.loads(fetch(f"{base}api/get_logs", {"project": "trial", "run": resumed.name}))["data"]
        runs = json.loads(fetch(f"{base}api/get_runs_for_project", {"project": "trial"}))["data"]
        config = json.loads(fetch(f"{base}api/get_run_configs", {"project": "trial"}))["data"]
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", int(base.rstrip("/").rpartition(":")[2])))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert [run["name"] for run in runs] == [resumed.name]
    assert '"steps": 30' in json.dumps(config) and '"_Username": null' in json.dumps(config)
    found = [(row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")}) for row in rows]
    assert len(found) == len(expected) and by_step(found) == by_step(expected)


def test_where_only_tensorboard_wrote_it_is_shown(resumed, tmp_path):
    (tmp_path / "tensorboard").symlink_to(resumed.parent / "tensorboard")
    with dashboard(tmp_path) as (address, process):
        assert b"TensorBoard" in fetch(address)
        assert "?" not in address
        assert json.loads(fetch(f"{address}data/runs")) == [resumed.name]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_names_are_those_of_the_page(expected):
    """docs/artifacts.md lists each name with its unit."""
    page = (ROOT / "docs" / "artifacts.md").read_text().partition("## Trackers")[2]
    listed = set(re.findall(r"`((?:train|eval|speed)/\w+)`", page))
    seen = {name for _, figures in expected for name in figures}
    assert len(seen) > 12 and seen - listed == set()


def test_the_port_is_taken(resumed, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for board in ("trackio", "tensorboard"):
            assert cli.main(["dashboard", str(resumed.parent), "--with", board, "--port", port]) == 2
            err = capsys.readouterr().err
            assert f"--port: {port} on 127.0.0.1 is in use; name another, or leave it out" in err
            assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["."], "dashboard: trackio or tensorboard recorded nothing of .; runs do with runtime.trackers: [trackio]"),
        (["nowhere"], "dashboard: nowhere is no folder; give runtime.root (runs) or a run in it"),
        ([".", "--port", "99999"], "bertpipe dashboard: argument --port: '99999' is no port: 0 to 65535; `bertpipe"),
        ([".", "--with", "wandb"], "invalid choice: 'wandb'"),
    ],
)
def test_nothing_to_show_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["dashboard", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_damaged_database_is_one_line(tmp_path):
    """In a process of its own: the command leaves trackio's folder set."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    run, file = tmp_path / "pretrain-a", tmp_path / "trackio" / "trial.db"
    for folder in (run, file.parent):
        folder.mkdir()
    (run / "metrics.jsonl").touch()
    file.write_bytes(b"no database " * 100)
    code = "import sys; from bertpipe.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", code, "dashboard", str(run)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"bertpipe: dashboard: {file}: file is not a database; move it away" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_what_shows_it_is_not_installed(tmp_path, monkeypatch, capsys):
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "trial.db").touch()
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert cli.main(["dashboard", str(tmp_path)]) == 2
    assert "dashboard: trackio is not installed; pip install 'bertpipe[trackio]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runtime.trackers", "tensorboard", "trackio"], "trackio is not installed; pip install 'bertpipe[trackio]'"),
        (["--runtime.trackers", "wand"], "runtime.trackers: 'wand' is not one of wandb, tensorboard, trackio"),
        (["--runtime.project", "a/b"], "runtime.project: 'a/b' may hold letters, digits, - and _ only, 100 at most"),
        (["--runtime.wandb", "trial"], "unknown"),
    ],
)
def test_mistakes_are_found_before_the_first_stage(flags, said, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    root = ["--runtime.root", str(tmp_path / "runs")]
    assert cli.main(["all", "--config", str(made / "tiny.yaml"), *root, *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.glob("runs/corpus-*"))


def test_trackio_that_cannot_write_says_why(tmp_path, monkeypatch, capsys):
    """Its library only warns; the run goes on, and what the record lacks is said."""
    monkeypatch.setattr(trackers, "given_up", [])
    (tmp_path / "trackio" / "trial.db").mkdir(parents=True)
    (made,) = boards.open_all(boards_settings(tmp_path), "run-1", {})
    made.begin()
    made.log(1, {"train/loss": 1.0})
    trackers.finish([made])
    err = capsys.readouterr().err
    assert "trackio: failed while" in err and "unable to open database file" in err and trackers.given_up == ["trackio"]


def test_a_tensorboard_that_is_open_sees_a_resumed_run_once(tmp_path):
    """Points that the new file takes back are gone from what was read before."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = boards.Run(tmp_path, "trial", "run-1", {})
    opened = EventAccumulator(str(tmp_path / "tensorboard" / "run-1"))
    for last in (5, 3, 4):
        board = boards.TensorBoard(run)
        board.start()
        for step in range(1, last + 1):
            board.log(step, {"train/loss": 1 / step})
        board.finish()
        assert [event.step for event in opened.Reload().Scalars("train/loss")] == list(range(1, last + 1))
    assert tensorboard_scalars(tmp_path / "tensorboard" / "run-1") == {
        "train/loss": [(step, float(np.float32(1 / step))) for step in (1, 2, 3, 4)]
    }
    assert len(list((tmp_path / "tensorboard" / "run-1").iterdir())) == 2


def boards_settings(root: Path) -> boards.RuntimeConfig:
    return boards.RuntimeConfig(root=str(root), trackers="trackio", project="trial")
