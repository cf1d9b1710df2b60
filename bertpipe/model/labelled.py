"""What is minimised in fine-tuning: a stock model with a head, on labelled sequences. HEADS_OF is the table.

As in objectives.py: `forward(batch)` does everything and returns sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bertpipe.model.encoders import encode
from bertpipe.model.objectives import Objective
from bertpipe.model.pooling import check_head, classify


class Labelled(Objective):
    """Base of the objectives of fine-tuning: a stock model with a head, and labelled examples."""

    @classmethod
    def check(cls, model: Any) -> None:
        """ConfigError for a family whose head of this form isn't offered."""
        raise NotImplementedError

    @staticmethod
    def num_rows(examples: Any) -> np.ndarray:
        """int64 [examples]: the rows of `logits` that each example has."""
        raise NotImplementedError


class SequenceLabel(Labelled):
    """Whole sequences on a stock head: classification (cross-entropy), multi-label classification (the mean over the
    labels of each one's binary cross-entropy) or regression (squared error), by the stock config's `problem_type`."""

    @classmethod
    def check(cls, model: Any) -> None:
        """See Labelled."""
        check_head(model)

    @staticmethod
    def num_rows(examples: Any) -> np.ndarray:
        """One each."""
        return np.ones(len(examples), np.int64)

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`loss`, `correct`, `count` (sequences), and `logits`, fp32 [num_sequences, labels]."""
        num = batch.num_sequences
        # padding goes through the head too, so that every parameter has a gradient from an empty slot as well
        logits = classify(self.model, encode(self.model, batch), batch.cu_seqlens).float()
        kept, labels = logits[:num], batch.sequence_labels
        correct, count = logits.new_zeros(()), logits.new_tensor(float(num))
        if labels is None or num == 0:
            loss = logits.sum() * 0
        elif self.problem == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(kept, labels, reduction="sum") / kept.shape[1]
            correct = ((kept.detach() > 0) == (labels > 0.5)).all(-1).sum().float()
        elif self.problem == "regression":
            loss = F.mse_loss(kept[:, 0], labels, reduction="sum")
        else:
            loss = F.cross_entropy(kept, labels, reduction="sum")
            correct = (kept.detach().argmax(-1) == labels).sum().float()
        return {"loss": loss, "correct": correct, "count": count, "logits": kept}

    @property
    def problem(self) -> str:
        """As the stock class guesses it where its config is silent: one output is a number."""
        config = self.model.config
        return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")

    def count(self, batch: Any) -> int:
        """Sequences."""
        return batch.num_sequences


class Choice(Labelled):
    """Multiple choice: of sequences that stand side by side, `choices` an example, the right one (cross-entropy).

    One logit a sequence, softmax within the example (Devlin et al. 2019, section 4.4).
    """

    @classmethod
    def check(cls, model: Any) -> None:
        """See Labelled."""
        check_head(model, "multiple-choice")

    @staticmethod
    def num_rows(examples: Any) -> np.ndarray:
        """One for each choice."""
        return np.full(len(examples), examples.choices, np.int64)

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`loss`, `correct`, `count` (examples), and `logits`, fp32 [num_sequences, 1]."""
        logits = classify(self.model, encode(self.model, batch), batch.cu_seqlens, "multiple-choice").float()
        kept, labels = logits[: batch.num_sequences], batch.sequence_labels
        correct, count = logits.new_zeros(()), logits.new_tensor(float(self.count(batch)))
        if labels is None or len(labels) == 0:
            loss = logits.sum() * 0
        else:
            scores = kept.view(len(labels), -1)
            loss = F.cross_entropy(scores, labels, reduction="sum")
            correct = (scores.detach().argmax(-1) == labels).sum().float()
        return {"loss": loss, "correct": correct, "count": count, "logits": kept}

    def count(self, batch: Any) -> int:
        """Examples; none without labels."""
        return 0 if batch.sequence_labels is None else len(batch.sequence_labels)


@dataclass(frozen=True)
class Head:
    """A form of fine-tuning: the stock auto class, and its loss."""

    auto_class: str
    module: type[Labelled]


HEADS_OF: dict[str, Head] = {
    "sequence": Head("AutoModelForSequenceClassification", SequenceLabel),
    "choice": Head("AutoModelForMultipleChoice", Choice),
}
