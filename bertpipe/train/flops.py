"""Model FLOPs of a step, and what they are measured against: a matrix product timed here, and the card's datasheet.

Model FLOPs are those the mathematics asks for (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section
2.1; Chowdhery et al. 2022, PaLM, appendix B): a weight that multiplies a row costs 2 of them forward and 4 backward,
attention 12 x width for every pair of a query and a key that sees it, in every layer. Padding, recomputation,
softmax, norms, dropout and the optimizer count nothing, so what is spent on them lowers the utilisation (MFU). The
masked-LM head counts at the predicted positions alone. DeBERTa's relative positions cost every pair another product
each way; projecting them, once a batch, counts nothing either.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bertpipe.data.batches import PackedBatch
from bertpipe.model.encoders import FAMILIES

MATMUL = (8192, 768, 3072)  # rows, inner, columns: BERT-base's first feed-forward product at 64 x 128 tokens
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RELATIVE = re.compile(r"\.pos(_q|_key|_query)?_proj$")  # deberta's, run on the relative positions of a batch
PER_SEQUENCE = re.compile(r"(^|\.)(pooler|seq_relationship|sop_classifier)\.")  # run once a sequence

DATASHEET = (
    (r"\bB200\b", 2250e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL4\b", 121e12),
)
"""Name of an NVIDIA card -> dense bf16 FLOPs/s of its datasheet (without sparsity)."""


@dataclass(frozen=True)
class ModelFlops:
    """What one stock model has to multiply, forward and backward."""

    per_token: int
    """Weights of the encoder that multiply each token, shared layers as often as they are used."""
    per_prediction: int
    """Weights of the masked-LM head, run at the predicted positions."""
    per_sequence: int
    """Weights of poolers and sentence heads."""
    windows: tuple[int | None, ...]
    """For each layer, None, or w where a token sees those less than w away from it."""
    width: int
    """Heads x head size."""
    products: int = 2
    """Products of `width` for every pair: query with key, weight with value, and each with the other's position."""

    def of(self, lengths: torch.Tensor, num_predictions: int) -> float:
        """FLOPs of sequences of `lengths` tokens, int [S], with `num_predictions` predicted positions in all."""
        sizes = lengths.long()
        weights = self.per_token * int(sizes.sum()) + self.per_prediction * num_predictions
        weights += self.per_sequence * len(sizes)
        seen = sum(_pairs(sizes, window) * self.windows.count(window) for window in set(self.windows))
        return 6.0 * weights + 6.0 * self.products * self.width * seen

    def slot(self, batch: PackedBatch) -> float:
        """FLOPs of a slot's real sequences; tail padding and fill count nothing."""
        lengths = batch.cu_seqlens[: batch.num_sequences + 1].diff()
        predicted = 0 if batch.predict_weight is None else int(batch.predict_weight.sum())
        return self.of(lengths, predicted)


def _pairs(sizes: torch.Tensor, window: int | None) -> int:
    """Pairs of tokens that see each other: all of a sequence's, or those with |i - j| < window."""
    if window is None:
        return int((sizes * sizes).sum())
    near = sizes.clamp(max=window)
    return int((sizes * (2 * near - 1) - near * (near - 1)).sum())


def count(model: Any) -> ModelFlops:
    """The matrices of a stock `transformers` encoder, with or without a head."""
    config, encoder = model.config, model.base_model
    inside = {id(module) for module in encoder.modules()} if encoder is not model else set()
    predicts = model.get_output_embeddings() is not None
    token = prediction = sequence = 0
    skipped = tuple(f".{name}" for name in FAMILIES[config.model_type].unused) if config.model_type in FAMILIES else ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d) or RELATIVE.search(name) or f".{name}".endswith(skipped):
            continue
        size = module.weight.numel()
        if PER_SEQUENCE.search(f"{name}."):
            sequence += size
        elif encoder is model or id(module) in inside:
            token += size * _uses(name, config)
        elif predicts:
            prediction += size
        else:
            sequence += size
    if getattr(model, "lm_predictions", None) is not None:  # deberta's own head multiplies by the embeddings
        prediction += model.get_input_embeddings().weight.numel()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width, ways = config.num_attention_heads * head, getattr(config, "pos_att_type", None) or ()
    products = 2 + len(ways) if getattr(config, "relative_attention", False) else 2
    return ModelFlops(token, prediction, sequence, _windows(config), width, products)


def _uses(name: str, config: Any) -> int:
    """How often a token meets a matrix of the encoder: albert's groups of layers are run again and again."""
    return config.num_hidden_layers // config.num_hidden_groups if "albert_layer_groups" in name else 1


def _windows(config: Any) -> tuple[int | None, ...]:
    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple(config.sliding_window + 1 if kind == "sliding_attention" else None for kind in kinds)


def time_matmul(device: torch.device, precision: str, seconds: float = 0.5) -> float:
    """FLOPs/s of the best of several products of shape MATMUL in `precision`, timed for about `seconds`.

    Draws from a generator of its own, so that nothing else changes.
    """
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = MATMUL
    left = torch.randn(rows, inner, generator=generator).to(device, DTYPES[precision])
    right = torch.randn(columns, inner, generator=generator).to(device, DTYPES[precision]).T  # as nn.Linear has it
    left[: rows // 8] @ right
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < seconds:
        _finish(device)
        begun = time.perf_counter()
        left @ right
        _finish(device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * rows * inner * columns / best


def _finish(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def datasheet(device: torch.device, precision: str) -> float | None:
    """Dense bf16 FLOPs/s that the maker of the card names; None where the table doesn't know it, or not in bf16."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return look_up(torch.cuda.get_device_name(device))


def look_up(name: str) -> float | None:
    """The row of DATASHEET that a card's name matches."""
    return next((flops for pattern, flops in DATASHEET if re.search(pattern, name)), None)


class Meter:
    """Model FLOPs of the slots a process trains on, beside what its device multiplies.

    `matmul` is timed when it is made; several processes time it at the same time, as they will train.
    """

    def __init__(self, model: Any, device: torch.device, precision: str, world: int = 1):
        self.count, self.world = count(model), world
        self.matmul = time_matmul(device, precision)
        """FLOPs/s of a matrix product on this process's share of the machine."""
        self.datasheet = datasheet(device, precision)
        """FLOPs/s that the maker of the card names, if it is known."""

    def of(self, slots: Sequence[PackedBatch]) -> float:
        """FLOPs of some slots."""
        return sum(self.count.slot(slot) for slot in slots)

    def read(self, flops: float, seconds: float) -> dict[str, float]:
        """Figures of speed.jsonl: the FLOPs/s of all processes, and the utilisation, of this one, against both."""
        rate = flops / seconds
        figures = {"model_flops_per_second": float(f"{rate * self.world:.4g}"), "mfu": round(rate / self.matmul, 4)}
        figures["matmul_flops_per_second"] = float(f"{self.matmul * self.world:.4g}")
        if self.datasheet:
            figures["mfu_datasheet"] = round(rate / self.datasheet, 4)
        return figures


def make_meter(model: Any, device: torch.device, precision: str, tokens: int, world: int = 1) -> Meter | None:
    """A Meter for a run of `tokens` tokens; None for one so short that timing a product would be most of its work."""
    product = 2 * math.prod(MATMUL)
    return Meter(model, device, precision, world) if 6 * count(model).per_token * tokens > 30 * product else None
