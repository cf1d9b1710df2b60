"""A tracker that hangs, fails or is refused costs nothing but its own record."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bertpipe.train import trackers
from bertpipe.train.trackers import Background, finish
from bertpipe.train.tracking import Record
from tests.boards import WandbServer, wandb_history, wandb_rows

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
    with Record(folder, log_every, [Background("listed", tracker)]) as writing:
        writing.rewind({})
        for line in steps(number):
            writing.write("metrics", line)
        writing.write("speed", {"step": number, "seconds": 1.0})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_the_names_and_values_of_the_record(tmp_path, capsys):
    tracker = Listed()
    record(tmp_path, tracker, 10, log_every=5)
    assert tracker.lines == [
        *((step, {"train/loss": 1 / step, "train/lr": 0.5}) for step in (5, 10)),
        (10, {"speed/seconds": 1.0}),
    ]
    assert tracker.closed and trackers.given_up == [] and capsys.readouterr().err == ""


def test_a_resumed_run_gives_its_record_anew(tmp_path, capsys):
    """In the order of steps, up to the checkpoint; what was refused a place before is no matter now."""
    with Record(tmp_path, 2) as writing:
        for line in steps(9):
            writing.write("metrics", line | ({"skipped": "not finite"} if line["step"] == 3 else {}))
            if line["step"] % 4 == 0:
                writing.write("speed", {"step": line["step"], "seconds": 1.0 * line["step"]})
                writing.write("metrics", {"step": line["step"], "eval_loss": 2.0})
            if line["step"] == 5:
                positions = writing.positions()
    tracker = Listed()
    with Record(tmp_path, 2, [Background("listed", tracker, room=1)]) as writing:
        writing.rewind(positions)
        writing.write("metrics", {"step": 6, "loss": 0.25})
    train = {step: {"train/loss": 1 / step, "train/lr": 0.5} for step in (2, 3, 4)}
    assert tracker.lines == [
        (2, train[2]),
        (3, train[3] | {"train/skipped": 1}),
        (4, train[4]),
        (4, {"eval/loss": 2.0}),
        (4, {"speed/seconds": 4.0}),
        (6, {"train/loss": 0.25}),
    ]
    assert capsys.readouterr().err == ""


def test_several_that_hang_are_given_up_together(tmp_path, capsys, monkeypatch):
    """The limit is of all of them, and the one that works is whole."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    whole = Listed()
    copies = [*(Background(f"hung-{n}", Listed("finish", hang)) for n in range(20)), Background("whole", whole)]
    with Record(tmp_path, 1, copies) as writing:
        writing.rewind({})
        writing.write("metrics", {"step": 1, "loss": 0.5})
        started = time.monotonic()
    waited = time.monotonic() - started
    assert trackers.given_up == [f"hung-{n}" for n in range(20)] and whole.closed
    assert waited < 10, "a second each would be twenty"
    assert capsys.readouterr().err.count("not closed in 1 s and given up") == 20


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
    background.begin()
    for line in steps(10):
        background.log(line["step"], {"train/loss": line["loss"]})
    free.set()
    finish([background])
    said = capsys.readouterr().err.splitlines()
    assert [step for step, _ in tracker.lines] == [1, 2, 3, 4] and tracker.closed
    assert said == [
        "listed: does not keep up at step 5; lines are left out of its record from here on",
        "listed: its record lacks 6 of 10 lines; metrics.jsonl and speed.jsonl have them",
    ]


