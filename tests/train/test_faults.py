"""Whatever happens to a run of several processes: it ends with its cause named, and the rerun is the run without it."""

import json
import re
import signal
from pathlib import Path

import pytest

from bertpipe.config_files import read_config
from bertpipe.model.objectives import OBJECTIVES
from bertpipe.pipeline import Pipeline
from bertpipe.train.pretrain import TokenShards
from bertpipe.train.samples import open_source
from tests import faults
from tests.kills import pretrain, same, wait_for_checkpoint
from tests.launch import launch
from tests.runs import bertpipe, make_shards, only
from tests.train.test_loop import place

ALL_CHECKPOINTS = ("--runtime.checkpoint_every", "1", "--runtime.keep_checkpoints", "40")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with text, config (exact) and the artifacts that pretraining needs."""
    return make_shards(tmp_path_factory.mktemp("made"), "exact")


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "runs"
    pretrain(shards, root, 1).done()
    return only(root, "pretrain")


def unfinished(root: Path) -> Path:
    (found,) = root.glob("pretrain-*.partial")
    return found


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finishes(shards: Path, root: Path, undisturbed: Path) -> None:
    """The same command, undisturbed and in one process, ends as if nothing had been."""
    pretrain(shards, root, 1).done()
    same(only(root, "pretrain"), undisturbed)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "call"), [(p, 2 if p in ("evaluation", "saving") else 12) for p in faults.PHASES])
def test_a_signal_to_one_rank_in_any_phase_stops_all_at_one_step(shards, undisturbed, tmp_path, phase, call):
    root, rank = tmp_path / "runs", "0" if phase == "saving" else "1"
    settings = {"FAULT_PHASE": phase, "FAULT_CALL": str(call), "FAULT_RANK": rank, "FAULT_SIGNAL": "SIGTERM"}
    started = pretrain(shards, root, 2, hook=faults.send, **settings)
    assert started.wait() == [130, 130], started.text()
    assert "interrupted; the same command goes on from here" in started.text()
    steps = [line["step"] for line in lines(unfinished(root)) if "loss" in line]
    newest = sorted(unfinished(root).glob("checkpoints/step-????????"))[-1]
    assert newest.name == f"step-{steps[-1]:08d}" and steps[-1] < 30, "nothing that was trained is lost"
    if phase == "forward":
        assert steps[-1] == 6, "the step in which it came is the last one"  # a process has two slots of a step
    if phase in ("forward", "evaluation", "saving"):  # the others leave what a signal in the forward pass leaves
        finishes(shards, root, undisturbed)


def test_a_signal_to_one_rank_before_the_first_step_stops_all_after_it(shards, undisturbed, tmp_path):
    """The first rank updates a copy before training, to know how large checkpoints will be."""
    root = tmp_path / "runs"
    settings = {"FAULT_PHASE": "optimizer", "FAULT_CALL": "1", "FAULT_RANK": "0", "FAULT_SIGNAL": "SIGTERM"}
    started = pretrain(shards, root, 2, hook=faults.send, **settings)
    assert started.wait() == [130, 130], started.text()
    assert (unfinished(root) / "checkpoints" / "step-00000001").is_dir()
    finishes(shards, root, undisturbed)


def test_a_second_signal_is_safe(shards, undisturbed, tmp_path):
    root = tmp_path / "runs"
    settings = {"FAULT_PHASE": "forward", "FAULT_CALL": "23", "FAULT_RANK": "0", "FAULT_SIGNAL": "SIGTERM+SIGTERM"}
    started = pretrain(shards, root, 1, hook=faults.send, **settings)
    assert started.wait() == [130], started.text()
    settings |= {"FAULT_SIGNAL": "SIGINT+SIGINT", "FAULT_CALL": "7"}  # the second SIGINT does not wait for the step
    started = pretrain(shards, root, 1, hook=faults.send, **settings)
    assert started.wait() == [130], started.text()
    finishes(shards, root, undisturbed)


def test_a_signal_ends_a_stage_that_does_not_train_too(shards, tmp_path):
    command = ["corpus", "--config", shards / "tiny.yaml", "--runtime.root", tmp_path / "runs"]
    started = launch(1, *command, hook=faults.terminate_corpus)
    assert started.wait() == [130], started.text()
    assert "interrupted; the same command goes on from here" in started.text()
    assert not [path for path in tmp_path.glob("runs/corpus-*") if not path.name.endswith(".partial")]
    launch(1, *command).done()


# --- lost processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_and_nobody_stays(shards, undisturbed, tmp_path, lost):
    root = tmp_path / "runs"
    started = pretrain(shards, root, 2)
    wait_for_checkpoint(started, root, 5)
    started.signal(signal.SIGKILL, lost)
    codes = started.wait()
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 2, started.text()
    pid = started.processes[lost].pid
    assert re.search(rf"step \d+: rank {1 - lost} of 2 waited in vain: rank {lost} \(process {pid} on ", started.text())
    finishes(shards, root, undisturbed)


def test_a_stopped_rank_is_named_and_ended(shards, undisturbed, tmp_path):
    root = tmp_path / "runs"
    started = pretrain(shards, root, 4, "--runtime.timeout", "5")
    wait_for_checkpoint(started, root, 5)
    started.signal(signal.SIGSTOP, 2)
    codes = started.wait()
    assert codes == [2, 2, -signal.SIGKILL, 2], started.text()
    blamed = re.findall(r"rank (\d) of 4 waited in vain: rank (\d) \(process \d+ on \S+\) ended or", started.text())
    assert sorted(blamed) == [("0", "2"), ("1", "2"), ("3", "2")]
    finishes(shards, root, undisturbed)


def test_a_rank_without_memory_ends_all(shards, undisturbed, tmp_path):
    root = tmp_path / "runs"
    started = pretrain(shards, root, 2, hook=faults.out_of_memory, FAULT_CALL="25")
    assert started.wait() == [2, 2]
    assert "rank 1 ran out of memory; take runtime.gradient_checkpointing: true" in started.text()
    assert "rank 0 of 2 waited in vain: rank 1" in started.text()
    finishes(shards, root, undisturbed)


@pytest.mark.parametrize("kind", ["exit", "deaf", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_lost_loader_worker_ends_all(shards, undisturbed, tmp_path, kind):
    root = tmp_path / "runs"
    more = ["--runtime.loader_workers", "1", "--runtime.timeout", "5"]
    started = pretrain(shards, root, 2, *more, hook=faults.lose_a_worker, FAULT_WORKER=kind)
    assert started.wait() == [2, 2]
    assert "a process that prepares batches (runtime.loader_workers) died or hangs" in started.text()
    finishes(shards, root, undisturbed)


# --- steps that must not be taken -------------------------------------------------------------------------------------


def slot_sum(shards: Path, step: int, slot: int) -> str:
    """What FAULT_SUM wants for a slot of a step (from 1)."""
    cfg = read_config([shards / "tiny.yaml"], [])
    train = TokenShards(Pipeline(cfg).locate("shards"), "train")
    _, source = open_source(cfg, OBJECTIVES["mlm"], train, shards / "plans", place())
    return str(int(source.slots(step - 1, slot, slot + 1)[0].input_ids.sum()))


@pytest.fixture(scope="module")
def poisoned(shards, tmp_path_factory) -> dict[int, Path]:
    """Runs of one and two processes with a NaN in the last slot of step 8, every checkpoint kept."""
    found, settings = {}, {"FAULT_SUM": slot_sum(shards, 8, 3)}
    for world in (1, 2):
        root = tmp_path_factory.mktemp("poisoned") / "runs"
        pretrain(shards, root, world, *ALL_CHECKPOINTS, hook=faults.poison, **settings).done()
        found[world] = only(root, "pretrain")
    return found


def test_a_step_with_a_nan_on_one_rank_is_skipped_on_all(poisoned, undisturbed):
    for run in poisoned.values():
        before, after = (run / "checkpoints" / f"step-0000000{step}" for step in (7, 8))
        for name in ("model/model.safetensors", "optimizer.safetensors"):
            assert (before / name).read_bytes() == (after / name).read_bytes()
        steps = [line for line in lines(run) if "lr" in line]
        assert [line["step"] for line in steps] == list(range(1, 31))
        assert [line["step"] for line in steps if "skipped" in line] == [8]
        assert "loss" not in steps[7] and steps[7]["skipped"] == "loss nan, gradient norm nan"
        assert steps[:7] == [line for line in lines(undisturbed) if "lr" in line][:7]
    same(poisoned[1], poisoned[2])


def test_steps_skipped_in_a_row_end_the_run_and_replay_gives_the_very_batch(shards, poisoned, tmp_path):
    root, more = tmp_path / "runs", ("--train.max_skipped", "3", "--runtime.checkpoint_every", "1")
    started = pretrain(shards, root, 2, *more, hook=faults.poison, FAULT_SUM="all")
    assert started.wait() == [2, 2]
    said = "step 3: loss nan (of slots 0, 1, 2, 3), gradient norm nan; 3 step(s) in a row could not be taken"
    assert said in started.text() and "`bertpipe replay --step 3`" in started.text()

    sums = slot_sum(shards, 8, 3)
    arguments = ["replay", "--config", shards / "tiny.yaml", "--runtime.root", poisoned[2].parent, *ALL_CHECKPOINTS]
    printed = launch(1, *arguments, "--step", "8", hook=faults.poison, FAULT_SUM=sums).done()
    assert "step 8 (epoch 0), from step-00000007: 4 slots" in printed
    assert re.search(r"slot 2: loss \d\.\d+, .*\nslot 3: loss nan, .*norm nan\nthe step: loss nan", printed)
    shown = [json.loads(line) for line in Path(printed.split("its text: ")[1].strip()).read_text().splitlines()]
    assert {line["slot"] for line in shown} == {0, 1, 2, 3}
    assert all(line["shown"].startswith("[CLS]") and line["shown"].endswith("[SEP]") for line in shown)
    for line in shown:
        pieces = line["shown"].split()
        assert all(0 < int(position) < len(pieces) - 1 for position in line["predict"])


def test_replay_gives_the_runs_own_figures_from_an_earlier_checkpoint(shards, undisturbed, tmp_path):
    """Step 29 from the checkpoint of step 25, three steps trained again; the run's folder is left as it is."""
    arguments = ["replay", "--config", shards / "tiny.yaml", "--runtime.root", undisturbed.parent, "--step", "29"]
    before = sorted((str(p), p.stat().st_mtime_ns) for p in undisturbed.rglob("*"))
    printed = launch(1, *arguments).done()
    line = next(line for line in lines(undisturbed) if line["step"] == 29)
    assert "from step-00000025" in printed
    assert f"the step: loss {line['loss']!r}, gradient norm {line['grad_norm']!r}" in printed
    assert sorted((str(p), p.stat().st_mtime_ns) for p in undisturbed.rglob("*")) == before
    for step, said in (("31", "--step: the run has steps 1 to 30, not 31"), ("x", "replay needs one step")):
        refused = bertpipe(*arguments[:-1], step, check=False)
        assert refused.returncode == 2 and said in refused.stderr


