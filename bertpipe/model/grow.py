"""Going on from a checkpoint with more than it had: rows for added vocabulary entries, longer positions.

Which tensors have a row an entry, or a row a position, is found by building the same class once more, without memory,
from a config with one more of them: so no family is listed here, and tied and untied heads are alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bertpipe.errors import ConfigError


def grow_vocabulary(model: Any, vocab_size: int, pieces: Sequence[Sequence[int]]) -> Any:
    """A stock masked-LM model whose last `len(pieces)` of `vocab_size` entries are new; the others stay bit for bit.

    `pieces` holds, for each new entry, the ids it was encoded to before. Its rows of the embeddings, of the decoder and
    of the decoder's bias are the means over them: so its logit is, on any text, the mean of theirs, and it never
    outranks all of the pieces it replaces. Rows that the checkpoint has to spare are used before any is added.
    ConfigError when it has fewer rows than there were entries before.
    """
    first, rows = vocab_size - len(pieces), model.config.vocab_size
    if first > rows:
        raise ConfigError(f"model.init: the checkpoint's tokenizer has {first} entries but its model only {rows} rows")
    rows = max(rows, vocab_size)

    def fill(old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(rows, *old.shape[1:])
        new[: len(old)] = old
        for number, ids in enumerate(pieces, start=first):
            new[number] = old[list(ids)].double().mean(0)
        return new

    return _remake(model, "vocab_size", rows, fill)


def lengthen(model: Any, length: int, first: int = 0) -> Any:
    """A stock model for sequences of `length` tokens; `first` is the position number of a sequence's first token.

    Learnt positions are interpolated linearly, ends on ends. Rotary ones are scaled so that the new length spans the
    old angles (position interpolation, Chen et al. 2023, section 2.3); layers that see a window alone keep theirs,
    since distances within it don't change. ConfigError when `length` is less than there is, or there is no way.
    """
    field, kind = "max_position_embeddings", model.config.model_type
    old_length = getattr(model.config, field, first) - first
    rope = getattr(model.config, "rope_parameters", None)
    tables = [model.state_dict()[name] for name in _rows(model, field)] if old_length else []
    if not (rope or tables) or any(len(table) != old_length + first for table in tables):
        raise ConfigError(f"model.max_positions: {kind} models have no positions that could be lengthened; unset it")
    if length < old_length:
        raise ConfigError(
            f"model.max_positions: {length} is less than the checkpoint's {old_length}; give at least that, or unset it"
        )
    if length == old_length:
        return model

    def fill(old: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[:first], interpolate(old[first:], length)])

    changes = {"rope_parameters": _scaled(rope, length / old_length, kind)} if rope else {}
    return _remake(model, field, first + length, fill, **changes)


def interpolate(table: torch.Tensor, length: int) -> torch.Tensor:
    """[L, H] -> [length, H]: linear between neighbouring rows, the first and the last row as they were."""
    at = torch.linspace(0, len(table) - 1, length, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[low].double(), table[low + 1].double(), (at - low)[:, None]).to(table.dtype)


def _scaled(rope: dict[str, Any], factor: float, kind: str) -> dict[str, Any]:
    """Rotary parameters of transformers 5, flat or by layer type, with positions divided by `factor`."""
    rope = copy.deepcopy(rope)
    part = rope.get("full_attention", rope)
    if part.get("rope_type") not in ("default", "linear"):
        found = part.get("rope_type")
        raise ConfigError(
            f"model.max_positions: the rotary positions of this {kind} model are of type {found!r}; only default and "
            "linear ones can be lengthened"
        )
    part |= {"rope_type": "linear", "factor": part.get("factor", 1.0) * factor}
    return rope


def _changed(config: Any, **changes: Any) -> Any:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _rows(model: Any, field: str) -> set[str]:
    """Names of the tensors with a row for each of `config.field`."""
    with torch.device("meta"):
        other = type(model)(_changed(model.config, **{field: getattr(model.config, field) + 1}))
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    return {name for name, tensor in model.state_dict().items() if tensor.shape != shapes[name]}


def _remake(model: Any, field: str, size: int, fill: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> Any:
    """The model with `config.field` of `size`, its tensors taken over, those with a row an item through `fill`."""
    names = _rows(model, field)
    state = {name: fill(tensor) if name in names else tensor for name, tensor in model.state_dict().items()}
    if size != getattr(model.config, field):
        training = model.training
        model = type(model)(_changed(model.config, **{field: size}, **changes)).train(training)
    model.load_state_dict(state)
    return model
