"""What the artifacts of one run say, as one JSON-able tree: the report shows it, the model card is made from it.

Only reads. Whatever an artifact does not say is left out, so a page of half a run can still be made.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, TypeGuard

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.errors import ArtifactError

STAGES = ("corpus", "tokenizer", "shards", "pretrain", "finetune")
MAX_POINTS = 1_200  # points of a curve; longer logs are averaged over blocks of steps


def gather(cfg: Config, inputs: dict[str, Path]) -> dict[str, Any]:
    """Everything known of the run whose artifact folders are `inputs`, by stage; ArtifactError on unreadable files."""
    manifests = {stage: artifact.read_manifest(inputs[stage]) for stage in STAGES if stage in inputs}
    facts: dict[str, Any] = {
        "title": cfg.report.title,
        "missing": [stage for stage in STAGES if stage not in inputs],
        "config": cfg.model_dump(mode="json"),
        "artifacts": [describe(stage, inputs[stage], manifest) for stage, manifest in manifests.items()],
        "environment": {},
    }
    for manifest in manifests.values():  # the latest stage's word counts
        facts["environment"] |= {"bertpipe": manifest.get("code_version")} | manifest.get("environment", {})
    if "corpus" in inputs:
        facts["corpus"] = read_json(inputs["corpus"] / "ledger.json")
    if "tokenizer" in inputs:
        facts["tokenizer"] = read_json(inputs["tokenizer"] / "report.json")
    if "shards" in inputs:
        facts["shards"] = read_json(inputs["shards"] / "shards.json").get("splits", {})
    if "pretrain" in inputs:
        counts = manifests["pretrain"].get("counts", {})
        facts |= pretraining(inputs["pretrain"], counts)
        facts["pretrain"]["processor"] = manifests["pretrain"].get("environment", {}).get("processor")
        if cfg.train.budget is not None:  # the number of steps that it came to, in place of the setting
            facts["config"]["train"]["steps"] = counts.get("steps")
    if "finetune" in inputs:
        facts["finetune"] = read_json(inputs["finetune"] / "scores.json").get("tasks", {})
    return facts


def describe(stage: str, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where an artifact lies and what it cost."""
    files, raw = manifest.get("files", {}), manifest.get("raw")
    return {
        "stage": stage,
        "fingerprint": manifest.get("fingerprint"),
        "content": artifact.digest(raw) if raw else None,
        "folder": str(folder),
        "num_files": len(files),
        "bytes": sum(file.get("bytes", 0) for file in files.values()),
        "wall_seconds": manifest.get("wall_seconds"),
    }


def pretraining(folder: Path, counts: dict[str, Any]) -> dict[str, Any]:
    """Figures, curves and the shape of the pretrained model."""
    metrics = read_lines(folder / "metrics.jsonl")
    speed = read_lines(folder / "speed.jsonl")
    figures = dict(counts)
    rates = [row["tokens_per_second"] for row in speed if is_number(row.get("tokens_per_second"))]
    if rates:
        figures.setdefault("tokens_per_second", statistics.median(rates))
    shares = [row["mfu"] for row in speed if is_number(row.get("mfu"))]
    if shares:
        figures.setdefault("mfu", statistics.median(shares))
    memory = [row["memory_bytes"] for row in speed if is_number(row.get("memory_bytes"))]
    if memory:
        figures.setdefault("memory_bytes", max(memory))
    loss, floor = figures.get("eval_loss"), figures.get("eval_unigram_cross_entropy")
    if is_number(loss) and is_number(floor):
        figures["gap"] = floor - loss
    train = [row for row in metrics if "loss" in row]
    if train and is_number(train[-1].get("tokens")):
        figures.setdefault("tokens", train[-1]["tokens"])
    fills = [row["fill"] for row in train if is_number(row.get("fill"))]
    if fills:
        figures["fill"] = statistics.fmean(fills)
    config = read_json(folder / "model" / "config.json")
    tokens = read_json(folder / "model" / "tokenizer_config.json")
    shape = {
        "architecture": (config.get("architectures") or [config.get("model_type", "model")])[0],
        "model_type": config.get("model_type"),
        "num_layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "num_heads": config.get("num_attention_heads"),
        "vocab_size": config.get("vocab_size"),
        "mask_token": tokens.get("mask_token"),
        "max_positions": config.get("max_position_embeddings"),
    }
    pair = next((name for name in PAIR_PARTS if train and f"{name}_loss" in train[-1]), None)
    more = (f"{pair}_loss", f"{pair}_accuracy") if pair else ()
    held = tuple(f"eval_{key}" for key in more)
    return {
        "pretrain": figures,
        "model": shape,
        "curves": {
            "train": columns(train, TRAIN_KEYS + more),
            "eval": columns([row for row in metrics if "eval_loss" in row], EVAL_KEYS + held),
            "speed": columns(speed, SPEED_KEYS),
            "steps_per_point": block_size(len(train)),
            "pair": pair,
        },
    }


PAIR_PARTS = ("nsp", "sop")
"""Names of the second part of an objective on sentence pairs; the first is mlm."""
TRAIN_KEYS = ("step", "tokens", "loss", "mlm_loss", "accuracy", "lr", "grad_norm", "fill")
SPEED_KEYS = ("step", "seconds", "tokens_per_second", "data_wait_share", "memory_bytes", "mfu")
EVAL_KEYS = ("step", "eval_loss", "eval_accuracy", "eval_perplexity", "eval_unigram_cross_entropy")


def block_size(num_rows: int, most: int = MAX_POINTS) -> int:
    """Rows averaged into one point of a curve of at most `most`."""
    return max(1, math.ceil(num_rows / most))


def columns(rows: list[dict[str, Any]], keys: tuple[str, ...], most: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """Rows to columns, averaged over blocks; `step` is the last of its block, gaps are None, unknown keys left out."""
    size = block_size(len(rows), most)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    out: dict[str, list[float | None]] = {}
    for key in keys:
        if any(key in row for row in rows):
            out[key] = [block[-1].get(key) if key == "step" else _mean(block, key) for block in blocks]
    return out


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if is_number(row.get(key))]
    return statistics.fmean(values) if values else None


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float; not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file, ArtifactError when it can't be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not readable as JSON ({error}); delete the artifact and rerun its stage"
        ) from None
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one a line; empty when there is no such file, ArtifactError naming a broken line."""
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ArtifactError(f"{path}:{number}: not readable as JSON ({error}); rerun its stage") from None
    return rows
