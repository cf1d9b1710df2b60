"""`bertpipe attention`: one text through a stock encoder, and a page of whom each of its tokens attends to.

The weights are those that the stock model returns for `output_attentions` with eager attention: softmax of the scores,
[layers, heads, tokens, tokens], a row a token that attends. Of each head the page shows two figures, both means over
the rows i: the entropy -sum_j p_ij ln p_ij in nats, and the distance sum_j p_ij |i - j| in tokens.
"""

from __future__ import annotations

import base64
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe.artifact import replacing, writing
from bertpipe.downstream.finetuning.start_checks import load_tokenizer_of
from bertpipe.downstream.reporting import pages
from bertpipe.errors import ConfigError, DataError
from bertpipe.model import encoders

NUMBERS = 4_000_000
"""Weights on one page, two bytes each: 11 MB at most. 166 tokens of a BERT-base, 102 of a BERT-large."""
POSITIONS = 512
"""Positions that are compared with one another, the first ones."""
STEPS = 65_535
"""The page holds its numbers as uint16: a weight is off by 1 / 131,070 at most."""
SCRIPT = "attention.js"


@dataclass(frozen=True)
class Positions:
    """How alike a model's positions are."""

    kind: str
    """learned, sinusoidal or rotary"""
    layers: str
    """Which layers it is about; empty for all."""
    similarity: np.ndarray
    """float64 [P, P], from -1 to 1."""


@dataclass(frozen=True)
class Attended:
    """What a model does with a text."""

    model: str
    kind: str
    """Name of its stock class."""
    texts: tuple[str, ...]
    tokens: list[str]
    """As they are shown."""
    pieces: list[str]
    """As the tokenizer names them."""
    special: np.ndarray
    """bool [T], of those that the tokenizer puts around the texts."""
    num_tokens: int
    """Before it was cut."""
    weights: np.ndarray
    """float32 [layers, heads, T, T]"""
    positions: list[Positions]


def attend(name: str, text: str, second: str | None = None, max_length: int | None = None) -> Attended:
    """Run one text, or a pair, through the checkpoint `name`, a folder or Hub id.

    What is longer than the model or the page takes, or than `max_length`, is cut as for training. ConfigError for a
    model that gives no attentions; DataError for a text without a token.
    """
    texts = (text,) if second is None else (text, second)
    _check_texts(texts)
    tokenizer, model = load_tokenizer_of(name, "--model"), encoders.load_bare(name, "--model").eval()
    if model.config.model_type in encoders.FAMILIES:
        encoders.settle(model)
    longest = _longest(model, tokenizer, max_length)
    num_tokens = len(tokenizer(*texts, verbose=False)["input_ids"])
    encoding = tokenizer(*texts, truncation="longest_first", max_length=longest, return_tensors="pt", verbose=False)
    ids = encoding["input_ids"][0].tolist()
    if len(ids) <= tokenizer.num_special_tokens_to_add(second is not None):
        raise DataError(f"no token of the text is left: {num_tokens} tokens, cut to {longest}; give another text")
    around = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return Attended(
        name,
        type(model).__name__,
        texts,
        [_shown(tokenizer, number) for number in ids],
        tokenizer.convert_ids_to_tokens(ids),
        np.array([number in around for number in ids]),
        num_tokens,
        _weights(model, encoding),
        positions(model),
    )


def _check_texts(texts: tuple[str, ...]) -> None:
    for name, text in zip(("the text", "--second"), texts, strict=False):
        if not text.strip():
            raise DataError(f"{name} is empty; give some words")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name} is not UTF-8; check the terminal's encoding") from None


