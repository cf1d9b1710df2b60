"""A small checkpoint and small tasks in GLUE's layout, and the finetune stage run on them in this process."""

import gc
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig, BertForMaskedLM

from bertpipe.artifact import PARTIAL
from bertpipe.config import Config
from bertpipe.pipeline import Pipeline
from tests.downstream.conftest import TEXT, write_tokenizer

COLUMNS = {
    "sst2": ("sentence",),
    "cola": ("sentence",),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
SIZES = {"train": 24, "validation": 30, "test": 9}


def write_checkpoint(folder: Path) -> Path:
    """A masked-LM checkpoint with a tokenizer of TEXT's words."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=64, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def write_task(glue: Path, name: str, splits: tuple[str, ...] = tuple(SIZES)) -> None:
    """Whether the (first) sentence has the word `the`; for stsb how long it is. The test split's labels are secret."""
    draw = random.Random(name)
    for split in splits:
        texts = {
            c: [" ".join(draw.choices(TEXT.split(), k=draw.randint(1, 12))) for _ in range(SIZES[split])]
            for c in COLUMNS[name]
        }
        first = texts[COLUMNS[name][0]]
        labels = [float(len(x.split())) / 3 if name == "stsb" else int("the" in x.split()) for x in first]
        if split == "test":
            labels = [-1 for _ in labels]
        (glue / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({**texts, "label": labels, "idx": list(range(len(labels)))}), glue / name / f"{split}.parquet"
        )


def config(start: Path, root: Path, **finetune: Any) -> Config:
    """Settings of a quick run; `start` holds model/ and glue/."""
    settings = {"tasks": "sst2", "data": str(start / "glue"), "model": str(start / "model"), "seeds": 2, "epochs": 1}
    settings |= {"batch_size": 12, "lr": 1e-2, "max_length": 32, "precision": "fp32"}
    runtime = {"root": str(root), "threads": 1, "device": "cpu", "progress": False}
    return Config(finetune=settings | finetune, runtime=runtime)


def tune(start: Path, root: Path, **finetune: Any) -> Path:
    """Run the stage; the artifact's folder."""
    gc.freeze()  # each run ends with a collection, which would look through all that the tests have imported
    pipeline = Pipeline(config(start, root, **finetune))
    pipeline.run("finetune")
    return pipeline.locate("finetune")


def scores(folder: Path) -> dict[str, Any]:
    """The tasks of an artifact's scores.json."""
    return json.loads((folder / "scores.json").read_text())["tasks"]


def cells(root: Path) -> dict[str, int]:
    """When each finished run below `root` was made, by its folder; models of their own are left out."""
    found = (root / "cells").glob("*/manifest.json")
    runs = [path for path in found if "-model" not in path.parent.name and path.parent.suffix != PARTIAL]
    return {path.parent.name: path.stat().st_mtime_ns for path in runs}


def contents(folder: Path) -> dict[str, bytes]:
    """What a run determines: every file but those that tell the time."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    timeless = {
        name: path.read_bytes() for name, path in found.items() if path.name not in ("speed.jsonl", "manifest.json")
    }
    return {name: _without_time(content) if name.endswith(".json") else content for name, content in timeless.items()}


def _without_time(content: bytes) -> bytes:
    return b"\n".join(line for line in content.split(b"\n") if b"wall_seconds" not in line)
