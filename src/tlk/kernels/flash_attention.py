"""Attention of queries over dense or concatenated keys and values, without a score matrix in memory.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)),   s_ij = scale · q_i · k_j

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453
"""

import torch
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._op import op

REFERENCE_ROWS = 1024  # queries whose scores the reference holds at once
MAX_HEAD_DIM = 256


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Attention of `q` [B, Sq, H, D] or [T, H, D] in float32, rounded once; see `flash_attention`."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        rows = _padded_rows(cu_seqlens_q, max_q, q.shape[0])
        columns = _padded_rows(cu_seqlens_k, max_k, k.shape[0])
        len_q, len_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        padded = (_pad(q, rows), _pad(k, columns), _pad(v, columns))
        out = _attend(*padded, len_q, len_k, softmax_scale, causal, window, softcap, sinks)
        return _unpad(out, rows, q.shape[0])
    len_q, len_k = (torch.tensor([x.shape[1]], device=q.device) for x in (q, k))
    return _attend(q, k, v, len_q, len_k, softmax_scale, causal, window, softcap, sinks)


def _attend(
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
    """Batched attention, where sequence b has `len_q[b]` queries and `len_k[b]` keys."""
    batch, _, heads, _ = q.shape
    kv_heads = k.shape[2]
    # An extra logit without a value keeps the softmax defined for rows that see no key.
    extra = torch.full((heads,), -torch.inf, device=q.device) if sinks is None else sinks.float()
    parts = []
    for start in range(0, q.shape[1], REFERENCE_ROWS):
        rows = q[:, start : start + REFERENCE_ROWS].unflatten(2, (kv_heads, -1)).float()
        scores = torch.einsum("bikgd,bjkd->bkgij", rows, k.float()) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        span = (start, start + rows.shape[1])
        seen = visible(span, k.shape[1], len_q, len_k, causal, window)[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        logit = extra.view(kv_heads, -1, 1, 1).expand(*scores.shape[:1], -1, -1, rows.shape[1], -1)
        scores = torch.cat([scores, logit], -1)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        p = torch.exp(scores - top)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        parts.append(torch.einsum("bkgij,bjkd->bikgd", p[..., :-1], v.float()).flatten(2, 3))
    out = torch.cat(parts, 1) if parts else q.new_zeros(batch, 0, heads, v.shape[-1])
    return out.to(q.dtype)


def visible(
    rows: tuple[int, int], columns: int, len_q: Tensor, len_k: Tensor, causal: bool, window: int
) -> Tensor:
    """Which keys [0, columns) the queries `rows` of each sequence see: bool [B, rows, columns].

    The last query of a sequence stands at its last key.
    """
    i = torch.arange(*rows, device=len_q.device)[None, :, None]
    j = torch.arange(columns, device=len_q.device)[None, None, :]
    ahead = j - (i + (len_k - len_q)[:, None, None])
    seen = j < len_k[:, None, None]
    seen = seen & (ahead <= 0) if causal else seen.expand_as(ahead)
    if window:
        seen = seen & (ahead > -window) & (ahead < window)
    return seen


def _padded_rows(cu_seqlens: Tensor, longest: int, total: int) -> Tensor:
    """Row of token i of sequence s, or `total` where the sequence has none: [S, longest]."""
    i = torch.arange(longest, device=cu_seqlens.device)
    rows = cu_seqlens[:-1, None] + i
    return torch.where(rows < cu_seqlens[1:, None], rows, total).long()


def _pad(x: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[rows]


def _unpad(x: Tensor, rows: Tensor, total: int) -> Tensor:
    out = x.new_zeros(total + 1, *x.shape[2:])
    out[rows] = x
    return out[:total].clone()


def _fake(q, k, v, *_):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@op(flash_attention_reference, fake=_fake)
def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    return flash_attention_reference(
        q, k, v, softmax_scale, causal, window, softcap, sinks, cu_seqlens_q, cu_seqlens_k, max_q, max_k
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
) -> Tensor:
    """Attend from `q` [B, Sq, H, D] to `k` [B, Sk, Hk, D] and `v` [B, Sk, Hk, Dv]: [B, Sq, H, Dv].

    With `cu_seqlens_q` and `cu_seqlens_k` (int32 [S + 1], first 0) the sequences of different
    lengths follow one another instead: `q` [T, H, D], `k` [Tk, Hk, D], `v` [Tk, Hk, Dv] give
    [T, H, Dv], where `max_q` and `max_k` bound the lengths; rows of no sequence give 0.

    All of `q`, `k`, `v` are float32, float16 or bfloat16 alike, with any strides but 1 in the last
    dimension; D and Dv reach 256; query head h reads key head h // (H / Hk). Query i stands at
    position i + Sk - Sq. It sees keys up to its position if `causal`, and if `window` > 0 only keys
    less than `window` away. `softcap` > 0 bounds scores to softcap · tanh(score / softcap). `sinks`
    [H] adds one logit per head to the softmax, without a value. A query that sees no key gives 0.
    `softmax_scale` is 1 / √D unless given.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit.
    """
    _check_tensors(q, k, v, sinks, varlen=cu_seqlens_q is not None)
    _check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:
        raise ValueError(f"softmax_scale must be > 0, got {scale}")
    if window < 0:
        raise ValueError(f"window must be >= 0, got {window}")
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0, got {softcap}")
    lengths = (
        q.shape[1] if max_q is None else max_q,
        k.shape[1] if max_k is None else max_k,
    )
    return _flash_attention(
        q, k, v, scale, causal, window, softcap, sinks, cu_seqlens_q, cu_seqlens_k, *lengths
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, varlen: bool) -> None:
    check_dtype("q", q, *FLOATS)
    lead = (None,) if varlen else (None, None)
    check_shape("q", q, *lead, None, None)
    check_shape("k", k, *(lead if varlen else (q.shape[0], None)), None, q.shape[-1])
    check_shape("v", v, *k.shape[:-1], None)
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, q.dtype)
        check_device(name, x, q.device)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, x)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head dim of 1 to 256, got {x.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q must have a multiple of k's {k.shape[-2]} heads, got {q.shape[-2]} heads"
        )
    if sinks is not None:
        check_dtype("sinks", sinks, *FLOATS)
        check_shape("sinks", sinks, q.shape[-2])
        check_device("sinks", sinks, q.device)


def _check_lengths(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
) -> None:
    given = [x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_q, max_k)]
    if any(given) and not all(given):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k, max_q and max_k must be given together, got only some"
        )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    check_shape("cu_seqlens_k", cu_seqlens_k, *cu_seqlens_q.shape)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, x, torch.int32)
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)
        if x.dim() != 1 or x.shape[0] == 0:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(x.shape)}")
