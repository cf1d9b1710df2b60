"""Dropout whose masks are drawn several times faster than torch draws them on CPU.

There torch draws each element of a mask by itself, and on one thread whatever their number (docs/decisions.md). Here
64 random bits make four elements. They come from torch's own generator, so that a seed decides the masks. Other
devices have torch's dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

BITS = 16  # random bits an element: a probability is rounded to a multiple of 1 / 65,536
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """`x` with each element set to 0 with probability `p`, and else divided by 1 - p (Srivastava et al. 2014)."""
    if x.device.type != "cpu" or x.dtype not in INTEGERS or p >= 1:
        return F.dropout(x, p)
    return x * draw_mask(x.shape, p, x.dtype) if p > 0 else x


def draw_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> torch.Tensor:
    """What `dropout` multiplies with, on CPU: 0, or 1 / (1 - p) in `dtype` (a key of INTEGERS).

    The bits of an element are a number from -32,768 on, and it stays if that reaches a threshold. Clamping leaves the
    threshold or its neighbour below, which are moved to 1 and 0; as integers times the bits of 1 / (1 - p), that is the
    mask. Comparing would make booleans, and these are slow to widen.
    """
    num = math.prod(shape)
    bits = torch.empty(-(-num // (64 // BITS)), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:num]
    stays = round(p * 2**BITS) - 2 ** (BITS - 1)
    bits = bits.to(INTEGERS[dtype]).clamp_(stays - 1, stays).sub_(stays - 1)
    weight = torch.tensor(1 / (1 - p), dtype=dtype).view(INTEGERS[dtype]).item()
    return bits.mul_(weight).view(dtype).view(shape)


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...], any floating dtype."""
        return dropout(x, self.p) if self.training else x


def replace_dropout(model: nn.Module) -> nn.Module:
    """Put `Dropout` in place of each nn.Dropout of a model; weights and their names stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
    return model
