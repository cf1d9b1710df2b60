"""What the trackers wrote, read back by their own means."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


def wandb_rows(path: Path) -> list[dict]:
    """Every record of a .wandb file."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


def wandb_history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and figures of each line of a .wandb file's history."""
    items = [row["history"]["item"] for row in wandb_rows(path) if row["type"] == "history"]
    return [(item["_step"], {name: v for name, v in item.items() if not name.startswith("_")}) for item in items]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each name, all points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


@contextmanager
def dashboard(*arguments: str | Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen]]:
    """`bertpipe dashboard ... --port 0` and its address; it may be ended before."""
    command = [sys.executable, "-m", "bertpipe.cli", "dashboard", *map(str, arguments), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(name, None)
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None and started.stderr is not None
        line = started.stdout.readline()
        assert " at http://127.0.0.1:" in line, line + started.stderr.read()
        yield line.partition(" at ")[2].partition(" ")[0], started
    finally:
        started.kill()
        started.communicate()


def fetch(address: str, body: dict | None = None) -> bytes:
    """What an address answers, to a POST of JSON where there is a body."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    with opener.open(urllib.request.Request(address, data, {"Content-Type": "application/json"}), timeout=60) as got:
        return got.read()
