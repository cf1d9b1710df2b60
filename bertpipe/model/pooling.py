"""Stock heads of whole sequences on packed rows: classification and multiple choice.

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
    """The head of a family."""

    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    """(model with the head, pooled [S, 1, H]) -> logits [S, labels]"""
    poolings: tuple[str, ...] = ("first",)
    """Keys of POOLINGS that `setting` may name; `first` where the stock config has no such field."""
    setting: str = "classifier_pooling"
    """Field of the stock config that names the pooling."""


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


def _roberta_choice(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(m.roberta.pooler(pooled)))


def _electra_choice(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.sequence_summary(pooled))


def _big_bird_choice(m: Any, pooled: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(m.bert.activation(m.bert.pooler(pooled[:, 0]))))


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

CHOICE_HEADS: dict[str, Head] = {  # transformers has none for eurobert and deberta
    "bert": Head(_pooled),
    "albert": Head(_albert),
    "roberta": Head(_roberta_choice),
    "camembert": Head(_roberta_choice),
    "xlm-roberta": Head(_roberta_choice),
    "electra": Head(_electra_choice, setting="summary_type"),
    "distilbert": Head(_distilbert),
    "modernbert": Head(_modernbert, ("cls", "mean")),
    "deberta-v2": Head(_deberta),
    "big_bird": Head(_big_bird_choice),
}

FORMS = {"classification": HEADS, "multiple-choice": CHOICE_HEADS}

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


def pooling(model: Any, form: str = "classification") -> str:
    """The key of POOLINGS that a model's config asks for; ConfigError for a family or pooling that isn't offered."""
    kind, heads = model.config.model_type, FORMS[form]
    if kind not in heads:
        raise ConfigError(f"finetune: no {form} head is offered for {kind} models; offered are {', '.join(heads)}")
    offered, setting = heads[kind].poolings, heads[kind].setting
    name = getattr(model.config, setting, "first")
    if name not in offered:
        raise ConfigError(
            f"finetune: {setting} {name!r} is not offered for {kind} models; offered are {', '.join(offered)}"
        )
    return name


def check_head(model: Any, form: str = "classification") -> None:
    """ConfigError for a family whose head of this form, or the pooling of its config, isn't offered."""
    pooling(model, form)


def classify(model: Any, hidden: torch.Tensor, cu_seqlens: torch.Tensor, form: str = "classification") -> torch.Tensor:
    """Logits of a stock model with a head on whole sequences, for every one of a packed row, tail padding included.

    Args:
        model: the stock model.
        hidden: [T, H], its encoder's last hidden states.
        cu_seqlens: int32 [S + 1], where each sequence begins and the last ends; from 0 to T.
        form: key into FORMS.

    Returns:
        [S, labels]
    """
    pool = POOLINGS[pooling(model, form)]
    head = FORMS[form][model.config.model_type]
    return pool(lambda rows: head.logits(model, rows.unsqueeze(1)), hidden, cu_seqlens)
