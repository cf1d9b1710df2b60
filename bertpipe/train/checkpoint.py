"""Checkpoints: a stock model folder, optimizer tensors by parameter name, a few integers; safetensors and JSON alone.

checkpoints/step-00000500/
    model/                  from_pretrained loads it
    optimizer.safetensors   `parameter//state` tensors
    state.json              step, tokens, where the record ends, where the run ran
    manifest.json           written last; every file's sha256
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file

from bertpipe import artifact
from bertpipe.data.tokenizer import save as save_tokenizer
from bertpipe.errors import ArtifactError
from bertpipe.model import encoders
from bertpipe.train.optim import Optimizer


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A stock folder with its tokenizer, readable by the group (transformers writes weights with mode 0600)."""
    encoders.save(model, folder)
    save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; an unreadable manifest is one of them."""
    try:
        return artifact.verify(path)
    except ArtifactError as error:
        return [str(error)]


class Checkpoints:
    """The checkpoints of one run; one process writes, every process reads."""

    def __init__(self, folder: Path, keep: int, tokenizer: Any):
        self.folder, self.keep, self.tokenizer = folder, keep, tokenizer

    def save(self, step: int, model: Any, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Commit step-`step`, then prune all but the newest `keep`."""
        target = self.folder / f"step-{step:08d}"
        if artifact.is_complete(target):
            if not _problems(target):
                return
            artifact.discard(target)
        self.folder.mkdir(parents=True, exist_ok=True)
        artifact.discard(target.with_name(target.name + artifact.PARTIAL))
        with artifact.committing(target, kind="checkpoint") as (scratch, counts):
            save_model(model, self.tokenizer, scratch / "model")
            tensors = {name: t.detach().contiguous().cpu() for name, t in optimizer.state().items()}
            save_file(tensors, scratch / "optimizer.safetensors")
            artifact.write_json(scratch / "state.json", state | {"step": step})
            counts["step"] = step
        for old in self.steps()[: -self.keep]:
            artifact.discard(old)

    def steps(self) -> list[Path]:
        """Committed checkpoints, oldest first by step."""
        return [path for path in sorted(self.folder.glob("step-????????")) if artifact.is_complete(path)]

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; a damaged one is said aloud and passed over."""
        for path in reversed(self.steps()):
            problems = _problems(path)
            if not problems:
                return path
            print(f"checkpoint passed over: {problems[0]}", file=sys.stderr)
        return None

    @staticmethod
    def restore(path: Path, model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Load weights and optimizer in place; returns the state."""
        load_model(model, path / "model" / "model.safetensors")
        optimizer.load_state(load_file(path / "optimizer.safetensors"))
        return json.loads((path / "state.json").read_text())
