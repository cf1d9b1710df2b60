"""Stock classification heads on packed rows.

A stock pooler takes hidden[:, 0] or averages hidden over dim 1, which in a packed row is the first sequence alone or
all of them together. So pooling is done here, by sequence, and a head is given its result as a batch of sequences of
length one, [S, 1, H], and does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bertpipe.errors import ConfigError


@dataclass(frozen=True)
class Head:
    """The classification head of a family."""

    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    """(sequence-classification model, pooled [S, 1, H]) -> logits [S, labels]"""
    poolings: tuple[str, ...] = ("first",)
    """Keys of POOLINGS that the stock config's `classifier_pooling` may name; `first` where it has no such field."""


def _pooled(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    """Heads behind a pooler: bert."""
    return m.classifier(m.dropout(m.bert.pooler(pooled)))


def _albert(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(m.albert.pooler_activation(m.albert.pooler(pooled[:, 0]))))


def _distilbert(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(functional.relu(m.pre_classifier(pooled[:, 0]))))


def _modernbert(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.drop(m.head(pooled[:, 0])))


def _eurobert(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.activation(m.dense(pooled[:, 0])))


def _deberta(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(m.pooler(pooled)))


_WHOLE = Head(lambda m, pooled: m.classifier(pooled))  # a module that takes [S, 1, H] itself

HEADS: dict[str, Head] = {
    "bert": Head(_pooled),
    "albert": Head(_albert),
    "roberta": _WHOLE,
    "camembert": _WHOLE,
    "xlm-roberta": _WHOLE,
    "electra": _WHOLE,
    "distilbert": Head(_distilbert),
    "modernbert": Head(_modernbert, ("cls", "mean")),
    "eurobert": Head(_eurobert, ("bos", "mean", "late")),
    "deberta": Head(_deberta),
    "deberta-v2": Head(_deberta),
    "big_bird": _WHOLE,
}

Logits = Callable[[torch.Tensor], torch.Tensor]


def _first(head: Logits, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return head(hidden[cu_seqlens[:-1].long()])


def _mean(head: Logits, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return head(_means(hidden, cu_seqlens))


def _late(head: Logits, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The head on every token, its logits averaged."""
    return _means(head(hidden), cu_seqlens)


def _means(rows: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean of each sequence's rows [T, D], fp32 [S, D]."""
    lengths = cu_seqlens.diff().long()  # they sum up to T, so nothing has to be checked (that would wait for the GPU)
    return torch.segment_reduce(rows.float(), "mean", lengths=lengths, axis=0, unsafe=True)


POOLINGS: dict[str, Callable[[Logits, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "first": _first,
    "cls": _first,
    "bos": _first,
    "mean": _mean,
    "late": _late,
}


def pooling(model: Any) -> str:
    """The key of POOLINGS that a model's config asks for; ConfigError for a family or pooling that isn't offered."""
    kind = model.config.model_type
    if kind not in HEADS:
        raise ConfigError(
            f"finetune: no classification head is offered for {kind} models; offered are {', '.join(HEADS)}"
        )
    offered = HEADS[kind].poolings
    name = getattr(model.config, "classifier_pooling", "first")
    if name not in offered:
        raise ConfigError(
            f"finetune: classifier_pooling {name!r} is not offered for {kind} models; offered are {', '.join(offered)}"
        )
    return name


def check_head(model: Any) -> None:
    """ConfigError for a family whose classification head, or the pooling of its config, isn't offered."""
    pooling(model)


def classify(model: Any, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Logits of a stock sequence-classification model for every sequence of a packed row, tail padding included.

    Args:
        model: the stock model.
        hidden: [T, H], its encoder's last hidden states.
        cu_seqlens: int32 [S + 1], where each sequence begins and the last ends; from 0 to T.

    Returns:
        [S, labels]
    """
    pool = POOLINGS[pooling(model)]
    head = HEADS[model.config.model_type]
    return pool(lambda rows: head.logits(model, rows.unsqueeze(1)), hidden, cu_seqlens)
