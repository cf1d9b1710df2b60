"""Longer runs: `train.extend_from` goes on from another run's weights, optimizer and place in the data.

The new run folder begins as a copy of the parent's last checkpoint and of its record, so from there everything is a
resume. The recipe must be the parent's but for the number of steps and the schedule, which takes over at the parent's
last step; `train.extend_changed` overrides that, and what differs goes into the manifest. The parent's fingerprint is
part of the new one (`extends` among the raw inputs). An unfinished run can be a parent too.
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
    *("train.steps", "train.budget", "train.extend_from", "train.extend_changed"),
    *("optim.schedule", "optim.warmup_steps", "optim.decay_share", "optim.cooldown"),
    "model.init",  # where the parent began
}


def read_parent(cfg: Config) -> dict[str, Any]:
    """The manifest of the run that `cfg` extends, its last step under counts.steps; ConfigError unless it is one."""
    assert cfg.train.extend_from is not None
    folder = Path(cfg.train.extend_from)
    try:
        parent = artifact.read_recipe(folder)
    except ArtifactError as error:
        raise ConfigError(f"train.extend_from: {error}") from None
    if parent.get("stage") != "pretrain":
        raise ConfigError(f"train.extend_from: {folder} is no pretraining run; name its pretrain-... folder")
    if "counts" not in parent:
        whole = Checkpoints(folder / "checkpoints", 2, None).steps()
        if not whole:
            raise ConfigError(f"train.extend_from: {folder} is unfinished and has no checkpoint yet")
        parent["counts"] = {"steps": checkpoint_files.read_manifest(whole[-1])["counts"]["step"]}
    return parent


def changes(cfg: Config, parent: dict[str, Any], inputs: dict[str, Path]) -> list[str]:
    """What differs from the parent's recipe and inputs, beyond what may."""
    found = []
    for section in SECTIONS:
        now, before = getattr(cfg, section).model_dump(mode="json"), parent["settings"][section]
        default = type(getattr(cfg, section))().model_dump(mode="json")  # of settings that came after the parent
        for key, value in now.items():
            was = before.get(key, default[key])
            if f"{section}.{key}" not in FREE and was != value:
                found.append(f"{section}.{key} is {value!r}, the parent's was {was!r}")
    if not cfg.model.init and parent["raw"].get("preset", {}) not in ({}, read_preset(cfg.model.preset)):
        found.append(f"model.preset {cfg.model.preset} has changed since the parent's run")
    for name, path in inputs.items():
        if artifact.read_manifest(path)["fingerprint"] != parent["parents"][name]:
            found.append(f"{cfg.train.extend_from} was trained on another {name} artifact than {path}")
    return found


def check(cfg: Config, inputs: dict[str, Path] | None = None) -> list[str]:
    """ConfigError for a parent that isn't there, differs, or is as long as the run already; allowed differences."""
    if cfg.train.extend_from is None:
        return []
    parent = read_parent(cfg)
    if cfg.train.phases:
        raise ConfigError(
            "train.extend_from: phases are shares of a run's steps, so a run with phases can't be extended"
        )
    found = changes(cfg, parent, inputs or {})
    if found and not cfg.train.extend_changed:
        raise ConfigError(
            f"train.extend_from: {found[0]}; only the number of steps and the schedule may differ, or else say "
            "--train.extend_changed true"
        )
    steps = parent["counts"]["steps"]
    if cfg.train.budget is None and cfg.train.steps <= steps:
        raise ConfigError(
            f"train.steps: {cfg.train.steps}, but the run that train.extend_from names has {steps} already; ask for "
            "more"
        )
    return found


def begin(cfg: Config, inputs: dict[str, Path], out: Path) -> int:
    """Put the parent's last checkpoint and record into `out`, unless it has checkpoints already; the parent's steps.

    Called by the main process. Raises ConfigError as `check` does, ArtifactError when the last checkpoint is damaged.
    """
    parent, folder = read_parent(cfg), Path(cfg.train.extend_from or "")
    if Checkpoints(out / "checkpoints", 2, None).steps():
        return int(parent["counts"]["steps"])
    for change in check(cfg, inputs):
        print(f"note: train.extend_from: {change}", flush=True)
    steps = int(parent["counts"]["steps"])
    newest = Checkpoints(folder / "checkpoints", 2, None).newest()
    if newest is None or json.loads((newest / "state.json").read_text())["step"] != steps:
        raise ArtifactError(f"{folder}: no whole checkpoint of its step {steps} to go on from")
    out.mkdir(parents=True, exist_ok=True)
    for record in ("metrics.jsonl", "speed.jsonl"):
        shutil.copyfile(folder / record, out / record)
    checkpoint_files.adopt(newest, out / "checkpoints", identify(cfg, inputs))  # last: what stands there is whole
    return steps
