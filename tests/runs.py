"""A small pipeline for tests that run the real command in real processes: about a second a stage beyond imports."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests import launch

TINY = """
corpus: {sources: SOURCES, txt_documents: line, min_chars: 5, holdout: 0.1}
tokenizer: {vocab_size: 120, model_max_length: 64}
shards: {shard_tokens: 2000}
model:
  preset: bert-tiny
  dropout: 0.1
  overrides: {hidden_size: 32, num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 64}
train: {steps: 30, sequence_length: 32, slot_tokens: 256, slots_per_step: 4, eval_every: 10, precision: fp32}
optim: {warmup_steps: 3}
finetune: {tasks: [], epochs: 2, seeds: 2, max_length: 32, precision: fp32}
report: {fill_mask: ["the [MASK] sees the house ."]}
runtime: {root: ROOT, checkpoint_every: 5, log_every: 5, threads: 1, workers: 2, progress: false}
"""
WORDS = ("the a one this that", "cat dog bird child king", "sees hears likes finds", "house tree river stone road")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(part.split()) for part in (*WORDS[:3], *WORDS[::3])) + " ."


def prepare(folder: Path, num_documents: int = 400) -> Path:
    """Write text and a config below `folder`; returns the config's path."""
    rng = random.Random(0)
    lines = [" ".join(sentence(rng) for _ in range(rng.randint(1, 6))) for _ in range(num_documents)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    config = folder / "tiny.yaml"
    config.write_text(TINY.replace("SOURCES", str(folder / "text.txt")).replace("ROOT", str(folder / "runs")))
    return config


NEW: dict[str, str | None] = {"PYTHONHASHSEED": "random"}
"""Makes `bertpipe` a new interpreter, for what others are compared with."""


def bertpipe(*arguments: str | Path, check: bool = True, **more: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `more` sets environment variables, or with None takes them away.

    Libraries read theirs as they are imported, so with `more` it is a new interpreter, and otherwise a fork of one that
    has imported them.
    """
    if more:
        command = [sys.executable, "-m", "bertpipe.cli", *map(str, arguments)]
        environment = {name: value for name, value in (os.environ | more).items() if value is not None}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    else:
        done = launch.command(*arguments)
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


def make_shards(folder: Path, reduction: str = "fast") -> Path:
    """Below `folder`: text, a config with `train.reduction`, and the artifacts that pretraining needs."""
    config = prepare(folder)
    config.write_text(config.read_text().replace("train: {", f"train: {{reduction: {reduction}, "))
    for stage in ("corpus", "tokenizer", "shards"):
        bertpipe(stage, "--config", config)
    return folder


def only(root: Path, stage: str) -> Path:
    """The one finished artifact of a stage."""
    (found,) = [p for p in root.glob(f"{stage}-*") if not p.name.endswith(".partial")]
    return found


def losses(folder: Path) -> list[float]:
    """Training losses of a run, step by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
