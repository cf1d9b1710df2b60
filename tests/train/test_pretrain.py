"""The pretrain stage in this process, on small shards: phases and growing steps resume at any step with equal bits."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.data import phases
from bertpipe.downstream.reporting import facts
from bertpipe.errors import ConfigError
from bertpipe.pipeline import STAGES, Pipeline, settings_of
from bertpipe.train import budget, pretrain
from bertpipe.train.place import Place
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, write_shards

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {
        "preset": "bert-tiny",
        "overrides": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "optim": {"name": "adamw", "warmup_steps": 2},
    "runtime": {"checkpoint_every": 1, "keep_checkpoints": 99, "threads": 1, "device": "cpu", "progress": False},
}
TRAIN = {"steps": 8, "sequence_length": 32, "slot_tokens": 64, "slots_per_step": 4, "precision": "fp32"}
TRAIN |= {"eval_every": 4, "eval_tokens": 200}
PHASES = [{"share": 0.5, "sequence_length": 16}, {"share": 0.5, "sequence_length": 32, "slot_tokens": 96}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Artifacts that pretraining reads: shards of 60 documents and a tokenizer of their vocabulary."""
    folder = tmp_path_factory.mktemp("inputs")
    names = {number: f"[{name.upper()}]" for name, number in SPECIAL_IDS.items()}
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(names.get(number, f"w{number}") for number in range(VOCAB_SIZE)))
    with artifact.committing(folder / "tokenizer", fingerprint="t"):
        pass
    BertTokenizer(vocab=str(vocab)).save_pretrained(folder / "tokenizer")
    with artifact.committing(folder / "shards", fingerprint="s") as (scratch, _):
        write_shards(scratch, [9, 30, 17] * 20)
    return {name: folder / name for name in ("tokenizer", "shards")}


def config(train: dict | None = None, **sections: dict) -> Config:
    tree = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return Config(**tree, train=TRAIN | (train or {}))


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Pretrain into `out`; returns the counts."""
    counts: dict = {}
    pretrain.check(cfg)
    pretrain.run(cfg, inputs, out, counts)
    return counts


def interrupted(whole: Path, step: int, out: Path) -> Path:
    """`out` as a run leaves it that is killed after the checkpoint of `step`: the record has gone on behind it."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / name, out / name)
    for path in whole.glob("*.json*"):
        if path.name != artifact.MANIFEST:
            shutil.copy(path, out)
    return out


