"""Stock question-answering heads on packed rows.

These heads look at each token by itself, so that they need no pooling; what differs between families is what stands
before the last linear layer. HEADS is the table. EuroBERT has no stock class with such a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bertpipe.errors import ConfigError

Head = Callable[[Any, torch.Tensor, Any], torch.Tensor]
"""(question-answering model, hidden [T, H], packed batch) -> logits [T, 2] of an answer's start and end"""


def _linear(m: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    return m.qa_outputs(hidden)


def _distilbert(m: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    return m.qa_outputs(m.dropout(hidden))


def _modernbert(m: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    return m.classifier(m.drop(m.head(hidden)))


def _big_bird(m: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    """The stock class takes the tokens of the question, all up to the first [SEP] but [CLS], out of the running."""
    ends = batch.input_ids[0] == m.config.sep_token_id
    before = ends.cumsum(0) - ends.long()  # [SEP]s before a token, of the row, and of its sequence
    lengths = batch.cu_seqlens.diff().long()
    before = before - before[batch.cu_seqlens[:-1].long()].repeat_interleave(lengths, output_size=len(before))
    question = (before == 0) & (batch.position_ids[0] > 0)
    return m.qa_classifier(hidden) - question[:, None] * 1e6


HEADS: dict[str, Head] = {
    "bert": _linear,
    "albert": _linear,
    "roberta": _linear,
    "camembert": _linear,
    "xlm-roberta": _linear,
    "electra": _linear,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "deberta": _linear,
    "deberta-v2": _linear,
    "big_bird": _big_bird,
}


def check_head(model: Any) -> None:
    """ConfigError for a family whose question-answering head isn't offered."""
    kind = model.config.model_type
    if kind not in HEADS:
        raise ConfigError(
            f"finetune: no question-answering head is offered for {kind} models; offered are {', '.join(HEADS)}"
        )


def span_logits(model: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    """Logits of every token of a packed row, [T, 2]: that an answer starts there, that one ends there.

    Args:
        model: the stock question-answering model.
        hidden: [T, H], its encoder's last hidden states.
        batch: the row (PackedBatch).
    """
    check_head(model)
    return HEADS[model.config.model_type](model, hidden, batch)