def test_a_second_ctrl_c_does_not_wait(capsys, monkeypatch):
    """The user's interrupt goes through, and the process knows that a thread is left."""
    background = Background("listed", Listed("start", hang))
    background.begin()
    monkeypatch.setattr(background._thread, "join", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        finish([background])
    assert trackers.given_up == ["listed"]


def test_a_full_disk_still_closes_the_tracker(tmp_path):
    tracker = Listed()
    with pytest.raises(OSError), Record(tmp_path, 1, [Background("listed", tracker)]) as writing:
        writing.rewind({})
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
from bertpipe.train import boards, trackers

trackers.CLOSE_SECONDS = float(sys.argv[2])

def run(argv):
    made = boards.Wandb(boards.Run(Path(sys.argv[1]), "trial", "run-1", {"optim": {"lr": 0.25}}))
    tracker = trackers.Background("wandb", made)
    first, last = map(int, sys.argv[3:]) if len(sys.argv) > 3 else (1, 20)
    figures = lambda step: {"train/loss": 1 / step, "eval/loss": 2.0}
    tracker.begin([(step, figures(step)) for step in range(1, first)])
    for step in range(first, last + 1):
        tracker.log(step, figures(step))
    trackers.finish([tracker])
    if trackers.given_up:
        atexit.register(threading.Event().wait)  # as a library's hook that waits for its server
    print("the run is whole", flush=True)
    return 0

cli._main = run
sys.exit(cli.main([]))
"""


def wandb_run(folder: Path, seconds: float, *steps: int, **more: str) -> subprocess.CompletedProcess[str]:
    """In a terminal, where a prompt would wait for an answer; what it prints there is `stderr`."""
    environment = os.environ | {"HOME": str(folder), "NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT)}
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        environment.pop(name, None)
    command = [sys.executable, "-c", RUN, str(folder), str(seconds), *map(str, steps)]
    ours, terminal = os.openpty()
    streams = {"stdin": terminal, "stdout": subprocess.PIPE, "stderr": terminal}
    done = subprocess.run(command, env=environment | more, **streams, text=True, timeout=60)
    os.close(terminal)
    os.set_blocking(ours, False)
    done.stderr = ""
    with contextlib.suppress(OSError):  # nothing more
        while read := os.read(ours, 1 << 16):
            done.stderr += read.decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "the run is whole" in done.stdout
    return done


def test_an_offline_wandb_run_reads_back_as_it_was_recorded(tmp_path):
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {'c' * 40}\n")  # of another server
    done = wandb_run(tmp_path, 20, WANDB_MODE="online")
    assert "wandb: no key, so offline; upload later with: wandb sync" in done.stdout and done.stderr == ""
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_history(path) == [(step, {"train/loss": 1 / step, "eval/loss": 2.0}) for step in range(1, 21)]
    rows = wandb_rows(path)
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


def test_a_server_gets_each_step_of_a_resumed_run_once(tmp_path):
    """Killed after step 12 with a checkpoint of step 10; then deleted here, begun anew and stopped."""
    runs: dict[str, list[str]] = {}
    answering = type("_Answering", (WandbServer,), {"runs": runs})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), answering)
    where = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for first, last, there in ((1, 12, 12), (11, 20, 20), (1, 5, 20)):
            done = wandb_run(tmp_path, 20, first, last, **where)
            assert "its record lacks" not in done.stderr and "a" * 40 not in done.stdout + done.stderr
            rows = [json.loads(line) for line in runs["run-1"]]
            assert [(row["_step"], row["train/loss"]) for row in rows] == [(n, 1 / n) for n in range(1, there + 1)]
        server.shutdown()
    assert list(runs) == ["run-1"]


class _Refusing(http.server.BaseHTTPRequestHandler):
    """The same answer to everything: 401 to an expired token, 500 in an outage."""

    status = 401

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "seconds", "said"), [(401, 30, "failed while starting"), (500, 4, "not closed in 4 s and given up")]
)
def test_a_server_that_refuses_ends_the_tracker_alone(status, seconds, said, tmp_path):
    """An expired token ends it at once; in an outage it tries again, until it is given up."""
    answering = type("_Answering", (_Refusing,), {"status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), answering)
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "b" * 40}
        done = wandb_run(tmp_path, seconds, **where)
        server.shutdown()
    assert f"wandb: {said}" in done.stderr and "b" * 40 not in done.stdout + done.stderr
