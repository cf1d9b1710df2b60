"""kill -9 at random instants, restarts, and what must be true of every one of them."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bertpipe.train import checkpoint_files
from tests.launch import Launch, launch
from tests.runs import only

STEPS = 30
COMPARED = ("model/model.safetensors", "metrics.jsonl", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors")
WORLDS = (1, 2, 4)


def pretrain(shards: Path, root: Path, world: int, *more: str | Path, hook=None, **environment: str) -> Launch:
    """Start pretraining below `root`, whose data artifacts are copied from `shards` if it is new."""
    if not root.exists():
        shutil.copytree(shards / "runs", root)
    command = ["pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root, *more]
    return launch(world, *command, hook=hook, **environment)


def same(a: Path, b: Path) -> None:
    """Weights, moments and the record of two runs are the same bytes."""
    for name in COMPARED:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def wait_for_checkpoint(started: Launch, root: Path, step: int) -> None:
    """Until the checkpoint of `step` stands below `root`, or the run is over."""
    while started.running() and not list(root.glob(f"pretrain-*/checkpoints/step-{step:08d}")):
        time.sleep(0.002)


def steps_of(root: Path) -> list[int]:
    """Steps that the record of the unfinished run under `root` has."""
    records = [path.read_text().splitlines() for path in root.glob("pretrain-*/metrics.jsonl")]
    lines = [json.loads(line) for record in records for line in record if line.endswith("}")]
    return [line["step"] for line in lines if "lr" in line]


@dataclass
class Campaign:
    """What came of it."""

    kills: int = 0
    runs: int = 0
    """That came to their end, each with the bits of the undisturbed one."""
    most_wasted: int = 0
    """Steps of the record that the newest checkpoint did not hold when a run was killed."""


def survive(
    shards: Path,
    folder: Path,
    undisturbed: Path,
    kills: int,
    seconds: float,
    world: Callable[[random.Random], int],
    seed: int,
) -> Campaign:
    """Kill runs, all processes at once, at instants drawn from 0 to `seconds` after their start; go on after each.

    At every kill each visible checkpoint is whole; each run that comes to its end has the undisturbed run's bits.
    """
    rng, found = random.Random(seed), Campaign()
    root = folder / "runs"
    while True:
        started = pretrain(shards, root, world(rng))
        if found.kills < kills:
            started.processes[0].join(rng.uniform(0, seconds))
            if started.running():
                started.kill()
                found.kills += 1
                visible = sorted(root.glob("pretrain-*/checkpoints/step-????????"))
                assert not [line for path in visible for line in checkpoint_files.problems(path)]
                newest = int(visible[-1].name.removeprefix("step-")) if visible else 0
                found.most_wasted = max([found.most_wasted, *(step - newest for step in steps_of(root))])
                continue
        started.done()
        same(only(root, "pretrain"), undisturbed)
        found.runs += 1
        if found.kills == kills:
            return found
        shutil.rmtree(root)
