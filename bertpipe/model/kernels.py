"""Which attention kernel a run takes, and why: resolved before the first step, recorded, said aloud where slow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bertpipe.errors import ConfigError
from bertpipe.model import attention, padded
from bertpipe.model.encoders import FAMILIES

FLASH_CAPABILITY = (8, 0)  # Ampere
FLASH_HEAD_SIZE = 128  # larger heads have no backward pass on every such card


@dataclass(frozen=True)
class Kernel:
    """How attention is computed."""

    name: str
    """The attention function's name in transformers' registry; `padded` for a family whose own can't be replaced."""
    obstacle: str = ""
    """Why no faster one can be had here; empty for the fastest of the device."""


def choose(config: Any, device: torch.device, precision: str) -> Kernel:
    """The fastest kernel for a stock model config that will train on `device` in `precision` (fp32 or bf16)."""
    row = FAMILIES.get(config.model_type)
    if row is not None and row.padded:
        narrow = "" if row.autocast or precision == "fp32" else f"; its encoder computes in fp32, not {precision}"
        return Kernel(padded.NAME, f"{config.model_type} runs padded, bucketed by length: {row.padded}{narrow}")
    if device.type != "cuda":
        return Kernel(attention.NAME)
    built = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if built else None
    obstacle = flash_obstacle(precision, attention_dropout(config), head_size(config), capability)
    return Kernel(attention.NAME, obstacle) if obstacle else Kernel(attention.VARLEN)


def flash_obstacle(precision: str, dropout: float, size: int, capability: tuple[int, int] | None) -> str:
    """What keeps `bertpipe_varlen` from being used, in words; empty if nothing does.

    Args:
        precision: fp32 or bf16.
        dropout: of attention weights.
        size: of a head.
        capability: the card's compute capability; None where torch has no FlashAttention.
    """
    if capability is None:
        return "this torch is built without FlashAttention"
    if capability < FLASH_CAPABILITY:
        return f"FlashAttention needs compute capability 8.0, this card has {capability[0]}.{capability[1]}"
    if precision != "bf16":
        return f"FlashAttention computes in 16 bits, the precision is {precision}"
    if dropout > 0:
        return (
            f"torch's FlashAttention has no dropout, attention has {dropout:g}; set model.dropout or finetune.dropout 0"
        )
    if size > FLASH_HEAD_SIZE or size % 8:
        return f"FlashAttention takes heads of at most {FLASH_HEAD_SIZE} in steps of 8, the model's have {size}"
    return ""


def attention_dropout(config: Any) -> float:
    """Dropout of attention weights in a stock config."""
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 0.0


def head_size(config: Any) -> int:
    """Size of an attention head in a stock config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def settle(kernel: Kernel, required: bool, say: bool) -> None:
    """ConfigError for a slow kernel where a fast one is `required`; else, if `say`, it is said aloud once."""
    if kernel.obstacle and required:
        raise ConfigError(f"runtime.require_fast_attention: {kernel.obstacle}")
    if kernel.obstacle and say:
        slower = "" if kernel.name == padded.NAME else f"attention runs on the slower kernel {kernel.name}: "
        say_once(f"note: {slower}{kernel.obstacle}")


def compiles(kernel: Kernel, device: torch.device, wanted: bool | str) -> bool:
    """Whether the objective is to be compiled: `wanted` is true, false or auto (on CUDA, where it is one graph).

    Raises ConfigError when it is wanted but would not be one graph.
    """
    whole = kernel.name == attention.VARLEN
    if wanted is True and not whole:
        raise ConfigError(f"runtime.compile: with the attention kernel {kernel.name} a step is not one graph; set auto")
    return whole and device.type == "cuda" if wanted == "auto" else bool(wanted)


@cache
def say_once(note: str) -> None:
    """Print a line, but not again."""
    print(note, flush=True)
