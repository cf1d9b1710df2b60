"""F01, F04, E4: killed at random instants and gone on with, on the same or on other numbers of processes."""

import random
import time
from pathlib import Path

import pytest

from tests.kills import WORLDS, pretrain, same, survive, wait_for_checkpoint
from tests.runs import make_shards, only


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("made"), "exact")


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> tuple[Path, float]:
    """The run of one process, and how many seconds one takes once the launch server is warm."""
    for name in ("first", "second"):
        root = tmp_path_factory.mktemp(name) / "runs"
        started = time.monotonic()
        pretrain(shards, root, 1).done()
    return only(root, "pretrain"), time.monotonic() - started


@pytest.mark.parametrize("world", WORLDS)
def test_killed_at_random_it_is_the_run_that_was_never_interrupted(shards, undisturbed, tmp_path, world):
    reference, seconds = undisturbed
    seed = time.time_ns()
    kills, longest = 2 if world < 4 else 1, seconds * max(1.0, world / 2)
    found = survive(shards, tmp_path, reference, kills, longest, lambda rng: world, seed)
    assert found.runs >= 1 and found.most_wasted <= 10, seed  # two intervals: the newest may still be in writing


def test_killed_and_resumed_on_other_numbers_of_processes(shards, undisturbed, tmp_path):
    reference, seconds = undisturbed
    seed = time.time_ns()
    survive(shards, tmp_path, reference, 3, 1.5 * seconds, lambda rng: rng.choice(WORLDS), seed)


def test_killed_while_it_resumes_and_resumed_twice_from_one_checkpoint(shards, undisturbed, tmp_path):
    """F04: five starts in a row that are killed at once or within the first steps, two of them from one checkpoint."""
    reference, _ = undisturbed
    root, rng = tmp_path / "runs", random.Random(4)
    for number in range(5):
        started = pretrain(shards, root, 2)
        wait_for_checkpoint(started, root, 5 * (1 + number // 2))
        if number % 2:
            time.sleep(rng.uniform(0, 0.05))
        started.kill()
    pretrain(shards, root, 1).done()
    same(only(root, "pretrain"), reference)
