"""The pretrain stage in this process, on small shards: phases and growing steps resume at any step with equal bits."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertTokenizer

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.train import pretrain
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, write_shards

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
