"""What is minimised: one nn.Module an objective, holding the stock model(s) it trains.

`forward(batch)` does everything - encode, gather, head, loss - because DDP, FSDP2 and autocast hook the forward of the
module they wrap. It returns sums, never means: the loop divides by the count of the whole global batch. An objective of
several parts returns a sum for each, and each is divided by its own count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from bertpipe.errors import ConfigError
from bertpipe.model.cross_entropy import summed_cross_entropy
from bertpipe.model.encoders import encode, family


class Objective(nn.Module):
    """Base of the objectives: autocast around `losses`, inside the module that is wrapped and compiled."""

    parts: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the K parts of the loss, whose means are added up."""

    def __init__(self, model: Any, precision: str = "fp32"):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Sums over the slot: `loss` (nats or squared error), `correct`, `count`; for labels also `logits`.

        The sums are scalars, or [K] where the objective has K parts. `factors`, [K], is what the caller will multiply
        the losses with before the backward pass, if it knows; it changes no result, only saves work.
        """
        bf16 = self.precision == "bf16"
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.losses(batch, factors)

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What `forward` returns."""
        raise NotImplementedError

    def count(self, batch: Any) -> int:
        """What a slot adds to the divisor of the loss, known before any forward."""
        raise NotImplementedError

    def counts(self, batch: Any) -> list[int]:
        """The same for each part of the loss."""
        return [self.count(batch)]


def masked_losses(
    batch: Any,
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    factors: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Sums of masked language modelling over a slot: hidden [T, H], `head` from [P, H] to logits [P, V].

    `factors` are those of `Objective.forward`; masked language modelling is the first part of its objectives.
    """
    index, labels, weight = _predicted(batch)
    loss, right = summed_cross_entropy(head(hidden[index]), labels, weight, None if factors is None else factors[0])
    return {"loss": loss, "correct": (right * weight).sum(), "count": weight.sum()}


def _predicted(batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, labels and weights [P] of the positions to predict.

    The fill behind them is for static shapes; on CPU it is left out, all but one where there is nothing else, so that
    every parameter has a gradient from every slot.
    """
    index, labels, weight = batch.predict_index, batch.predict_labels, batch.predict_weight
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return index, labels, weight
    kept = max(1, int(weight.count_nonzero()))  # fill comes last
    return index[:kept], labels[:kept], weight[:kept]


class MaskedLM(Objective):
    """Cross-entropy at the masked positions, the head run on those alone (Devlin et al. 2019, 3.1)."""

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Scalars; `count` is the number of predicted positions."""
        hidden = encode(self.model, batch)
        return masked_losses(batch, hidden, lambda h: family(self.model).mlm_head(self.model, h), factors)

    def count(self, batch: Any) -> int:
        """Predicted positions."""
        return int(batch.predict_weight.sum())


@dataclass(frozen=True)
class PairHeads:
    """The heads of a stock class for pretraining on pairs."""

    mlm: Callable[[Any, torch.Tensor], torch.Tensor]
    """(model, hidden [P, H]) -> logits [P, V]"""
    sentence: Callable[[Any, torch.Tensor], torch.Tensor]
    """(model, hidden of each [CLS] [S, H]) -> logits [S, 2], through the pooler"""


PAIR_HEADS: dict[str, PairHeads] = {
    "bert": PairHeads(
        lambda m, h: m.cls.predictions(h),
        lambda m, first: m.cls.seq_relationship(m.bert.pooler(first[:, None])),
    ),
    "albert": PairHeads(
        lambda m, h: m.predictions(h),
        lambda m, first: m.sop_classifier(m.albert.pooler_activation(m.albert.pooler(first))),
    ),
}


class SentencePairs(Objective):
    """Masked LM and a two-way choice about the pair of segments, their means added up; trains the pooler.

    (Devlin et al. 2019, 3.1 and A.2: is B the next sentence? Lan et al. 2020, 3.1: are A and B in order?)
    """

    def __init__(self, model: Any, precision: str = "fp32"):
        super().__init__(model, precision)
        self.check_family(model.config.model_type)
        if model.config.type_vocab_size < 2:
            raise ConfigError("model: sentence pairs need a model with two token types (type_vocab_size: 2)")

    @classmethod
    def check_family(cls, kind: str) -> None:
        """ConfigError for a family that has no stock class with both heads."""
        if kind not in PAIR_HEADS:
            raise ConfigError(
                f"train.objective: {'_'.join(cls.parts)} trains {' and '.join(PAIR_HEADS)} models, not {kind}; take mlm"
            )

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """[2] each: of the predicted positions, and of the pairs (0 where the batch has no labels of pairs)."""
        heads = PAIR_HEADS[self.model.config.model_type]
        hidden = encode(self.model, batch)
        words = masked_losses(batch, hidden, lambda h: heads.mlm(self.model, h), factors)
        num = 0 if batch.sequence_labels is None else batch.num_sequences
        # the padding of an empty slot goes through the head too, so that every parameter has a gradient everywhere
        logits = heads.sentence(self.model, hidden[batch.cu_seqlens[: max(1, num)].long()]).float()
        loss, correct = logits.sum() * 0, logits.new_zeros(())
        if num:
            loss = F.cross_entropy(logits, batch.sequence_labels, reduction="sum")
            correct = (logits.detach().argmax(-1) == batch.sequence_labels).sum().float()
        pairs = {"loss": loss, "correct": correct, "count": logits.new_tensor(float(num))}
        return {name: torch.stack([words[name], pairs[name]]) for name in words}

    def count(self, batch: Any) -> int:
        """Predicted positions."""
        return int(batch.predict_weight.sum())

    def counts(self, batch: Any) -> list[int]:
        """Predicted positions, and pairs."""
        return [self.count(batch), batch.num_sequences]


class NextSentence(SentencePairs):
    """Masked LM and next-sentence prediction."""

    parts = ("mlm", "nsp")


class SentenceOrder(SentencePairs):
    """Masked LM and sentence-order prediction."""

    parts = ("mlm", "sop")


@dataclass(frozen=True)
class Row:
    """A pretraining objective: what its slots hold (a key of train/samples.py's ORDERS), stock auto class, module."""

    order: str
    auto_class: str
    module: type[Objective]


OBJECTIVES: dict[str, Row] = {
    "mlm": Row("segments", "AutoModelForMaskedLM", MaskedLM),
    "mlm_nsp": Row("nsp", "AutoModelForPreTraining", NextSentence),
    "mlm_sop": Row("sop", "AutoModelForPreTraining", SentenceOrder),
}
