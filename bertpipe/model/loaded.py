"""Whether the weights of a checkpoint were the whole of a stock model: only a head or a pooler may start random."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from bertpipe.errors import ConfigError


class Loaded(NamedTuple):
    """A model, and what of its head and pooler starts random."""

    model: Any
    missing: set[str]
    """Names of the weights that the checkpoint hasn't got, or has in another size."""
    resized: list[str]
    """The latter in words: its head is for other labels."""


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """What transformers would say of the weights is looked at here: that a head is new is as it should be."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def started_random(model: Any, info: dict[str, Any], where: str) -> Loaded:
    """ConfigError if a weight of the encoder itself is among those that start random."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    encoder = {f"{prefix}{key}" for key in model.base_model.state_dict()}
    resized = {key: f"{key} {list(theirs)}, here {list(ours)}" for key, theirs, ours in info["mismatched_keys"]}
    if wrong := sorted(encoder & resized.keys()):
        raise ConfigError(f"{where}: its weights are not those of its config.json: {resized[wrong[0]]}")
    missing = set(info["missing_keys"])
    if lost := sorted(key for key in encoder & missing if "pooler" not in key.split(".")):
        raise ConfigError(
            f"{where} lacks {len(lost)} weights of its encoder, {lost[0]} among them; copy the whole checkpoint"
        )
    return Loaded(model, missing | resized.keys(), sorted(resized.values()))


def num_layers(stock: Any) -> int | None:
    """Of a stock config; None for a family that has no such number."""
    return getattr(stock, "num_hidden_layers", None)


def check_layers(model: Any, unexpected: Iterable[str], where: str) -> None:
    """ConfigError where the checkpoint has layers of the encoder that the model hasn't."""
    parts = {name for name, _ in model.base_model.named_children()}
    bare = [key.removeprefix(f"{model.base_model_prefix}.") for key in unexpected]
    extra = sorted(key for key in bare if key.split(".")[0] in parts and re.search(r"\.\d+\.", key))
    if extra:
        raise ConfigError(
            f"{where} has {len(extra)} weights of layers that its config.json doesn't know, {extra[0]} among them; "
            f"correct num_hidden_layers there"
        )