def same(a: Path, b: Path, last: int = TRAIN["steps"]) -> None:
    for name in ("model/model.safetensors", "metrics.jsonl", f"checkpoints/step-{last:08d}/optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_phases_and_growing_steps_go_on_from_any_step(inputs, tmp_path):
    cfg = config({"phases": PHASES, "batch_warmup": [{"steps": 2, "slots": 2}]}, optim={"name": "lamb"})
    counts = run(cfg, inputs, tmp_path / "whole")
    steps = [line for line in lines(tmp_path / "whole") if "loss" in line]
    room = [round(line["tokens"] / line["fill"]) for line in [steps[0]]]
    assert room == [2 * 64] and counts["steps"] == 8
    assert steps[4]["epoch"] > steps[3]["epoch"], "the second phase"
    assert steps[7]["tokens"] - steps[4]["tokens"] > 3 * 3 * 96
    for step in (1, 4, 6):
        out = interrupted(tmp_path / "whole", step, tmp_path / str(step))
        run(cfg, inputs, out)
        same(tmp_path / "whole", out)


def manifest(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict) -> None:
    """Publish a run that was made here in place, as the pipeline would."""
    parents = {name: artifact.read_manifest(path)["fingerprint"] for name, path in inputs.items()}
    recipe = {"stage": "pretrain", "settings": settings_of(STAGES["pretrain"], cfg), "parents": parents, "raw": {}}
    (out / "manifest.json").write_text(json.dumps(recipe | {"fingerprint": "f", "counts": counts}))


def test_a_longer_run_goes_on_where_the_shorter_ended(inputs, tmp_path):
    """At a constant rate, 4 steps and 4 more are 8 steps, byte for byte; a kill on the way changes nothing."""
    constant = {"schedule": "constant", "name": "stableadamw"}
    short, long = (config({"steps": steps, "seed": 7}, optim=constant) for steps in (4, 8))
    run(long, inputs, tmp_path / "whole")
    manifest(short, inputs, tmp_path / "short", run(short, inputs, tmp_path / "short"))
    more = config({"steps": 8, "seed": 7, "extend_from": str(tmp_path / "short")}, optim=constant)
    assert run(more, inputs, tmp_path / "more")["extended_after"] == 4
    same(tmp_path / "whole", tmp_path / "more")
    assert not (tmp_path / "more" / "checkpoints" / "step-00000003").exists(), "only the last one was taken over"
    out = interrupted(tmp_path / "more", 6, tmp_path / "again")
    run(more, inputs, out)
    same(tmp_path / "whole", out)


def test_the_schedule_of_the_longer_run_takes_over(inputs, tmp_path):
    short = config({"steps": 4})
    manifest(short, inputs, tmp_path / "short", run(short, inputs, tmp_path / "short"))
    longer = {"steps": 8, "extend_from": str(tmp_path / "short")}
    more = config(longer, optim={"schedule": "wsd", "decay_share": 0.5, "cooldown": "linear"})
    run(more, inputs, tmp_path / "more")
    rates = [line["lr"] / more.optim.lr for line in lines(tmp_path / "more") if "lr" in line]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 1, 0.75, 0.5, 0.25])

    for changes, optim, message in (
        ({"seed": 1}, {}, r"train.seed is 1, the parent's was 0"),
        ({"slots_per_step": 2}, {}, r"train.slots_per_step is 2, the parent's was 4"),
        ({}, {"lr": 1.0}, r"optim.lr is 1.0, the parent's was 0.002"),
        ({"steps": 4}, {}, r"train.steps: 4, but the run that train.extend_from names has 4 already"),
        ({"phases": PHASES}, {}, r"a run with phases can't be extended"),
        ({"extend_from": str(tmp_path)}, {}, r"train.extend_from: .* no manifest.json here"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain.check(config(longer | changes, optim=optim))
    elsewhere = shutil.copytree(inputs["shards"], tmp_path / "shards")
    (elsewhere / "manifest.json").write_text(json.dumps({"fingerprint": "other"}))
    with pytest.raises(ConfigError, match="was trained on another shards artifact"):
        run(config(longer), inputs | {"shards": elsewhere}, tmp_path / "other")


def test_a_budgeted_run_is_the_run_with_its_number_of_steps(inputs, tmp_path, capsys, monkeypatch):
    """Measuring leaves nothing behind: weights, optimizer, order and record are those of train.steps."""
    phased = {"phases": PHASES, "slots_per_step": 2}
    out = tmp_path / "budgeted"
    out.mkdir()
    tight = config(phased | {"budget": "10s"})
    cost = budget.Cost((1.0, 1.0), 0.0, 0.0, 4, 1)
    measured = []

    def measure() -> budget.Cost:
        measured.append(1)
        return cost

    place = Place(tight.runtime, "fp32")
    frozen, record = budget.freeze(tight, out, time.monotonic(), 0, place, measure)
    assert frozen.train.steps == record["steps"] == 9, "95 % of ten seconds at one a step"
    again, _ = budget.freeze(tight, out, time.monotonic() - 8, 0, place, measure)
    assert again.train.steps == 9 and len(measured) == 1, "frozen"
    with pytest.raises(ConfigError, match=r"train.budget: 10s is too short for a step"):
        budget.freeze(tight, tmp_path, time.monotonic() - 11, 0, place, measure)

    run(config(phased | {"steps": 9}), inputs, tmp_path / "steps")
    (out / "budget.json").unlink()
    monkeypatch.setattr(budget, "affordable", lambda *_: 9)  # whatever was measured, to have a run to compare with
    counts = run(tight, inputs, out)
    assert counts["steps"] == counts["budget"]["steps"] == 9
    real = counts["budget"]["cost_seconds"]
    assert len(real["steps"]) == 2 and min(*real["steps"], real["checkpoint"], real["evaluation"]) > 0
    assert not (out / "measuring").exists() and "budget: 10s is 9 steps" in capsys.readouterr().out
    same(tmp_path / "steps", out, 9)
    manifest(tight, inputs, out, counts)
    shown = facts.gather(tight, {"pretrain": out})["config"]["train"]
    assert (shown["steps"], shown["budget"]) == (9, "10s"), "what report and card say"
    resumed = interrupted(out, 5, tmp_path / "resumed")
    monkeypatch.setattr(budget, "measure", None)  # a resume must not measure again
    run(tight, inputs, resumed)
    same(tmp_path / "steps", resumed, 9)


@settings(max_examples=50, deadline=None)
@given(
    seconds=st.floats(0.1, 1e3),
    costs=st.tuples(*[st.floats(0.01, 9)] * 3),
    every=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    begun=st.integers(0, 40),
)
def test_a_budget_buys_as_many_steps_as_fit(seconds, costs, every, begun):
    """Step by step with a clock: the number of steps fits, and one more does not."""
    train = config().train.model_copy(update={"budget": "1s"})
    cost = budget.Cost((costs[0],), costs[1], costs[2], *every)

    def clock(steps: int) -> float:
        return sum(costs[0] for _ in range(steps)) + sum(
            costs[1] * -(-steps // every[0]) + costs[2] * (1 - (-steps // every[1])) for _ in range(1)
        )

    found = budget.affordable(train, cost, seconds, begun)
    spent = clock(begun) if begun else 0.0
    assert found >= begun
    assert found == begun or clock(found) - spent <= seconds + 1e-6
    assert clock(found + 1) - spent > seconds - 1e-6


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("6h", 21600), ("1.5d", 129600)])
def test_times_are_read(text, seconds):
    assert budget.seconds_of(text) == seconds
    pretrain.check(config({"budget": text}))


@pytest.mark.parametrize("text", ["6 hours", "6H", "600", 600, "h", "0s", "-1h", ""])
def test_other_times_are_refused(text):
    with pytest.raises(ConfigError, match=r"train.budget: .* is no time; write a number and s, m, h or d"):
        pretrain.check(config({"budget": text}))


def test_the_parents_fingerprint_enters_its_place_does_not(inputs, tmp_path):
    """Two runs that extend the same run from two places are one run; another parent makes another."""

    def recipe(place: str, fingerprint: str) -> dict:
        folder = tmp_path / place
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))
        cfg = config(
            {"extend_from": str(folder)},
            runtime={"root": str(tmp_path)},
            corpus={"sources": str(ROOT / "constraints.txt")},
        )
        return Pipeline(cfg).recipe("pretrain")

    a, b, c = recipe("a", "one"), recipe("b", "one"), recipe("c", "two")
    assert a == b and a["fingerprint"] != c["fingerprint"] and a["raw"]["extends"] == "one"
    with pytest.raises(ConfigError, match=r"train.extend_from: .* no manifest.json here"):
        Pipeline(
            config({"extend_from": str(tmp_path / "d")}, corpus={"sources": str(ROOT / "constraints.txt")})
        ).recipe("pretrain")


