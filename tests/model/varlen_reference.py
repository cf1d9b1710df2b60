"""torch's varlen attention on CPU, slowly: what its documentation says, one sequence at a time.

torch has kernels for `torch_attn::_varlen_attn` on CUDA alone. Importing this gives the very same operators CPU
kernels, so that our side of the call (shapes, boundaries, window, scale, head groups) and torch's own shape functions
and autograd formula run in tests without a GPU. The CUDA kernels themselves are tested where there is one.
"""

import torch
from torch.nn.attention import varlen


def sequences(q, k, cu_q, cu_k, scale, window):
    """(rows of q, rows of k, masked scores [H, q, k]) of each sequence; k has as many heads as q."""
    left, right = window or (-1, -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for n in range(len(cu_q) - 1):
        rows, columns = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]).float() * scale
        back = torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[2])
        outside = (back > left) & (left >= 0) | (-back > right) & (right >= 0)
        yield rows, columns, scores.masked_fill(outside, -torch.inf)


def repeated(x, heads):
    """[T, K, D] -> [T, H, D]: each head of keys or values for its group of queries."""
    return x.repeat_interleave(heads // x.shape[1], 1)


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert cu_seq_q.dtype == torch.int32 and not is_causal
    assert int(cu_seq_q.diff().max()) <= max_q and int(cu_seq_k.diff().max()) <= max_k
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    heads = query.shape[1]
    assert key.shape[1] == heads or enable_gqa, "fewer heads of keys need enable_gqa"
    key, value = repeated(key, heads), repeated(value, heads)
    out, sums = torch.empty_like(query), query.new_empty(heads, len(query), dtype=torch.float32)
    for rows, columns, scores in sequences(query, key, cu_seq_q, cu_seq_k, scale, window_size):
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value[columns])
        sums[:, rows] = scores.logsumexp(-1)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state,
    scale=None, window_size=None,
):  # fmt: skip
    # Dao et al. 2022, FlashAttention, appendix B.2
    heads, groups = query.shape[1], key.shape[1:]
    key, value = repeated(key, heads), repeated(value, heads)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    for rows, columns, scores in sequences(query, key, cu_seq_q, cu_seq_k, scale, window_size):
        weights, given = (scores - lse[:, rows, None]).exp(), grad_out[rows]
        dv[columns] = torch.einsum("hqk,qhd->khd", weights, given)
        inner = torch.einsum("qhd,khd->hqk", given, value[columns]) - (given * out[rows]).sum(-1).T[:, :, None]
        ds = weights * inner * (query.shape[-1] ** -0.5 if scale is None else scale)
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, key[columns])
        dk[columns] = torch.einsum("hqk,qhd->khd", ds, query[rows])
    dk, dv = (x.view(len(x), groups[0], -1, groups[1]).sum(2) for x in (dk, dv))
    return dq, dk, dv
