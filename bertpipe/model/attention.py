"""Padding-free packed attention for stock encoders, as attention functions of transformers' own registry.

Sequences lie end to end in one row; every layer but attention is indifferent to that. There are two kernels:

* `bertpipe_packed` runs anywhere: it groups the sequences by length (rounded up to `STEP`), lays each group out as a
  padded [N, L] block, works there and lays the result back. The layout is worked out once a batch (`Layout`) and handed
  down through the model's keyword arguments.
* `bertpipe_varlen` is torch's FlashAttention for sequences of varying length: CUDA, 16 bits, no dropout. It needs no
  layout, so a whole forward is one graph.

`choose` (model/kernels.py) says which a run takes.

Shapes: T tokens of the row, H heads (K of keys and values, H in most families), D head size; q [1, H, T, D], k and v
[1, K, T, D]; result [1, T, H, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from bertpipe.model.dropout import dropout as drop

NAME = "bertpipe_packed"
VARLEN = "bertpipe_varlen"
STEP = 32  # sequences whose lengths round up to the same multiple share a block
FINE_STEP = 16  # the same for attention alone on CPU, and the shortest block there: shorter rows take no less time
WIDE_LENGTH = 64  # below which softmax on CPU is in fp32: of short rows in bf16 it takes up to ten times as long
PLAIN_LENGTH = 512  # up to which attention on CPU in bf16 is plain matrix products; it keeps N x H x L x L weights


@dataclass(frozen=True)
class Block:
    """Sequences of about one length as N rows of L."""

    first: int
    """Row of its first token in the padded order."""
    num: int
    """N"""
    length: int
    """L"""
    hidden: torch.Tensor | None
    """bool [N, 1, 1, L], true for padding; None where every row is full."""


@dataclass(frozen=True)
class Layout:
    """How a packed row is laid out in blocks."""

    blocks: list[Block]
    spread: torch.Tensor
    """int64 [sum of N x L]: which token stands at each padded place (padding repeats a real token)."""
    gather: torch.Tensor
    """int64 [T]: the padded place of each token."""


def plan(cu_seqlens: torch.Tensor) -> Layout:
    """The layout for attention alone, where a block costs little: a whole model has its own (padded.py)."""
    return layout(cu_seqlens, FINE_STEP, FINE_STEP) if cu_seqlens.device.type == "cpu" else layout(cu_seqlens)


def layout(cu_seqlens: torch.Tensor, step: int = STEP, shortest: int = 1) -> Layout:
    """The layout of a row whose sequences begin and end at `cu_seqlens`, int32 [S + 1] from 0 to T.

    Lengths that round up to the same multiple of `step` share a block, of at least `shortest` tokens.
    """
    starts, lengths = cu_seqlens[:-1].long().cpu(), cu_seqlens.diff().long().cpu()
    blocks, spread, first = [], [], 0
    gather = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    for chosen in _groups(lengths, step):
        length = max(int(lengths[chosen].max()), shortest)
        offsets = torch.arange(length)
        real = offsets < lengths[chosen, None]
        index = torch.where(real, starts[chosen, None] + offsets, starts[chosen, None])
        gather[index[real]] = first + torch.arange(index.numel()).view_as(index)[real]
        hidden = None if bool(real.all()) else ~real[:, None, None, :].to(cu_seqlens.device)
        blocks.append(Block(first, len(chosen), length, hidden))
        spread.append(index.flatten())
        first += index.numel()
    device = cu_seqlens.device
    return Layout(blocks, torch.cat(spread).to(device), gather.to(device))


def _groups(lengths: torch.Tensor, step: int) -> list[torch.Tensor]:
    """Sequences that share a block, int64 [N] each, for int64 lengths [S]; empty sequences are in none.

    Where most of a group have the length of the longest, the rest stand apart, so that most need no mask.
    """
    padded = (lengths + step - 1) // step * step
    groups = []
    for size in padded[padded > 0].unique().tolist():
        chosen = (padded == size).nonzero()[:, 0]
        full = lengths[chosen] == lengths[chosen].max()
        split = 2 * int(full.sum()) > len(chosen) and not bool(full.all())
        groups += [chosen[~full], chosen[full]] if split else [chosen]
    return groups


class _Relay(torch.autograd.Function):
    """rows[index], for an index whose real places are each read once: its gradient is rows[inverse].

    The gradient of the padding, which repeats tokens, is 0 by construction and is left out.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Collect(torch.autograd.Function):
    """padded[gather]: its gradient goes back to the real places, 0 to the padding."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gather)
        ctx.size = len(padded)
        return padded.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gather,) = ctx.saved_tensors
        out = grads[0].new_zeros(ctx.size, grads[0].shape[1])
        return out.index_copy_(0, gather, grads[0]), None


def collect(padded: torch.Tensor, laid_out: Layout) -> torch.Tensor:
    """[sum of N x L, D] of all blocks -> [T, D] of the row; the padding is left out and gets no gradient."""
    return _Collect.apply(padded, laid_out.gather)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    packed_layout: Layout | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each sequence to itself alone; registered with transformers as `bertpipe_packed`.

    Raises ValueError when neither `cu_seq_lens_q` nor `packed_layout` came through.
    """
    if packed_layout is None:
        if cu_seq_lens_q is None:
            raise ValueError(f"{type(module).__name__}: no cu_seq_lens_q came down to packed attention")
        packed_layout = plan(cu_seq_lens_q)
    heads, num_tokens, size = query.shape[1:]
    scaling = size**-0.5 if scaling is None else scaling
    if key.shape[1] != heads:  # each head of keys and values serves several of queries (eurobert)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary position numbers are fp32 and widen them
    spread = [
        _Relay.apply(x[0].transpose(0, 1).reshape(num_tokens, heads * size), packed_layout.spread, packed_layout.gather)
        for x in (query, key, value)
    ]
    sizes = [block.num * block.length for block in packed_layout.blocks]
    outputs = []
    for block, *rows in zip(packed_layout.blocks, *(x.split(sizes) for x in spread), strict=True):
        q, k, v = (x.view(block.num, block.length, heads, size).transpose(1, 2) for x in rows)
        hidden = block.hidden
        if sliding_window is not None and block.length >= sliding_window:
            offsets = torch.arange(block.length, device=query.device)
            far = (offsets[:, None] - offsets).abs() >= sliding_window  # modernbert passes its window + 1
            hidden = far if hidden is None else hidden | far
        mixed = _attend(q, k, v, hidden, scaling, dropout)
        outputs.append(mixed.transpose(1, 2).reshape(-1, heads * size))
    collected = collect(torch.cat(outputs), packed_layout)
    return collected.view(1, num_tokens, heads, size), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, scaling: float, dropout: float
) -> torch.Tensor:
    """[N, H, L, D] each; `hidden` is true where a key must not be seen.

    On CPU in bf16 the backward of scaled_dot_product_attention takes two to three times as long as plain matrix
    products (docs/decisions.md); long blocks take it for its memory.
    """
    plain = q.dtype == torch.bfloat16 or dropout > 0  # with dropout it makes the same products, and draws slowly
    if plain and q.device.type == "cpu" and q.shape[2] <= PLAIN_LENGTH:
        scores = torch.matmul(q * scaling, k.transpose(-1, -2))
        scores = scores.float() if q.shape[2] < WIDE_LENGTH else scores
        if hidden is not None:  # masked_fill takes five times as long, and its backward as well
            scores = scores + scores.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return torch.matmul(drop(torch.softmax(scores, -1).to(v.dtype), dropout), v)
    visible = None if hidden is None else ~hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each sequence to itself alone by torch's FlashAttention; registered as `bertpipe_varlen`.

    Rotary position numbers are fp32, so queries and keys may come wider than values; they are made as narrow. A window
    w of transformers lets |i - j| < w through; FlashAttention counts the keys on either side, w - 1 each. Raises
    ValueError without the boundaries, or with dropout, which this kernel hasn't got.
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{type(module).__name__}: no cu_seq_lens_q and max_length_q came down to packed attention")
    if dropout:
        raise ValueError(f"{type(module).__name__}: {VARLEN} has no dropout, {dropout} was asked for")
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    grouped = k.shape[1] != q.shape[1]
    cu, longest = cu_seq_lens_q, max_length_q
    mixed = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped)
    assert isinstance(mixed, torch.Tensor)
    return mixed.unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed rows need no mask: layout and boundaries keep sequences apart."""


def register() -> None:
    """Make both kernels known to transformers; may be called again."""
    for name, function in ((NAME, packed_attention), (VARLEN, varlen_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)


register()
