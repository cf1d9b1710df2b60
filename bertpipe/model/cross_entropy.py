"""Cross-entropy of the predicted positions that never holds the logits [P, V] in fp32.

`logits.float()` and what `F.cross_entropy` keeps of it come to three fp32 tensors of P x V, the largest of a step. Here
some rows at a time are widened, reduced and dropped; the backward pass widens them again and writes the gradient in
the dtype of the logits. All arithmetic is in fp32 (float64 for float64 logits).

The gradient gets memory of its own: written over the logits it would be wrong in silence for whoever reads them after
the backward pass.

A softmax of P x V is most of the cost on CPU, and the backward pass needs another one. Where only the weighted sum of
the losses is wanted (`summed_cross_entropy`), its gradient is one factor times what the forward pass has at hand; told
that factor, the forward pass makes the gradient as well, and keeps it in place of the logits.
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


def summed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum of weights x losses, a scalar, and `right` of each row; both as `cross_entropy` gives them.

    Args:
        logits: [P, V], any floating dtype.
        labels: int64 [P], each in 0 .. V - 1.
        weights: fp32 [P]; without a gradient.
        factor: scalar above 0, what the caller will multiply the sum with before the backward pass, where it knows it.
            With another factor the gradient is right as well, but rounded to the dtype of the logits twice.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        losses, right = cross_entropy(logits, labels)
        return (losses * weights).sum(), right
    return _Summed.apply(logits, labels, weights, 1.0 if factor is None else float(factor))


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


class _Summed(torch.autograd.Function):
    """Keeps factor x gradient, [P, V] in the dtype of the logits, and nothing where no gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert factor > 0
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses, right = [_widen(logits.new_zeros(0))], [labels.new_zeros(0, dtype=torch.bool)]
        step = _rows(logits)
        for first in range(0, len(logits), step):
            rows = slice(first, first + step)
            wide, wanted = _widen(logits[rows], copy=True), labels[rows, None]
            own = wide.gather(1, wanted)
            others = wide.scatter_(1, wanted, -torch.inf).amax(-1, keepdim=True)
            wide.scatter_(1, wanted, own)
            right.append(_outranks(wide, wanted, own, others))
            torch.softmax(wide, -1, out=wide)
            # the largest probability is 1 / sum of exp(logit - largest logit)
            losses.append((own.maximum(others) - own - wide.amax(-1, keepdim=True).log())[:, 0])
            if gradient is not None:
                wide.scatter_add_(1, wanted, wide.new_full((1, 1), -1.0).expand(len(wide), 1))
                gradient[rows] = wide.mul_(weights[rows, None] * factor)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.factor = factor
        every = torch.cat(right)
        ctx.mark_non_differentiable(every)
        return (torch.cat(losses) * weights).sum(), every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        ratio = float(grads[0]) / ctx.factor
        return gradient if ratio == 1 else gradient * ratio, None, None, None


def _rows(logits: torch.Tensor) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"]) // (4 * logits.shape[1]))


def _widen(x: torch.Tensor, copy: bool = False) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=copy)


def _is_largest(wide: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """wide.argmax(-1) == wanted, bool [C], for wide [C, V] and wanted [C, 1]."""
    if wide.device.type != "cpu" or torch.compiler.is_compiling():
        return wide.argmax(-1) == wanted[:, 0]
    others = wide.scatter(1, wanted, -torch.inf).amax(-1, keepdim=True)
    return _outranks(wide, wanted, wide.gather(1, wanted), others)


def _outranks(wide: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The same, given the wanted logit and the largest of the others, [C, 1] each.

    argmax takes more time on CPU than the whole softmax, amax a tenth of that; so argmax sees only the rows where the
    two tie.
    """
    right = (own > others)[:, 0]
    ties = (own == others)[:, 0].nonzero()[:, 0]
    if len(ties):
        right[ties] = wide[ties].argmax(-1) == wanted[ties, 0]
    return right
