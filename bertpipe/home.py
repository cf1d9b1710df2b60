"""Paths that begin with `~`: a shell reads them, but not in files and between quotes."""

from __future__ import annotations

import os
from typing import Any

PATHS = (
    "corpus.sources",
    "tokenizer.adopt",
    "model.init",
    "train.extend_from",
    "finetune.model",
    "finetune.data",
    "finetune.task.data",
    "runtime.root",
)
"""Settings that are, or may be, files and folders."""


def at_home(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings, `~` in PATHS as a shell reads it; in place."""
    for name in PATHS:
        *outer, last = name.split(".")
        place: Any = settings
        for key in outer:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = expanded(place[last])
    return settings


def expanded(value: Any) -> Any:
    """A path, or several."""
    if isinstance(value, dict):
        return {key: expanded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expanded(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111 (which fails without a home)
