"""Stock token-classification heads on packed rows. HEADS is the table.

Such a head sees each token's hidden state by itself, so packing changes nothing and only the labelled tokens need to go
through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bertpipe.errors import ConfigError


def _dropped(m: Any, h: torch.Tensor) -> torch.Tensor:
    return m.classifier(m.dropout(h))


HEADS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "bert": _dropped,
    "albert": _dropped,
    "roberta": _dropped,
    "camembert": _dropped,
    "xlm-roberta": _dropped,
    "electra": _dropped,
    "distilbert": _dropped,
    "modernbert": lambda m, h: m.classifier(m.drop(m.head(h))),
    "eurobert": lambda m, h: m.classifier(h),
    "deberta": _dropped,
    "deberta-v2": _dropped,
    "big_bird": _dropped,
}
"""(token-classification model, hidden [P, H]) -> logits [P, labels]"""


def check_head(model: Any) -> None:
    """ConfigError for a family whose token-classification head isn't offered."""
    kind = model.config.model_type
    if kind not in HEADS:
        raise ConfigError(
            f"finetune: no token-classification head is offered for {kind} models; offered are {', '.join(HEADS)}"
        )


def classify(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [P, labels] of a stock token-classification model for hidden states [P, H] of its encoder."""
    check_head(model)
    return HEADS[model.config.model_type](model, hidden)
