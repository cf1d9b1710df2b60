"""The tokenizer beside a checkpoint, and whether the two belong together, as far as that can be known."""

from __future__ import annotations

from typing import Any

from bertpipe import outside
from bertpipe.errors import ConfigError
from bertpipe.model.kernels import say_once
from bertpipe.train.pretrain import load_tokenizer

PADDED_ROWS = 0.1
"""Share of the embedding's rows that may be without a token: many checkpoints round their number up."""


def load_tokenizer_of(model: str, setting: str = "finetune.model") -> Any:
    """The tokenizer that lies beside a checkpoint; ConfigError when there is none."""
    outside.check(model, setting)
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{setting}: no tokenizer can be loaded from {model!r}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there is none
        raise ConfigError(f"{setting}: {model!r} holds no tokenizer (tokenizer.json or vocab.txt)")
    return tokenizer


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


def tell_of_small(name: str, tokenizer: Any, model: Any) -> None:
    """Say once where a checkpoint's tokenizer is far smaller than its model: it may be meant, or another's."""
    rows, entries = model.get_input_embeddings().weight.shape[0], _entries(tokenizer)
    if entries < (1 - PADDED_ROWS) * rows:
        say_once(f"note: {name}: its tokenizer has {entries} entries, the model {rows} rows; is it the model's own?")


def _entries(tokenizer: Any) -> int:
    """One more than the highest id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
