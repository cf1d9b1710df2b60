"""Stock classification heads on packed rows.

A stock pooler takes hidden[:, 0], which in a packed row is the first sequence alone. So a head is given each
sequence's first hidden state as a batch of sequences of length one, [S, 1, H], and does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from bertpipe.errors import ConfigError


def _pooled(encoder: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Heads behind a pooler: bert."""
    return lambda m, first: m.classifier(m.dropout(getattr(m, encoder).pooler(first)))


def _albert(m: Any, first: torch.Tensor) -> torch.Tensor:
    pooled = m.albert.pooler_activation(m.albert.pooler(first[:, 0]))
    return m.classifier(m.dropout(pooled))


def _distilbert(m: Any, first: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(functional.relu(m.pre_classifier(first[:, 0]))))


HEADS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "bert": _pooled("bert"),
    "albert": _albert,
    "roberta": lambda m, first: m.classifier(first),
    "camembert": lambda m, first: m.classifier(first),
    "xlm-roberta": lambda m, first: m.classifier(first),
    "electra": lambda m, first: m.classifier(first),
    "distilbert": _distilbert,
}


def check_head(model: Any) -> None:
    """ConfigError for a family whose classification head isn't offered."""
    kind = model.config.model_type
    if kind not in HEADS:
        raise ConfigError(
            f"finetune: no classification head is offered for {kind} models; offered are {', '.join(HEADS)}"
        )


def classify(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, labels] of a stock sequence-classification model from first hidden states [S, H]."""
    check_head(model)
    return HEADS[model.config.model_type](model, hidden.unsqueeze(1))
