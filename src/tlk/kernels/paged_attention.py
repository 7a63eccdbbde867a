"""Causal attention of new tokens over a paged KV cache: decode, chunked prefill and mixed batches in one op."""

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

_QUERIES_AT_ONCE = 256  # the reference holds scores of [H, this many queries, all keys]


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[-1])
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    alike: dict[tuple[int, int], list[int]] = {}  # sequences that one padded batch can hold
    for s, length in enumerate(lengths):
        queries = starts[s + 1] - starts[s]
        if queries and length:
            alike.setdefault((queries, length.bit_length()), []).append(s)
    for (queries, _), batch in alike.items():
        length = seq_lens[batch].long()[:, None]  # [B, 1]
        k, v, seen = _gather(k_cache, v_cache, page_table[batch], length, queries, window)
        key = torch.arange(k.shape[2], device=q.device)
        for at in torch.arange(queries, device=q.device).split(_QUERIES_AT_ONCE):
            rows = cu_seqlens_q[batch].long()[:, None] + at  # [B, n]
            position = (length - queries + at)[:, :, None]  # [B, n, 1]
            visible = (key <= position) & seen[:, None]  # [B, n, L]
            if window:
                visible &= position - key < window
            out[rows] = _attend(q[rows], k, v, visible, softmax_scale, softcap, sinks)
    return out


def _gather(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, length: Tensor, queries: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy what B sequences can see, [B, Hk, L, D] in float32, out of their pages, and where that is, [B, L]."""
    page_size = k_cache.shape[2]
    pages = page_table[:, : -(-int(length.max()) // page_size)]
    key = torch.arange(pages.shape[1] * page_size, device=pages.device)
    first = length - queries - window + 1 if window else torch.zeros_like(length)
    seen = (key >= first) & (key < length)  # elsewhere the table and the pages may hold anything
    pages = torch.where(seen.unflatten(1, (-1, page_size)).any(-1), pages, 0).long()

    def dense(cache: Tensor) -> Tensor:
        tokens = cache[pages].transpose(1, 2).flatten(2, 3).float()
        return tokens.masked_fill_(~seen[:, None, :, None], 0.0)

    return dense(k_cache), dense(v_cache), seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """softmax(q·kᵀ)·v of q [B, n, H, D], a row without a visible key being 0; returns [B, n, H, Dv]."""
    group = q.shape[2] // k.shape[1]
    heads = q.float().unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = heads @ k.transpose(2, 3) * scale  # [B, Hk, group·n, L]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (group, -1)).masked_fill(~visible[:, None, None], -torch.inf)
    sink = torch.full_like(scores[..., :1], -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, group, 1, 1).expand_as(sink)
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink - top)
    out = (p.flatten(2, 3) @ v).unflatten(2, (group, -1)) / total.masked_fill(total == 0, 1.0)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])


@op(paged_attention_reference, fake=_fake)
def _paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return paged_attention_reference(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, max_q, softmax_scale, window,
        softcap, sinks,
    )  # fmt: skip


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, *, softmax_scale: float | None = None, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the last tokens of S sequences to all their tokens in a paged cache; causal.

    Sequence s has `seq_lens[s]` tokens in the cache (int32, [S]), in pages
    `page_table[s]` (int32, [S, max_pages]) of `k_cache` [P, Hk, page, D] and `v_cache`
    [P, Hk, page, Dv]; a page of one head is contiguous. Rows `cu_seqlens_q[s]` to
    `cu_seqlens_q[s + 1]` (int32, [S + 1]) of `q` [T, H, D] are the queries of its last tokens,
    `max_q` is at least the longest of these ranges. Table entries of pages that no query of a
    sequence sees, beyond its end or left of its window, are not read.

    `softmax_scale` is D^-0.5 unless given, `window` > 0 shows each query only the last `window`
    tokens up to itself, `softcap` > 0 bounds the scaled scores by softcap·tanh(s / softcap), and
    `sinks` [H] are logits that add to the denominator of the softmax alone.

    Returns [T, H, Dv] in the dtype of `q`: float32, float16 or bfloat16, also that of the caches.
    Rows that see nothing, and rows beyond `cu_seqlens_q[S]`, are 0. Raises ValueError or TypeError
    on shapes, dtypes, devices or layouts other than these.
    """
    _check(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, sinks)
    if max_q < 0:
        raise ValueError(f"max_q must be at least 0, got {max_q}")
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if scale <= 0:
        raise ValueError(f"softmax_scale must be above 0, got {softmax_scale}")
    return _paged_attention(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, max_q, scale, window, softcap,
        sinks,
    )  # fmt: skip


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, sinks: Tensor | None,
) -> None:  # fmt: skip
    check_shape("q", q, None, None, None)
    check_shape("k_cache", k_cache, None, None, None, q.shape[2])
    check_shape("v_cache", v_cache, *k_cache.shape[:3], None)
    check_shape("page_table", page_table, None, None)
    check_shape("seq_lens", seq_lens, page_table.shape[0])
    check_shape("cu_seqlens_q", cu_seqlens_q, page_table.shape[0] + 1)
    check_dtype("q", q, *FLOATS)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, cache, q.dtype)
        check_device(name, cache, q.device)
        check_last_dim_contiguous(name, cache)
        if cache.stride(2) != cache.shape[3] and cache.shape[2] > 1:
            raise ValueError(f"{name} must have contiguous pages, got strides {cache.stride()}")
    indices = {"page_table": page_table, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
    for name, index in indices.items():
        check_dtype(name, index, torch.int32)
        check_device(name, index, q.device)
        check_last_dim_contiguous(name, index)
    check_last_dim_contiguous("q", q)
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"q must have a multiple of k_cache's {k_cache.shape[1]} heads, got {q.shape[1]}"
        )
    if sinks is not None:
        check_shape("sinks", sinks, q.shape[1])
        check_dtype("sinks", sinks, *FLOATS)
        check_device("sinks", sinks, q.device)
        check_last_dim_contiguous("sinks", sinks)
