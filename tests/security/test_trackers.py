"""A tracker that hangs, fails or is refused costs nothing but its own record."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bertpipe.train import trackers
from bertpipe.train.trackers import Background
from bertpipe.train.tracking import Record

ROOT = Path(__file__).parents[2]


class Listed:
    """A tracker that keeps what it is given, and misbehaves in one of its calls."""

    def __init__(self, where: str = "", behave=lambda: None, step: int = 3):
        self.where, self.behave, self.step = where, behave, step
        self.lines: list[tuple[int, dict]] = []
        self.closed = False

    def start(self) -> None:
        if self.where == "start":
            self.behave()

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self.where == "log" and step == self.step:
            self.behave()
        self.lines.append((step, figures))

    def finish(self) -> None:
        if self.where == "finish":
            self.behave()
        self.closed = True


class Unusual(BaseException):
    """No Exception, as greenlets and some test tools raise."""


def hang() -> None:
    threading.Event().wait()


def raising(error: BaseException):
    def behave(*_: object) -> None:
        raise error

    return behave


def steps(number: int) -> list[dict]:
    return [{"step": step, "loss": 1 / step, "lr": 0.5} for step in range(1, number + 1)]


@pytest.fixture(autouse=True)
def _bounded(monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(trackers, "given_up", [])


def record(folder: Path, tracker: Listed, number: int = 10, log_every: int = 1) -> list[dict]:
    """Write `number` steps; the lines of metrics.jsonl."""
    with Record(folder, log_every, Background("listed", tracker)) as writing:
        for line in steps(number):
            writing.write("metrics", line)
        writing.write("speed", {"step": number, "seconds": 1.0})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_the_names_and_values_of_the_record(tmp_path, capsys):
    tracker = Listed()
    record(tmp_path, tracker, 10, log_every=5)
    assert tracker.lines == [
        *((line["step"], {"loss": line["loss"], "lr": 0.5}) for line in steps(10) if line["step"] in (5, 10)),
        (10, {"seconds": 1.0}),
    ]
    assert tracker.closed and trackers.given_up == [] and capsys.readouterr().err == ""


ERRORS = [OSError("token expired"), SystemExit(3), KeyboardInterrupt(), Unusual("x" * 10 + "\nmore"), RecursionError()]


@pytest.mark.parametrize("where", ["start", "log", "finish"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_tracker_that_raises_ends_its_own_record_alone(where, error, tmp_path, capsys):
    tracker = Listed(where, raising(error))
    assert record(tmp_path, tracker) == steps(10)
    said = capsys.readouterr().err.splitlines()
    doing = {"start": "starting", "log": "recording step 3", "finish": "closing"}[where]
    assert said[0].startswith(f"listed: failed while {doing} ({type(error).__name__}")
    lost = {"start": 11, "log": 9, "finish": 0}[where]
    assert said[1:] == [f"listed: its record lacks {lost} of 11 lines; metrics.jsonl and speed.jsonl have them"] * (
        lost > 0
    )
    assert trackers.given_up == ["listed"]
    assert tracker.closed == (where == "log"), "what was recorded is closed"


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_given_up(where, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    assert record(tmp_path, Listed(where, hang)) == steps(10)
    said = capsys.readouterr().err.splitlines()
    lost = {"start": 11, "log": 9, "finish": 0}[where]
    assert said[0] == "listed: not closed in 0.5 s and given up"
    assert (f"lacks {lost} of 11" in said[-1]) == (lost > 0)
    assert len(said) == 1 + (lost > 0) and trackers.given_up == ["listed"]


def test_lines_that_find_no_room_are_left_out_counted_and_said_once(capsys):
    free = threading.Event()
    tracker = Listed("start", free.wait)
    background = Background("listed", tracker, room=4)
    for line in steps(10):
        background.log(line)
    free.set()
    background.finish()
    said = capsys.readouterr().err.splitlines()
    assert [step for step, _ in tracker.lines] == [1, 2, 3, 4] and tracker.closed
    assert said == [
        "listed: does not keep up at step 5; lines are left out of its record from here on",
        "listed: its record lacks 6 of 10 lines; metrics.jsonl and speed.jsonl have them",
    ]


def test_a_second_ctrl_c_does_not_wait(capsys, monkeypatch):
    """The user's interrupt goes through, and the process knows that a thread is left."""
    background = Background("listed", Listed("start", hang))
    monkeypatch.setattr(background._thread, "join", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        background.finish()
    assert trackers.given_up == ["listed"]


def test_a_full_disk_still_closes_the_tracker(tmp_path):
    tracker = Listed()
    with pytest.raises(OSError), Record(tmp_path, 1, Background("listed", tracker)) as writing:
        writing.positions = raising(OSError("no space left"))
    assert tracker.closed


def test_what_a_tracker_says_is_redacted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    record(tmp_path, Listed("start", raising(OSError("401 for key very-secret-value"))))
    assert "401 for key ***" in capsys.readouterr().err


# --- the real wandb, in a process that ends as the command does -------------------------------------------------------

RUN = """
import atexit, sys, threading
from pathlib import Path
from bertpipe import cli
from bertpipe.train import trackers

trackers.CLOSE_SECONDS = float(sys.argv[2])

def run(argv):
    made = trackers.Wandb("trial", Path(sys.argv[1]), {"optim": {"lr": 0.25}}, "run-1")
    tracker = trackers.Background("wandb", made)
    for step in range(1, 21):
        tracker.log({"step": step, "loss": 1 / step, "eval_loss": 2.0})
    tracker.finish()
    if trackers.given_up:
        atexit.register(threading.Event().wait)  # as a library's hook that waits for its server
    print("the run is whole", flush=True)
    return 0

cli._main = run
sys.exit(cli.main([]))
"""


def wandb_run(folder: Path, seconds: float, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(folder), "NETRC": str(folder / "none"), "PYTHONPATH": str(ROOT)} | more
    for name in ("WANDB_MODE", *(["WANDB_API_KEY"] if "WANDB_API_KEY" not in more else [])):
        environment.pop(name, None)
    command = [sys.executable, "-c", RUN, str(folder), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "the run is whole" in done.stdout
    return done


def test_an_offline_wandb_run_reads_back_as_it_was_recorded(tmp_path):
    done = wandb_run(tmp_path, 20)
    assert "wandb: no key, so offline; upload later with: wandb sync" in done.stdout and done.stderr == ""
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [json.loads(line) for line in shown.splitlines()]
    history = [row["history"]["item"] for row in rows if row["type"] == "history"]
    found = [{k: v for k, v in item.items() if k == "_step" or not k.startswith("_")} for item in history]
    assert found == [{"_step": step, "loss": 1 / step, "eval_loss": 2.0} for step in range(1, 21)]
    (run,) = [row["run"] for row in rows if row["type"] == "run"]
    assert (run["display_name"], run["project"]) == ("run-1", "trial")
    assert run["config"]["update"]["optim"] == {"lr": 0.25}
    assert [row for row in rows if row["type"] == "exit"], "closed"
    assert not list(tmp_path.rglob("wandb-metadata.json")), "argv, git remote, user"
    assert not list(tmp_path.rglob("output.log")) and not list(tmp_path.rglob("requirements.txt"))


def test_a_server_that_never_answers_holds_up_nobody(tmp_path):
    """A connection that is taken and never served: wandb's own limit is 90 s, and its hook at the end waits as well."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        where = {"WANDB_BASE_URL": f"http://127.0.0.1:{hole.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        done = wandb_run(tmp_path, 4, **where)
    assert "wandb: not closed in 4 s and given up" in done.stderr
    assert "its record lacks 20 of 20 lines" in done.stderr


class _Refusing(http.server.BaseHTTPRequestHandler):
    """401 to everything, as a server answers an expired token."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_expired_token_ends_the_tracker_alone(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "b" * 40}
        done = wandb_run(tmp_path, 30, **where)
        server.shutdown()
    assert "wandb: failed while starting" in done.stderr and "b" * 40 not in done.stdout + done.stderr
