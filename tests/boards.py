"""What the trackers wrote, read back by their own means."""

import gzip
import http.server
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

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


class WandbServer(http.server.BaseHTTPRequestHandler):
    """As much of a wandb server as one project of me's needs: keeps each run's history, and says where it ends."""

    runs: ClassVar[dict[str, list[str]]] = {}
    """Lines of wandb-history.jsonl by run's id."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith(("/graphql", "/file_stream")):  # telemetry
            self.send_error(404)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body)
        answer = self.stream(asked) if self.path.endswith("/file_stream") else {"data": self.query(asked)}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def stream(self, asked: dict) -> dict:
        history = self.runs.setdefault(self.path.split("/")[-2], [])
        if (file := asked.get("files", {}).get("wandb-history.jsonl")) is not None:
            history[file["offset"] :] = file["content"]
        return {"limits": {}}

    def query(self, asked: dict) -> dict:
        name = asked["variables"].get("name", "")
        lines = self.runs.get(name, [])
        me = {"id": "me", "name": "me"}
        bucket = {"id": name, "name": name, "config": "{}", "historyLineCount": len(lines)}
        if "mutation UpsertBucket" in asked["query"]:
            made = bucket | {"displayName": name, "project": {"id": "trial", "name": "trial", "entity": me}}
            return {"upsertBucket": {"bucket": made, "inserted": not lines}}
        if "query RunResumeStatus" in asked["query"]:
            counts = {
                "logLineCount": 0,
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "historyTail": json.dumps(lines[-1:]),
            }
            more = {"summaryMetrics": "{}", "displayName": name, "tags": [], "notes": "", "wandbConfig": '{"t": 1}'}
            return {"model": {"id": "trial", "name": "trial", "entity": me, "bucket": bucket | counts | more}}
        if "query Viewer" in asked["query"]:
            return {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "mutation CreateRunFiles" in asked["query"]:
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        return {"serverInfo": {"features": []}}

    def log_message(self, *_: object) -> None:
        pass
