"""Kill it anywhere, run it again: the run that was never interrupted, byte for byte (one process, dropout 0.1)."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kills import pretrain, same
from tests.runs import NEW, bertpipe, make_shards, only


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with text, config and the artifacts that pretraining needs."""
    return make_shards(tmp_path_factory.mktemp("made"))


def copy(shards: Path, folder: Path) -> Path:
    """The same artifacts under a root of their own; returns that root."""
    shutil.copytree(shards / "runs", folder / "runs")
    return folder / "runs"


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> Path:
    root = copy(shards, tmp_path_factory.mktemp("whole"))
    bertpipe("pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root, **NEW)
    return only(root, "pretrain")


def start(shards: Path, root: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bertpipe.cli", "pretrain", "--config", shards / "tiny.yaml"]
    return subprocess.Popen([*map(str, command), "--runtime.root", str(root), *more], stderr=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, root: Path, step: int, seconds: float) -> bool:
    """kill -9 `seconds` after the checkpoint of `step` stands; whether the run was still going."""
    while process.poll() is None and step and not list(root.glob(f"pretrain-*/checkpoints/step-{step:08d}")):
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.wait()
    return process.returncode == -signal.SIGKILL


def test_a_run_of_a_million_steps_begins_at_once(shards, tmp_path):
    root = copy(shards, tmp_path)
    process = start(shards, root, "--train.steps", "1000000", "--optim.schedule", "constant")
    assert kill_after(process, root, 5, 0)
    assert 1 <= len(list(root.glob("pretrain-*.partial/plans/*.npy"))) <= 4


@pytest.mark.slow
def test_kill_9_at_three_moments_changes_nothing(shards, uninterrupted, tmp_path):
    root = copy(shards, tmp_path)
    moments = random.Random(time.time_ns())
    kills = [kill_after(start(shards, root), root, step, moments.uniform(0, 0.15)) for step in (5, 15, 20)]
    assert sum(kills) >= 2, "the run was over before it could be killed"
    done = bertpipe("pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root)
    assert "resuming after step" in done.stdout
    same(only(root, "pretrain"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_130(shards, uninterrupted, tmp_path, number):
    root = copy(shards, tmp_path)
    process = start(shards, root)
    while process.poll() is None and not list(root.glob("pretrain-*/checkpoints/step-00000005")):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == "bertpipe: interrupted; the same command goes on from here"
    assert not [p for p in root.glob("pretrain-*") if not p.name.endswith(".partial")]
    bertpipe("pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root)
    same(only(root, "pretrain"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"), [("model/model.safetensors", "content differs"), ("manifest.json", "not readable as JSON")]
)
def test_a_damaged_checkpoint_is_passed_over_aloud(shards, uninterrupted, tmp_path, name, message):
    root = copy(shards, tmp_path)
    assert kill_after(start(shards, root), root, 10, 0)
    newest = sorted(root.glob("pretrain-*/checkpoints/step-????????"))[-1]
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name != "manifest.json" else content[:99])
    done = bertpipe("pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root)
    assert "checkpoint passed over: " in done.stderr and str(newest / name) in done.stderr and message in done.stderr
    assert "resuming after step" in done.stdout
    same(only(root, "pretrain"), uninterrupted)


def test_interrupted_between_the_last_step_and_publishing(shards, uninterrupted, tmp_path):
    """All steps are done and saved: the rerun only evaluates and publishes, and its manifest is complete."""
    root = copy(shards, tmp_path)
    partial = root / f"{uninterrupted.name}.partial"
    shutil.copytree(uninterrupted, partial)
    (partial / "manifest.json").unlink()
    shutil.rmtree(partial / "model")
    (partial / "checkpoints" / "step-00000027.partial").mkdir()
    done = bertpipe("pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root)
    assert "resuming after step 30" in done.stdout
    same(only(root, "pretrain"), uninterrupted)
    counts = [json.loads((f / "manifest.json").read_text())["counts"] for f in (uninterrupted, only(root, "pretrain"))]
    assert counts[0]["eval_loss"] == counts[1]["eval_loss"]
    assert not list(only(root, "pretrain").glob("checkpoints/*.partial"))


def test_two_processes_see_one_processs_batches(shards, uninterrupted, tmp_path):
    """Two gloo processes: the same batches, losses within 1e-4; three processes are refused."""
    root = tmp_path / "runs"
    refused = pretrain(shards, root, 3)
    assert refused.wait() == [2, 2, 2]
    said = "3 processes can't share train.slots_per_step = 4 slots evenly; run 1, 2, 4 processes"
    assert said in refused.text()
    assert "2 process(es) x 1 thread(s)" in pretrain(shards, root, 2).done()
    read = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (uninterrupted, only(root, "pretrain"))
    ]
    assert len(read[0]) == len(read[1])
    for one, two in zip(*read, strict=True):
        assert one.keys() == two.keys()
        for key in ("step", "epoch", "tokens", "sequences", "fill"):
            assert one.get(key) == two.get(key)
        for key in ("loss", "eval_loss", "grad_norm"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), abs=1e-4)
