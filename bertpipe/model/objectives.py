"""What is minimised: one nn.Module an objective, holding the stock model(s) it trains.

`forward(batch)` does everything - encode, gather, head, loss - because DDP, FSDP2 and autocast hook the forward of the
module they wrap. It returns sums, never means: the loop divides by the count of the whole global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bertpipe.model.cross_entropy import cross_entropy
from bertpipe.model.encoders import encode, family
from bertpipe.model.pooling import classify


class Objective(nn.Module):
    """Base of the objectives: autocast around `losses`, inside the module that is wrapped and compiled."""

    def __init__(self, model: Any, precision: str = "fp32"):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Sums over the slot: `loss` (nats or squared error), `correct`, `count`; for labels also `logits`."""
        bf16 = self.precision == "bf16"
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.losses(batch)

    def losses(self, batch: Any) -> dict[str, torch.Tensor]:
        """What `forward` returns."""
        raise NotImplementedError

    def count(self, batch: Any) -> int:
        """What a slot adds to the divisor of the loss, known before any forward."""
        raise NotImplementedError


class MaskedLM(Objective):
    """Cross-entropy at the masked positions, the head run on those alone (Devlin et al. 2019, 3.1)."""

    def losses(self, batch: Any) -> dict[str, torch.Tensor]:
        """Scalars; `count` is the number of predicted positions."""
        hidden = encode(self.model, batch)[batch.predict_index]
        logits = family(self.model).mlm_head(self.model, hidden)
        losses, right = cross_entropy(logits, batch.predict_labels)
        weight = batch.predict_weight
        return {"loss": (losses * weight).sum(), "correct": (right * weight).sum(), "count": weight.sum()}

    def count(self, batch: Any) -> int:
        """Predicted positions."""
        return int(batch.predict_weight.sum())


class SequenceLabel(Objective):
    """Classification (cross-entropy) or regression (squared error) of whole sequences, on a stock head."""

    def losses(self, batch: Any) -> dict[str, torch.Tensor]:
        """`loss`, `correct`, `count` (sequences), and `logits`, fp32 [num_sequences, labels]."""
        num = batch.num_sequences
        # padding goes through the head too, so that every parameter has a gradient from an empty slot as well
        logits = classify(self.model, encode(self.model, batch), batch.cu_seqlens).float()
        kept, labels = logits[:num], batch.sequence_labels
        correct, count = logits.new_zeros(()), logits.new_tensor(float(num))
        if labels is None or num == 0:
            loss = logits.sum() * 0
        elif self.model.config.num_labels == 1:
            loss = F.mse_loss(kept[:, 0], labels, reduction="sum")
        else:
            loss = F.cross_entropy(kept, labels, reduction="sum")
            correct = (kept.detach().argmax(-1) == labels).sum().float()
        return {"loss": loss, "correct": correct, "count": count, "logits": kept}

    def count(self, batch: Any) -> int:
        """Sequences."""
        return batch.num_sequences


@dataclass(frozen=True)
class Row:
    """A pretraining objective: its sampler (a key of train/pretrain.py's SAMPLERS), stock auto class and module."""

    sampler: str
    auto_class: str
    module: type[Objective]


OBJECTIVES: dict[str, Row] = {"mlm": Row("masked", "AutoModelForMaskedLM", MaskedLM)}
