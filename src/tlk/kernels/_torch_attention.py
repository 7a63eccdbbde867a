"""Attention in plain torch: what the kernels must compute, and what runs where they would be slow.

Dense batches are [B, S, H, D]; len_q and len_k [B] say how much of each sequence is real.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE_ROWS = 1024  # queries whose scores are held at once


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    len_q: Tensor,
    len_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a batch whose sequence b has `len_q[b]` queries and `len_k[b]` keys."""
    heads, kv_heads = q.shape[2], k.shape[2]
    # An extra logit without a value keeps the softmax defined for rows that see no key.
    extra = torch.full((heads,), -torch.inf, device=q.device) if sinks is None else sinks.float()
    parts = []
    for start in range(0, q.shape[1], REFERENCE_ROWS):
        rows = q[:, start : start + REFERENCE_ROWS].unflatten(2, (kv_heads, -1)).float()
        scores = torch.einsum("bikgd,bjkd->bkgij", rows, k.float()) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        span = (start, start + rows.shape[1])
        seen = _visible(span, k.shape[1], len_q, len_k, causal, window)[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        logit = extra.view(kv_heads, -1, 1, 1).expand(*scores.shape[:1], -1, -1, rows.shape[1], -1)
        scores = torch.cat([scores, logit], -1)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        p = torch.exp(scores - top)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        parts.append(torch.einsum("bkgij,bjkd->bikgd", p[..., :-1], v.float()).flatten(2, 3))
    empty = q.new_empty(*q.shape[:-1], v.shape[-1])
    return torch.cat(parts, 1).to(q.dtype) if parts else empty


def _visible(
    rows: tuple[int, int], columns: int, len_q: Tensor, len_k: Tensor, causal: bool, window: int
) -> Tensor:
    """Which keys [0, columns) the queries `rows` of each sequence see: bool [B, rows, columns]."""
    i = torch.arange(*rows, device=len_q.device)[None, :, None]
    j = torch.arange(columns, device=len_q.device)[None, None, :]
    ahead = j - (i + (len_k - len_q)[:, None, None])  # the last query stands at the last key
    seen = (j < len_k[:, None, None]).expand_as(ahead)
    if causal:
        seen = seen & (ahead <= 0)
    if window:
        seen = seen & (ahead > -window) & (ahead < window)
    return seen


def by_sequence(
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    """`run` a dense batch, or concatenated sequences after padding them to one length."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        lengths = (torch.full((1,), n, device=q.device) for n in (max_q, max_k))
        return run(q, k, v, *lengths)
    rows = _padded_rows(cu_seqlens_q, max_q, q.shape[0])
    columns = _padded_rows(cu_seqlens_k, max_k, k.shape[0])
    q_pad, k_pad, v_pad = (
        torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]
        for x, index in ((q, rows), (k, columns), (v, columns))
    )
    out = q.new_zeros(q.shape[0] + 1, q.shape[1], v.shape[2])
    out[rows] = run(q_pad, k_pad, v_pad, cu_seqlens_q.diff(), cu_seqlens_k.diff())
    return out[:-1].clone()


def _padded_rows(cu_seqlens: Tensor, longest: int, total: int) -> Tensor:
    """Row of token i of sequence s, or `total` where the sequence has none: [S, longest]."""
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return torch.where(rows < cu_seqlens[1:, None], rows, total).long()


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    len_q: Tensor,
    len_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
) -> Tensor:
    """`attend` by torch, for GPUs on which Triton has no tensor cores."""
    group = q.shape[2] // k.shape[2]
    seen = _visible((0, q.shape[1]), k.shape[1], len_q, len_k, causal, window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, 2).transpose(1, 2),
        v.repeat_interleave(group, 2).transpose(1, 2),
        attn_mask=seen[:, None],
        scale=softmax_scale,
    )
    return out.transpose(1, 2).masked_fill(~seen.any(-1)[..., None, None], 0)
