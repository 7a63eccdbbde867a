"""Paged attention in PyTorch: the parts of the reference, and what prefills run on sm_75."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.kernels._kv_codes import as_bytes, decode_reference

QUERIES_AT_ONCE = 256  # scores are [H, this many, all keys]


def gather(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, length: Tensor, queries: int | Tensor,
    window: int, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Copy `pages` [B, n] of B sequences: [B, Hk, L, D], and which tokens some query sees, [B, L].

    8-bit codes become float32. The others, and the table's entries for their pages, may hold
    anything: they give 0.
    """
    page_size = k_cache.shape[2]
    key = torch.arange(pages.shape[1] * page_size, device=pages.device)
    seen = key < length
    if window:
        seen &= key > length - queries - window
    pages = torch.where(seen.unflatten(1, (-1, page_size)).any(-1), pages, 0).long()

    def dense(cache: Tensor, scale: Tensor | None) -> Tensor:
        codes = as_bytes(cache)[pages].view(cache.dtype)
        tokens = decode_reference(codes, scale).transpose(1, 2).flatten(2, 3)
        return tokens.masked_fill_(~seen[:, None, :, None], 0.0)

    return dense(k_cache, k_scale), dense(v_cache, v_scale), seen


def visible(position: Tensor, seen: Tensor, window: int) -> Tensor:
    """Which keys the queries at `position` [B, n] see: bool [B, n, L]."""
    behind = position[:, :, None] - torch.arange(seen.shape[1], device=seen.device)
    shown = (behind >= 0) & seen[:, None]
    return shown & (behind < window) if window else shown


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float,
    sinks: Tensor | None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """In `dtype`, softmax(q·kᵀ)·v of q [B, n, H, D]: [B, n, H, Dv], 0 in rows without a visible key."""
    group = q.shape[2] // k.shape[1]
    heads = q.to(dtype).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = heads @ k.to(dtype).transpose(2, 3) * scale  # [B, Hk, group·n, L]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (group, -1)).masked_fill(~visible[:, None, None], -torch.inf)
    sink = torch.full_like(scores[..., :1], -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, group, 1, 1).expand_as(sink)
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink - top)
    total = total.masked_fill(total == 0, 1.0)
    out = (p.flatten(2, 3) @ v.to(dtype)).unflatten(2, (group, -1)) / total
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


def paged_attention_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int, softcap: float,
    sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The op where Triton has no tensor cores, each sequence padded to `max_q` and its table.

    Shapes decide what runs, so it can be captured in a CUDA graph.
    """
    padded = torch.cat([q, q.new_zeros(1, *q.shape[1:])])
    out = q.new_zeros(q.shape[0] + 1, q.shape[1], v_cache.shape[-1])
    for s in range(seq_lens.shape[0]):
        start, queries = cu_seqlens_q[s], cu_seqlens_q[s + 1] - cu_seqlens_q[s]
        length = seq_lens[s : s + 1, None].long()
        k, v, seen = gather(
            k_cache, v_cache, page_table[s : s + 1], length, queries, window, k_scale, v_scale
        )
        k, v = k.to(q.dtype), v.to(q.dtype)
        for at in torch.arange(max_q, device=q.device).split(QUERIES_AT_ONCE):
            rows = torch.where(at < queries, start + at, q.shape[0]).long()[None]
            shown = visible(length - queries + at, seen, window)
            if softcap or sinks is not None:
                o = attend(padded[rows], k, v, shown, softmax_scale, softcap, sinks)
            else:
                o = _sdpa(padded[rows], k, v, shown, softmax_scale)
            out[rows] = torch.where((at < queries)[None, :, None, None], o, 0.0)
    return out[:-1].clone()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`attend` without softcap and sinks, on tensor cores."""
    group = q.shape[2] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=visible[:, None], scale=scale
    )
    return out.transpose(1, 2).masked_fill(~visible.any(-1)[:, :, None, None], 0.0)
