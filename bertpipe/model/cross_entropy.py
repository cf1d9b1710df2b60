"""Cross-entropy of the predicted positions that never holds the logits [P, V] in fp32.

`logits.float()` and what `F.cross_entropy` keeps of it come to three fp32 tensors of P x V, the largest of a step. Here
some rows at a time are widened, reduced and dropped; the backward pass widens them again and writes the gradient in
the dtype of the logits. All arithmetic is in fp32 (float64 for float64 logits).

The gradient gets memory of its own: written over the logits it would be wrong in silence for whoever reads them after
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}  # of a chunk in fp32: cache there, few kernel launches here


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(logits)[label] of each row, in nats, and whether the label is the row's (first) largest logit.

    Args:
        logits: [P, V], any floating dtype.
        labels: int64 [P], each in 0 .. V - 1.

    Returns:
        losses: fp32 [P] (float64 for float64 logits), differentiable once.
        right: bool [P].
    """
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came, and the labels."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(logits, labels)
        losses, right = [], []
        step = _rows(logits)
        for first in range(0, len(logits), step):
            wide, wanted = _widen(logits[first : first + step]), labels[first : first + step, None]
            losses.append(-torch.log_softmax(wide, -1).gather(1, wanted)[:, 0])
            right.append(_is_largest(wide, wanted))
        if not losses:
            return _widen(logits.new_zeros(0)), labels.new_zeros(0, dtype=torch.bool)
        every = torch.cat(right)
        ctx.mark_non_differentiable(every)
        return torch.cat(losses), every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels = ctx.saved_tensors
        out = torch.empty_like(logits)
        step = _rows(logits)
        for first in range(0, len(logits), step):
            rows = slice(first, first + step)
            wide = torch.softmax(_widen(logits[rows]), -1)
            wide.scatter_add_(1, labels[rows, None], wide.new_full((1, 1), -1.0).expand(len(wide), 1))
            out[rows] = wide.mul_(grads[0][rows, None])
        return out, None


def _rows(logits: torch.Tensor) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"]) // (4 * logits.shape[1]))


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _is_largest(wide: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """wide.argmax(-1) == wanted, bool [C], for wide [C, V] and wanted [C, 1].

    argmax takes more time on CPU than the whole softmax, amax a tenth of that. So there the wanted logit is
    compared with the largest of the others, and argmax sees only the rows where the two tie.
    """
    if wide.device.type != "cpu" or torch.compiler.is_compiling():
        return wide.argmax(-1) == wanted[:, 0]
    own = wide.gather(1, wanted)[:, 0]
    others = wide.scatter(1, wanted, -torch.inf).amax(-1)
    right = own > others
    ties = (own == others).nonzero()[:, 0]
    if len(ties):
        right[ties] = wide[ties].argmax(-1) == wanted[ties, 0]
    return right