def _longest(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """The most tokens that model and page take; ConfigError where `wanted` is more."""
    config, length = model.config, tokenizer.model_max_length
    if config.model_type in encoders.FAMILIES:
        most = encoders.longest(model, length)
    else:
        most = min(length, getattr(config, "max_position_embeddings", None) or length)
    num_heads = getattr(config, "num_hidden_layers", 12) * getattr(config, "num_attention_heads", 12)
    room = math.isqrt(NUMBERS // num_heads)
    if wanted is not None and wanted > min(most, room):
        reason = f"the model takes {most}" if most < room else f"a page holds {room} of this model's {num_heads} heads"
        raise ConfigError(f"--max-length: {wanted} tokens, {reason}; give at most {min(most, room)}")
    return wanted or min(most, room)


def _weights(model: Any, encoding: Any) -> np.ndarray:
    """float32 [layers, heads, T, T] of a stock model with eager attention."""
    kind, length = model.config.model_type, encoding["input_ids"].shape[1]
    refused = f"--model: a {kind} model gives no attentions from each token to each other"
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{refused}: it is an encoder with a decoder; take an encoder such as bert")
    taken = inspect.signature(model.forward).parameters
    try:
        given = {key: value for key, value in encoding.items() if key in taken}
        with torch.no_grad():
            found = model(**given, output_attentions=True).attentions
    except (AttributeError, IndexError, *encoders.UNUSABLE) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{refused} ({reason}); take an encoder such as bert, with its own tokenizer") from error
    rows = [layer for layer in found or () if layer is not None]
    if not rows or any(layer.shape[:1] + layer.shape[2:] != (1, length, length) for layer in rows):
        raise ConfigError(f"{refused}; take an encoder such as bert")
    weights = torch.cat(rows).float().numpy()
    if not np.allclose(weights.sum(-1), 1, atol=1e-3):  # not finite, or no softmax
        raise ConfigError(f"{refused}: those it gives don't add up to 1; take an encoder such as bert")
    return weights


def _shown(tokenizer: Any, number: int) -> str:
    """A token as people read it; as the tokenizer names it where that is nothing, or a part of a character."""
    text = tokenizer.decode([number]).strip()
    return text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(number)


def entropies(weights: np.ndarray) -> np.ndarray:
    """Mean over the rows of -sum_j p_ij ln p_ij, in nats: [layers, heads, T, T] -> float64 [layers, heads]."""
    p = weights.astype(np.float64)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(-1)


def distances(weights: np.ndarray) -> np.ndarray:
    """Mean over the rows of sum_j p_ij |i - j|, in tokens: [layers, heads, T, T] -> float64 [layers, heads]."""
    place = np.arange(weights.shape[-1])
    return (weights.astype(np.float64) * abs(place[:, None] - place)).sum(-1).mean(-1)


def shares(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Mean over the rows of what goes to `columns`, bool [T]: [layers, heads, T, T] -> float64 [layers, heads]."""
    return weights[..., columns].astype(np.float64).sum(-1).mean(-1)


# --- positions --------------------------------------------------------------------------------------------------------


def positions(model: torch.nn.Module) -> list[Positions]:
    """How alike the positions of a stock encoder are; empty where it has none of these kinds.

    Learned and sinusoidal: the cosine of their embeddings. Rotary: the mean of q R(i - j) k / |q| |k| over all
    directions q = k, which is mean_m cos((i - j) theta_m) (Su et al. 2021, RoFormer, 3.4), for each set of angles.
    """
    angles: dict[tuple[float, ...], str] = {}
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2]
        if last.endswith("inv_freq") and "original" not in last:
            angles.setdefault(tuple(buffer.tolist()), last.removesuffix("inv_freq").replace("_", " ").strip())
    if angles:
        size = min(POSITIONS, getattr(model.config, "max_position_embeddings", None) or POSITIONS)
        apart = np.arange(size)
        kernels = ((layers, np.cos(np.outer(apart, theta)).mean(1)) for theta, layers in angles.items())
        return [Positions("rotary", layers, kernel[abs(apart[:, None] - apart)]) for layers, kernel in kernels]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            rows = module.weight.detach().double().numpy()[first : first + POSITIONS]
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
            kind = "sinusoidal" if np.allclose(rows, sinusoids(*rows.shape), atol=1e-4) else "learned"
            return [Positions(kind, "", unit @ unit.T)]
    return []


def sinusoids(num_positions: int, size: int) -> np.ndarray:
    """Position embeddings of Vaswani et al. 2017, 3.5: sine and cosine in turns, float64 [positions, size]."""
    column = np.arange(size)
    angle = np.arange(num_positions)[:, None] / 10_000 ** (column // 2 * 2 / size)
    return np.where(column % 2, np.cos(angle), np.sin(angle))


# --- the page ---------------------------------------------------------------------------------------------------------


def write(attended: Attended, out: Path) -> str:
    """Write the page to `out`, whole or not at all. Returns a line to say."""
    page = render(attended).encode()
    with writing(out, len(page)), replacing(out) as temporary:
        temporary.write_bytes(page)
    layers, heads, length, _ = attended.weights.shape
    cut = f", the first of {attended.num_tokens}: the others were not read" if attended.num_tokens > length else ""
    return f"{out}: {layers} layers x {heads} heads, {length} tokens{cut}; {len(page) / 1e6:.1f} MB"


def render(attended: Attended) -> str:
    """The page. No text of the model or the user can run: all are escaped, and the policy lets one script run alone."""
    weights = attended.weights
    figures = {
        "entropy": entropies(weights),
        "distance": distances(weights),
        "special": shares(weights, attended.special),
    }
    lists = {name: np.round(values, 4).tolist() for name, values in figures.items()}
    script = (pages.TEMPLATES / SCRIPT).read_text(encoding="utf-8")
    return pages.render(
        "attention.html.jinja",
        attended=attended,
        figures=lists,
        data={
            "tokens": attended.tokens,
            "pieces": attended.pieces,
            "layers": weights.shape[0],
            "heads": weights.shape[1],
            "start": int(np.argmin(attended.special)),
            "weights": _packed(weights),
            "special": attended.special.tolist(),
            "entropy": lists["entropy"],
            "distance": lists["distance"],
            "positions": [
                {"size": len(p.similarity), "values": _packed((p.similarity + 1) / 2)} for p in attended.positions
            ],
        },
        curves=[_by_distance(p.similarity) for p in attended.positions],
        highest=math.log(len(attended.tokens)),  # entropy of a row that is the same everywhere
        script=script,
        policy=f"script-src {pages.digest(script)}",
    )


def _packed(values: np.ndarray) -> str:
    """Numbers from 0 to 1 as uint16, little-endian, in base64."""
    return base64.b64encode(np.rint(np.clip(values, 0, 1) * STEPS).astype("<u2").tobytes()).decode()


def _by_distance(similarity: np.ndarray) -> list[float]:
    """Mean similarity of positions that are 0, 1, 2, ... apart, as far as there are sixteen such pairs or all."""
    size = len(similarity)
    return [round(float(similarity.diagonal(apart).mean()), 4) for apart in range(max(size - 15, min(size, 16)))]
