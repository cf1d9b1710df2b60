"""What is minimised in fine-tuning: a stock model with a head, on labelled sequences. HEADS_OF is the table.

As in objectives.py: `forward(batch)` does everything and returns sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bertpipe.model import span_heads, token_heads
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


def problem_of(config: Any) -> str:
    """`problem_type` of a stock config, as its class guesses it where that is silent: one output is a number."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


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
        """See `problem_of`."""
        return problem_of(self.model.config)

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


class TokenLabel(Labelled):
    """Cross-entropy at the labelled tokens, the stock head run on those alone."""

    @classmethod
    def check(cls, model: Any) -> None:
        """See Labelled."""
        token_heads.check_head(model)

    @staticmethod
    def num_rows(examples: Any) -> np.ndarray:
        """The labelled tokens of each."""
        return np.array([len(positions) for positions in examples.positions], np.int64)

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`loss`, `correct`, `count` (labelled tokens), and `logits`, fp32 [labelled tokens, labels]."""
        labels, weight = batch.predict_labels, batch.predict_weight
        # the fill goes through the head too, so that every parameter has a gradient from an empty slot as well
        logits = token_heads.classify(self.model, encode(self.model, batch)[batch.predict_index]).float()
        loss, correct = logits.sum() * 0, logits.new_zeros(())
        if labels is not None:
            loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum()
            correct = ((logits.detach().argmax(-1) == labels) * weight).sum()
        return {"loss": loss, "correct": correct, "count": weight.sum(), "logits": logits[weight > 0]}

    def count(self, batch: Any) -> int:
        """Labelled tokens."""
        return int(batch.predict_weight.sum())


class AnswerSpan(Labelled):
    """Where an answer starts and where it ends: for both a softmax over the tokens of the sequence, and the mean of
    their cross-entropies (Devlin et al. 2019, 4.2). [CLS] stands for no answer (4.3).

    A stock model gives a sequence alone the same loss. In a padded batch it gives another one: its softmax runs over
    the padding too.
    """

    @classmethod
    def check(cls, model: Any) -> None:
        """See Labelled."""
        span_heads.check_head(model)

    @staticmethod
    def num_rows(examples: Any) -> np.ndarray:
        """A row a token."""
        return examples.lengths

    def losses(self, batch: Any, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`loss`, `correct` (sequences of which both are likeliest), `count` (sequences), and `logits`, fp32 [tokens,
        2].
        """
        num, spans = batch.num_sequences, batch.sequence_labels
        hidden = encode(self.model, batch)
        with torch.autocast(hidden.device.type, enabled=False):  # in bf16 the best spans would often tie
            logits = span_heads.span_logits(self.model, hidden.float(), batch)
        correct, count = logits.new_zeros(()), logits.new_tensor(float(num))
        if spans is None or num == 0:
            loss = logits.sum() * 0
        else:
            first = batch.cu_seqlens[:-1].long()
            lengths = batch.cu_seqlens.diff().long()
            # lengths sum up to T, so nothing has to be checked (that would wait for the GPU)
            top = torch.segment_reduce(logits.detach(), "max", lengths=lengths, axis=0, unsafe=True)  # [S, 2]
            shifted = logits - top.repeat_interleave(lengths, 0, output_size=len(logits))
            total = torch.segment_reduce(shifted.exp(), "sum", lengths=lengths, axis=0, unsafe=True)
            gold = shifted.gather(0, first[:num, None] + spans)
            loss = (total[:num].log() - gold).sum() / 2
            correct = (gold.detach() == 0).all(-1).sum().float()
        return {"loss": loss, "correct": correct, "count": count, "logits": logits[: batch.num_tokens]}

    def count(self, batch: Any) -> int:
        """Sequences."""
        return batch.num_sequences


@dataclass(frozen=True)
class Head:
    """A form of fine-tuning: the stock auto class, and its loss."""

    auto_class: str
    module: type[Labelled]


HEADS_OF: dict[str, Head] = {
    "sequence": Head("AutoModelForSequenceClassification", SequenceLabel),
    "choice": Head("AutoModelForMultipleChoice", Choice),
    "token": Head("AutoModelForTokenClassification", TokenLabel),
    "span": Head("AutoModelForQuestionAnswering", AnswerSpan),
}