TWO = """
import json, sys
from pathlib import Path

from bertpipe.config import Config
from bertpipe.data import phases
from bertpipe.train import budget, pretrain

budget.affordable = lambda *_: 8  # whatever was measured, to have a run to compare with
inputs = {name: Path(sys.argv[2]) / name for name in ("tokenizer", "shards")}
pretrain.run(Config(**json.loads(sys.argv[1])), inputs, Path(sys.argv[3]), {})
"""


@pytest.mark.slow
def test_two_processes_agree_on_the_budget_and_see_one_processs_batches(inputs, tmp_path):
    """Phases, growing steps and a measured budget: torchrun with two gloo processes, losses within 1e-4."""
    growing = {"phases": PHASES, "batch_warmup": [{"steps": 2, "slots": 2}]}
    run(config(growing), inputs, tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    cfg = config(growing | {"budget": "10s"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "two.py"), cfg.model_dump_json(), str(inputs["shards"].parent), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("budget: 10s is 8 steps") == 1
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key in ("step", "epoch", "tokens", "sequences", "fill", "lr"):
            assert one.get(key) == two.get(key)
        for key in ("loss", "eval_loss", "grad_norm"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), abs=1e-4)
    refused = config({"batch_warmup": [{"steps": 2, "slots": 1}]})
    with pytest.raises(ConfigError, match=r"2 processes can't share train.batch_warmup = 1 slots evenly"):
        Place.share(SimpleNamespace(world=2), *phases.smallest_step(refused.train))  # type: ignore[arg-type]
