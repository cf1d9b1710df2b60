"""H6, F15: a run is gone on with under its own recipe; under another it is refused, or overridden in writing."""

import json
import signal
from pathlib import Path

import pytest

from tests.kills import pretrain, wait_for_checkpoint
from tests.launch import launch
from tests.runs import bertpipe, make_shards


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, Path]:
    """Config folder and root of a run that was stopped after its checkpoint of step 10."""
    shards, root = make_shards(tmp_path_factory.mktemp("made"), "exact"), tmp_path_factory.mktemp("run") / "runs"
    started = pretrain(shards, root, 1)
    wait_for_checkpoint(started, root, 10)
    started.signal(signal.SIGTERM)
    assert started.wait() == [130]
    return shards, root


def go_on(interrupted: tuple[Path, Path], *more: str):
    shards, root = interrupted
    started = launch(1, "pretrain", "--config", shards / "tiny.yaml", "--runtime.root", root, *more)
    return started.wait()[0], started.text("out") + started.text("err")


def unfinished(root: Path) -> Path:
    return next(path for path in root.glob("pretrain-*.partial") if list(path.glob("checkpoints/step-*")))


def test_an_unfinished_run_of_another_recipe_is_mentioned_with_the_first_difference(interrupted):
    code, text = go_on(interrupted, "--train.seed", "7", "--train.steps", "3")
    assert code == 0, text
    assert f"note: {unfinished(interrupted[1])} is unfinished and not gone on with: train.steps: was 30, is 3" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--train.seed", "7"), "train.seed is 7, the parent's was 0"),
        (("--optim.lr", "1e-4"), "optim.lr is 0.0001, the parent's was 0.002"),
        (("--masking.probability", "0.3"), "masking.probability is 0.3, the parent's was 0.15"),
    ],
)
def test_a_changed_recipe_is_refused_with_its_difference(interrupted, change, said):
    parent = unfinished(interrupted[1])
    code, text = go_on(interrupted, "--train.extend_from", str(parent), "--train.steps", "40", *change)
    assert code == 2
    assert f"train.extend_from: {said}; only the number of steps and the schedule may differ" in text
    assert "--train.extend_changed true" in text


def test_changed_data_are_refused_and_an_override_is_written_down(interrupted):
    shards, root = interrupted
    parent, cut = unfinished(root), ("--shards.shard_tokens", "1500")
    bertpipe("shards", "--config", shards / "tiny.yaml", "--runtime.root", root, *cut)
    more = ("--train.extend_from", str(parent), "--train.steps", "40", *cut)
    code, printed = go_on(interrupted, *more)
    assert code == 2 and f"{parent} was trained on another shards artifact than " in printed

    code, printed = go_on(interrupted, *more, "--train.seed", "7", "--train.extend_changed", "true")
    assert code == 0, printed
    assert "note: train.extend_from: train.seed is 7, the parent's was 0" in printed
    manifests = [json.loads(path.read_text()) for path in root.glob("pretrain-????????????/manifest.json")]
    (counts,) = [m["counts"] for m in manifests if m["settings"]["train"]["extend_changed"]]
    assert counts["extended_after"] >= 10 and counts["steps"] == 40
    assert counts["extended_changes"][0] == "train.seed is 7, the parent's was 0"
    assert "another shards artifact" in counts["extended_changes"][1]