# --- weights that must not differ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_noticed_and_never_saved(shards, undisturbed, tmp_path, rank):
    root, settings = tmp_path / "runs", {"FAULT_CALL": "12", "FAULT_RANK": str(rank)}
    started = pretrain(shards, root, 4, "--runtime.desync_every", "1", hook=faults.flip_a_bit, **settings)
    assert started.wait() == [2] * 4
    step = 11 if rank == 0 else 12  # the first rank has updated a copy before, to know how large checkpoints will be
    assert f"step {step}: the weights of rank {rank} of 4 differ from the others'" in started.text()
    finishes(shards, root, undisturbed)


def test_a_flipped_bit_is_noticed_before_a_checkpoint(shards, undisturbed, tmp_path):
    root = tmp_path / "runs"
    started = pretrain(shards, root, 2, hook=faults.flip_a_bit, FAULT_CALL="12")  # every 100 steps, and at step 15
    assert started.wait() == [2, 2] and "step 15: the weights of rank" in started.text()
    finishes(shards, root, undisturbed)


def test_a_skipped_batch_is_noticed_at_once(shards, undisturbed, tmp_path):
    root = tmp_path / "runs"
    started = pretrain(shards, root, 2, hook=faults.skip_a_batch)
    assert started.wait() == [2, 2]
    assert "step 8: the processes are not at the same step's batch" in started.text()
    finishes(shards, root, undisturbed)
