"""What the artifacts of one run say, as one JSON-able tree: the report shows it, the model card is made from it.

Only reads. Whatever an artifact does not say is left out, so a page of half a run can still be made.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.downstream.reporting.phase_table import phase_rows
from bertpipe.downstream.reporting.record import (
    block_size,
    columns,
    is_number,
    mean,
    median,
    read_json,
    read_record,
)

STAGES = ("corpus", "tokenizer", "shards", "pretrain", "finetune")


def gather(cfg: Config, inputs: dict[str, Path]) -> dict[str, Any]:
    """Everything known of the run whose artifact folders are `inputs`, by stage; ArtifactError on unreadable files."""
    return collect(cfg.model_dump(mode="json"), inputs, cfg.report.title)


def collect(config: dict[str, Any], inputs: dict[str, Path], title: str) -> dict[str, Any]:
    """The same from the settings as a manifest has them; a folder may be one that is still being filled."""
    manifests = {stage: artifact.read_recipe(inputs[stage]) for stage in STAGES if stage in inputs}
    facts: dict[str, Any] = {
        "title": title,
        "missing": [stage for stage in STAGES if stage not in inputs],
        "config": config,
        "artifacts": [describe(stage, inputs[stage], manifest) for stage, manifest in manifests.items()],
        "environment": {},
        "broken": [],
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
        facts |= pretraining(inputs["pretrain"], manifests["pretrain"], config, facts["broken"])
    if "finetune" in inputs:
        facts["finetune"] = read_json(inputs["finetune"] / "scores.json").get("tasks", {})
        if not artifact.is_complete(inputs["finetune"]):
            facts["unfinished"] = {}
    return facts


def describe(stage: str, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where an artifact lies and what it cost."""
    files, raw = manifest.get("files", {}), manifest.get("raw")
    return {
        "stage": stage,
        "fingerprint": manifest.get("fingerprint"),
        "content": artifact.digest(raw) if raw else None,
        "files": artifact.digest(files) if files else None,
        "folder": str(folder),
        "num_files": len(files),
        "bytes": sum(file.get("bytes", 0) for file in files.values()),
        "wall_seconds": manifest.get("wall_seconds"),
    }


def pretraining(folder: Path, manifest: dict[str, Any], config: dict[str, Any], broken: list[str]) -> dict[str, Any]:
    """Figures, curves, phases and shape of a pretraining run; lines of its record that can't be read go to `broken`.

    A run that is still going has `unfinished`: its step, when its record was last written. With `train.budget` the
    number of steps that it came to takes the place of the setting in `config`.
    """
    growing = not artifact.is_complete(folder)
    metrics = read_record(folder / "metrics.jsonl", broken, growing)
    speed = read_record(folder / "speed.jsonl", broken, growing)
    train, held = ([row for row in metrics if key in row] for key in ("loss", "eval_loss"))
    settings = config.get("train", {})
    steps = manifest.get("counts", {}).get("steps") or read_json(folder / "budget.json").get("steps")
    if settings.get("budget") is not None:
        config["train"] = settings | {"steps": steps}
    figures = {key: held[-1][key] for key in (held[-1] if growing and held else {}) if key != "step"}
    figures |= manifest.get("counts", {})
    figures |= {"processor": manifest.get("environment", {}).get("processor")}
    memory = [row["memory_bytes"] for row in speed if is_number(row.get("memory_bytes"))]
    for key, value in (
        *((key, median(speed, key)) for key in ("tokens_per_second", "mfu", "data_wait_share")),
        ("memory_bytes", max(memory, default=None)),
        ("tokens", train[-1].get("tokens") if train else None),
        ("train_seconds", speed[-1].get("seconds") if speed and growing else None),
    ):
        if is_number(value):
            figures.setdefault(key, value)
    figures["fill"] = mean(train, "fill")
    loss, floor = figures.get("eval_loss"), figures.get("eval_unigram_cross_entropy")
    if is_number(loss) and is_number(floor):
        figures["gap"] = floor - loss
    pair = next((name for name in PAIR_PARTS if train and f"{name}_loss" in train[-1]), None)
    more = (f"{pair}_loss", f"{pair}_accuracy") if pair else ()
    facts = {
        "pretrain": figures,
        "model": shape(folder, manifest, config),
        "curves": {
            "train": columns(train, TRAIN_KEYS + more),
            "eval": columns(held, EVAL_KEYS + tuple(f"eval_{key}" for key in more)),
            "speed": columns(speed, SPEED_KEYS),
            "steps_per_point": block_size(len(train)),
            "pair": pair,
        },
        "phases": phase_rows(settings, steps, train, held, speed),
    }
    if growing:
        record = folder / "metrics.jsonl"
        written = datetime.fromtimestamp(record.stat().st_mtime, UTC) if record.is_file() else None
        facts["unfinished"] = {
            "step": train[-1]["step"] if train else 0,
            "steps": steps or settings.get("steps"),
            "written": written.isoformat(timespec="seconds") if written else None,
        }
    return facts


def shape(folder: Path, manifest: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the model is; before there is one, what its preset says."""
    found = read_json(folder / "model" / "config.json") or manifest.get("raw", {}).get("preset") or {}
    kind = found.get("model_type") or config.get("model", {}).get("preset")
    return {
        "architecture": (found.get("architectures") or [kind or "model"])[0],
        "model_type": found.get("model_type"),
        "num_layers": found.get("num_hidden_layers"),
        "hidden_size": found.get("hidden_size"),
        "num_heads": found.get("num_attention_heads"),
        "vocab_size": found.get("vocab_size"),
        "mask_token": read_json(folder / "model" / "tokenizer_config.json").get("mask_token"),
        "max_positions": found.get("max_position_embeddings"),
    }


PAIR_PARTS = ("nsp", "sop")
"""Names of the second part of an objective on sentence pairs; the first is mlm."""
TRAIN_KEYS = ("step", "tokens", "loss", "mlm_loss", "accuracy", "lr", "grad_norm", "fill")
SPEED_KEYS = ("step", "seconds", "tokens_per_second", "data_wait_share", "memory_bytes", "mfu")
EVAL_KEYS = ("step", "eval_loss", "eval_accuracy", "eval_perplexity", "eval_unigram_cross_entropy")
