"""Whether a checkpoint and the tokenizer beside it belong together and are whole, as far as that can be known."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from bertpipe.errors import ConfigError

PADDED_ROWS = 0.1
"""Share of the embedding's rows that may be without a token: many checkpoints round their number up."""


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """ConfigError for a tokenizer that can't be the model's: of ids beyond its rows, or that pads with another id."""
    rows, pad = model.get_input_embeddings().weight.shape[0], model.config.pad_token_id
    entries = _entries(tokenizer)
    if entries > rows:
        raise ConfigError(
            f"finetune.model: its tokenizer has {entries} entries but the model only {rows} rows; "
            f"they are not of one run"
        )
    if pad is not None and tokenizer.pad_token_id not in (None, pad):
        raise ConfigError(
            f"finetune.model: its tokenizer pads with id {tokenizer.pad_token_id}, its config.json says {pad}; put the "
            "model's own tokenizer files beside it"
        )


def oddities(name: str, tokenizer: Any, model: Any) -> list[str]:
    """What may be meant and may be a mistake in the checkpoint `name`, from which `model` was made: a line each."""
    lines = []
    rows, entries = model.get_input_embeddings().weight.shape[0], _entries(tokenizer)
    if entries < (1 - PADDED_ROWS) * rows:
        lines.append(f"{name}: its tokenizer has {entries} entries, the model {rows} rows; is it the model's own?")
    if getattr(model.base_model, "pooler", None) is not None and not has_pooler(name):
        lines.append(f"{name}: no pooler in the checkpoint, as after masked-LM training alone; it starts random")
    return lines


@cache
def say(line: str) -> None:
    """Print a line, once."""
    print(f"note: {line}", flush=True)


def _entries(tokenizer: Any) -> int:
    """One more than the highest id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@cache
def has_pooler(name: str) -> bool:
    """Whether the safetensors of a checkpoint, a folder or a Hub id that was loaded before, hold a pooler's weights."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    options: Any = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(name, "model.safetensors.index.json", **options):
        keys = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].keys()
    elif weights := cached_file(name, "model.safetensors", **options):
        with safe_open(weights, "np") as file:
            keys = file.keys()
    else:
        return True  # under a name of its own; nothing to tell by
    return any("pooler." in key for key in keys)
