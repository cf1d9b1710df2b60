"""Longer runs: `train.extend_from` goes on from another run's weights, optimizer and place in the data.

The new run folder begins as a copy of the parent's last checkpoint and of its record, so from there everything is a
resume. The recipe must be the parent's but for the number of steps and the schedule, which takes over at the parent's
last step. The parent's fingerprint is part of the new one (`extends` among the raw inputs).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.config_files import read_preset
from bertpipe.errors import ArtifactError, ConfigError
from bertpipe.train import checkpoint_files
from bertpipe.train.checkpoint import Checkpoints, identify

SECTIONS = ("model", "masking", "optim", "train")
FREE = {
    *("train.steps", "train.budget", "train.extend_from"),
    *("optim.schedule", "optim.warmup_steps", "optim.decay_share", "optim.cooldown"),
    "model.init",  # where the parent began
}


def read_parent(cfg: Config) -> dict[str, Any]:
    """The manifest of the run that `cfg` extends; ConfigError unless it is a finished pretraining run."""
    assert cfg.train.extend_from is not None
    try:
        manifest = artifact.read_manifest(Path(cfg.train.extend_from))
    except ArtifactError as error:
        raise ConfigError(f"train.extend_from: {error}") from None
    if manifest.get("stage") != "pretrain":
        raise ConfigError(
            f"train.extend_from: {cfg.train.extend_from} is no pretraining run; name its pretrain-... folder"
        )
    return manifest


def check(cfg: Config) -> None:
    """ConfigError for a parent that isn't there, differs in a setting, or is as long as the run already."""
    if cfg.train.extend_from is None:
        return
    parent = read_parent(cfg)
    if cfg.train.phases:
        raise ConfigError(
            "train.extend_from: phases are shares of a run's steps, so a run with phases can't be extended"
        )
    for section in SECTIONS:
        now, before = getattr(cfg, section).model_dump(mode="json"), parent["settings"][section]
        default = type(getattr(cfg, section))().model_dump(mode="json")  # of settings that came after the parent
        for key, value in now.items():
            was = before.get(key, default[key])
            if f"{section}.{key}" not in FREE and was != value:
                raise ConfigError(
                    f"train.extend_from: {section}.{key} is {value!r}, the parent's was {was!r}; only the "
                    "number of steps and the schedule may differ"
                )
    if not cfg.model.init and parent["raw"].get("preset", {}) not in ({}, read_preset(cfg.model.preset)):
        raise ConfigError(f"train.extend_from: model.preset {cfg.model.preset} has changed since the parent's run")
    steps = parent["counts"]["steps"]
    if cfg.train.budget is None and cfg.train.steps <= steps:
        raise ConfigError(
            f"train.steps: {cfg.train.steps}, but the run that train.extend_from names has {steps} already; ask for "
            "more"
        )


def begin(cfg: Config, inputs: dict[str, Path], out: Path) -> int:
    """Put the parent's last checkpoint and record into `out`, unless it has checkpoints already; the parent's steps.

    Called by the main process. Raises ConfigError when the parent was trained on other shards or another tokenizer,
    ArtifactError when its last checkpoint is damaged.
    """
    parent, folder = read_parent(cfg), Path(cfg.train.extend_from or "")
    for name, path in inputs.items():
        if artifact.read_manifest(path)["fingerprint"] != parent["parents"][name]:
            raise ConfigError(f"train.extend_from: {folder} was trained on another {name} artifact than {path}")
    steps = int(parent["counts"]["steps"])
    if Checkpoints(out / "checkpoints", 2, None).steps():
        return steps
    newest = Checkpoints(folder / "checkpoints", 2, None).newest()
    if newest is None or json.loads((newest / "state.json").read_text())["step"] != steps:
        raise ArtifactError(f"{folder}: no whole checkpoint of its step {steps} to go on from")
    out.mkdir(parents=True, exist_ok=True)
    for record in ("metrics.jsonl", "speed.jsonl"):
        shutil.copyfile(folder / record, out / record)
    checkpoint_files.adopt(newest, out / "checkpoints", identify(cfg, inputs))  # last: what stands there is whole
    return steps
