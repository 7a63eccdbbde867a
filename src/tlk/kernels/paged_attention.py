"""Causal attention over a paged KV cache: decode, chunked prefill and mixed batches in one op.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)),   s_ij = scale · q_i · k_j

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180; Dao et al., "Flash-Decoding for long-context inference",
https://pytorch.org/blog/flash-decoding/

The query heads that share a kv head are rows of one tile, so a program reads its keys and values
once for all of them: decode moves Hk·(D + Dv)·itemsize bytes for each token in the cache, and a
prefill takes 2·(D + Dv) flops for each visible pair of query and key and head. Where that leaves
SMs without work, the keys of a sequence are split over programs, whose float32 results a second
kernel combines. The grid follows from shapes alone and every program finds its sequence and its
keys from tensors on the device, so a CUDA graph stays valid while sequences come, grow and go.

`deterministic` fixes the order of every sum over keys: one tile shape for all batches, no splits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels import _paged_torch, paged_prefill
from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._kv_codes import CODES, as_pairs, check_scales, code_kind, readable
from tlk.kernels._op import op
from tlk.kernels._paged_keys import LOG2_E, attend_tiles, rows_for_codes
from tlk.kernels._paged_split import LEAST_KEYS, LOWEST, Partials, share_tiles, split_count
from tlk.kernels._paged_tiles import locate
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous

MAX_HEAD_DIM = 256
ROWS_OF_ANY = 64  # the rows that the one tile shape of `deterministic` is made for
MANY_KEYS = 4096  # that a sequence may have, for which tiles of keys are larger


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, deterministic: bool = False,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    # in float64 the order of a sum, which follows the batch, does not reach the rounded result
    dtype = torch.float64 if deterministic else torch.float32
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[-1])
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    alike: dict[tuple[int, int], list[int]] = {}  # sequences that one padded batch can hold
    for s, length in enumerate(lengths):
        queries = starts[s + 1] - starts[s]
        if queries and length:
            alike.setdefault((queries, length.bit_length()), []).append(s)
    for (queries, _), batch in alike.items():
        longest = max(lengths[s] for s in batch)
        table = page_table[batch, : -(-longest // k_cache.shape[2])]
        length = seq_lens[batch].long()[:, None]  # [B, 1]
        k, v, seen = _paged_torch.gather(
            k_cache, v_cache, table, length, queries, window, k_scale, v_scale
        )
        for at in torch.arange(queries, device=q.device).split(_paged_torch.QUERIES_AT_ONCE):
            rows = cu_seqlens_q[batch].long()[:, None] + at  # [B, n]
            shown = _paged_torch.visible(length - queries + at, seen, window)
            out[rows] = _paged_torch.attend(
                q[rows], k, v, shown, softmax_scale, softcap, sinks, dtype
            )
    return out


@triton.jit
def _key_range(
    lowest, highest, splits, SPLIT: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys that rows at positions `lowest` to `highest` see, and this program's tiles of them.

    Returns first, last: some row sees key first ≤ j < last; begin, full_begin, full_end, end: every
    row sees all keys of the tiles between the inner two; and the number of splits that have tiles.
    """
    first = 0
    full_begin = 0
    if WINDOW:
        first = tl.maximum(lowest - WINDOW + 1, 0)
        full_begin = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N)
    last = tl.maximum(highest + 1, first)
    begin = first // BLOCK_N
    end = tl.cdiv(last, BLOCK_N)
    used = 1
    if SPLIT:
        begin, end, used = share_tiles(begin, end, splits, LEAST)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum((lowest + 1) // BLOCK_N, full_begin), end)
    return first, last, begin, full_begin, full_end, end, used


@triton.jit
def _attend_rows(
    q_ptr, k_ptr, v_ptr, table_ptr, sinks_ptr, out_ptr, partial_ptr, lse_ptr, used_ptr, k_scale_ptr,
    v_scale_ptr, q_row, q_head, k_page, v_page, start, queries, before, row, first, last, begin,
    full_begin, full_end, end, used, splits, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, DOT: tl.constexpr, BRANCH: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TWINS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a sequence's `queries`, from `row`: the result, or this split's part of it."""
    rows = row + tl.arange(0, BLOCK_M)
    # Of codes, tensor cores take halves of the columns, at least 16. Halves of 16 columns of values made
    # Triton 3.6 read behind its shared memory where tiles of keys follow one another (H100): so 32.
    d = tl.arange(0, triton.next_power_of_2(D) if D > 32 or PAIRS is None else 64)
    dv = tl.arange(0, triton.next_power_of_2(DV) if DV > 32 or PAIRS is None else 64)
    kv_head = (tl.program_id(0) % HEADS).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    live = rows < queries * GROUP
    token = (start + rows // GROUP).to(tl.int64)
    q_tile = (token * q_row + head * q_head)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_tile, mask=live[:, None] & (d < D)[None, :], other=0.0)
    unit: tl.constexpr = 256.0 if PAIRS == "e4m3_bits" else 1.0
    scale = tl.full((BLOCK_M,), scale * unit, tl.float32)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head)
    if not DOT:
        q = q.to(tl.float32)
    q, odd_q, scale = rows_for_codes(q, scale, PAIRS)

    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pair: tl.constexpr = 1 if PAIRS is None else 2
    acc = tl.zeros((BLOCK_M, dv.shape[0] // pair), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        if SPLIT:  # counted once
            sink = tl.where(tl.program_id(2) == 0, sink, float("-inf"))
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    position = before + rows // GROUP
    acc, odd_acc, total, top = attend_tiles(
        acc, acc, total, top, q, odd_q, position, first, last, begin, full_begin, full_end, end,
        table_ptr, k_ptr, v_ptr, k_page, v_page, scale, cap,
        WINDOW, SOFTCAP, DOT, BRANCH, PAGE, D // pair, DV // pair, BLOCK_N, TWINS, PAIRS,
    )  # fmt: skip
    if PAIRS is not None:
        acc = tl.reshape(tl.join(acc, odd_acc), (BLOCK_M, dv.shape[0])) * unit
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + kv_head)
    at = token * (HEADS * GROUP) + head
    mask = live[:, None] & (dv < DV)[None, :]
    to = at[:, None] * DV + dv[None, :]
    if SPLIT:
        tl.store(used_ptr + at, used, mask=live & (tl.program_id(2) == 0))
        if used > 1:
            at = at * splits + tl.program_id(2)
            lse = tl.where(some, top + tl.log2(total), float("-inf"))
            tl.store(lse_ptr + at, lse, mask=live)
            tl.store(partial_ptr + at[:, None] * DV + dv[None, :], acc, mask)
        else:
            tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask)
    else:
        tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n_rows", "n_seqs", "splits"])
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, cu_ptr, sinks_ptr, out_ptr, partial_ptr, lse_ptr,
    used_ptr, k_scale_ptr, v_scale_ptr, q_row, q_head, k_page, k_head, v_page, v_head, table_row,
    n_rows, n_seqs, splits, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DOT: tl.constexpr, BRANCH: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, TWINS: tl.constexpr, PAIRS: tl.constexpr,
    LEAST: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tile of (query, head of the group) rows of one sequence × kv head × split of its keys.

    FEW > 0: a sequence of no more rows, as decode rows of a mixed batch are, gets a tile of that size.
    """
    allow_next(PDL)
    wait_for_previous(PDL)
    # kv heads of a tile run at the same time: their keys lie side by side in the pages
    tile = tl.program_id(0) // HEADS
    kv_head = (tl.program_id(0) % HEADS).to(tl.int64)
    if DECODE:
        tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
        seq = tile // tiles
        row = tile % tiles * BLOCK_M
    else:  # the last tiles of a prompt, which see the most keys, start first
        seq, row = locate(
            tl.num_programs(0) // HEADS - 1 - tile, cu_ptr, n_seqs, GROUP, BLOCK_M, BLOCK_S
        )
    if not SPLIT:  # rows of no sequence; with splits, the kernel that combines them writes these
        rows = row + tl.arange(0, BLOCK_M)
        dv = tl.arange(0, triton.next_power_of_2(DV))
        padding = tl.load(cu_ptr + n_seqs)
        empty = padding + rows // GROUP
        mine = (seq == n_seqs) & (empty < n_rows)
        if DECODE:  # program i stands for row i, too
            empty = seq + rows // GROUP
            mine = (rows < GROUP) & (empty >= padding) & (empty < n_rows)
        head = kv_head * GROUP + rows % GROUP
        at = (empty * (HEADS * GROUP) + head)[:, None] * DV + dv[None, :]
        zero = tl.zeros((BLOCK_M, dv.shape[0]), out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, zero, mask=mine[:, None] & (dv < DV)[None, :])
    if seq >= n_seqs:
        return
    start = tl.load(cu_ptr + seq)
    queries = tl.load(cu_ptr + seq + 1) - start
    if row >= queries * GROUP:
        return
    before = tl.load(lens_ptr + seq) - queries  # the position of the first query
    lowest = before + row // GROUP
    highest = before + tl.minimum((row + BLOCK_M - 1) // GROUP, queries - 1)
    first, last, begin, full_begin, full_end, end, used = _key_range(
        lowest, highest, splits, SPLIT, LEAST, WINDOW, BLOCK_N
    )
    if SPLIT:  # noqa: SIM102
        if tl.program_id(2) >= used:
            return
    table_ptr += seq.to(tl.int64) * table_row
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    if FEW:  # noqa: SIM102
        if queries * GROUP <= FEW:
            _attend_rows(
                q_ptr, k_ptr, v_ptr, table_ptr, sinks_ptr, out_ptr, partial_ptr, lse_ptr, used_ptr,
                k_scale_ptr, v_scale_ptr, q_row, q_head, k_page, v_page, start, queries, before,
                row, first, last, begin, full_begin, full_end, end, used, splits, scale, cap,
                HEADS, GROUP, SPLIT, WINDOW, SOFTCAP, SINKS, DOT, False, PAGE, D, DV, FEW, BLOCK_N,
                TWINS, PAIRS,
            )  # fmt: skip
            return
    _attend_rows(
        q_ptr, k_ptr, v_ptr, table_ptr, sinks_ptr, out_ptr, partial_ptr, lse_ptr, used_ptr,
        k_scale_ptr, v_scale_ptr, q_row, q_head, k_page, v_page, start, queries, before, row,
        first, last, begin, full_begin, full_end, end, used, splits, scale, cap,
        HEADS, GROUP, SPLIT, WINDOW, SOFTCAP, SINKS, DOT, BRANCH, PAGE, D, DV, BLOCK_M, BLOCK_N,
        TWINS, PAIRS,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes; `dot` or else multiply and sum; `branch` around the mask of tiles that need none.

    The branch costs mma.sync, but not wgmma and tcgen05, a layout that keeps scores in registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    dot: bool = True
    branch: bool = False


def default_config(
    sm: int, dtype: torch.dtype, head_dim: int, rows: int, codes: bool = False, capacity: int = 0
) -> Config:
    """Tiles that fit `sm` for the larger head dim, `rows` = longest chunk × heads of a group.

    `capacity`: keys that a sequence may have; many are read in larger tiles on sm_90 (H100, 16 sequences
    of 4096 keys: 2.85 TB/s, and 2.62 in tiles of 64 keys; 256 of 512 keys: 2.80 and 2.84).

    Chosen from compiled code: the largest without spills, two blocks an SM for decode. A decode tile of
    `codes` has twice as many keys.
    """
    wide, narrow = head_dim > 128, head_dim <= 64
    if sm < 80 or (dtype == torch.float32 and rows <= 16):
        return Config(min(next_power_of_2(rows), 4), 16, 4, 2, dot=False)
    if dtype == torch.float32:
        return Config(16, 16, 8, 2) if wide else Config(32, 16, 4, 2)
    large_memory = sm in (80, 90, 100)
    if rows <= 16:
        if sm == 90 and capacity >= MANY_KEYS and not wide and not codes:
            return Config(16, 128, 8, 3)
        keys = (32 if wide else 64) // (1 if large_memory else 2)
        return Config(16, 2 * keys if codes else keys, 4, 3 if sm in (80, 86, 89, 120) else 4)
    if sm == 90:
        if wide:
            return Config(64, 64, 8, 2, branch=True)
        if rows <= 64:
            return Config(64, 64, 4, 3, branch=True)
        return Config(128, 128, 8, 3 if narrow else 2, branch=True)
    if wide:
        return Config(64, 32, 8, 2, branch=sm == 100)
    if rows <= 64:
        return Config(64, 64, 4, 3, branch=True) if sm == 100 else Config(64, 32, 4, 3)
    return Config(128, 64 if narrow or sm == 100 else 32, 8, 3, branch=sm == 100)


def _backend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float = 1.0, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, deterministic: bool = False,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> str:  # fmt: skip
    if deterministic:
        return "triton"
    if sm(q.device) < 80 and max_q > 8:
        return "torch"
    plain = not window and not softcap and sinks is None
    return (plain and paged_prefill.backend(q, k_cache, v_cache, max_q)) or "triton"


@op(
    paged_attention_reference,
    fake=lambda q, k_cache, v_cache, *_: q.new_empty(*q.shape[:2], v_cache.shape[-1]),
    backend=_backend,
)
def _paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, deterministic: bool = False,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tensors = (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q)
    options, scales = (max_q, softmax_scale, window, softcap, sinks), (k_scale, v_scale)
    backend = _backend(*tensors, *options, deterministic)
    if backend == "torch":
        return _paged_torch.paged_attention_torch(*tensors, *options, *scales)
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
    if backend in ("gluon", "triton_tma"):
        paged_prefill.launch(backend, out, *tensors, softmax_scale)
    elif out.numel():
        _launch(out, *tensors, *options, deterministic, *scales)
    return out


def _launch(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor,
    seq_lens: Tensor, cu_seqlens_q: Tensor, max_q: int, softmax_scale: float, window: int,
    softcap: float, sinks: Tensor | None, deterministic: bool, k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:  # fmt: skip
    (tokens, heads, d), dv = q.shape, v_cache.shape[3]
    (seqs, pages), (_, kv_heads, page_size, _) = page_table.shape, k_cache.shape
    group = heads // kv_heads
    rows = ROWS_OF_ANY if deterministic else max(max_q, 1) * group
    config = default_config(
        sm(q.device), q.dtype, max(d, dv), rows, k_cache.dtype in CODES, pages * page_size
    )
    decode, dependent = max_q == 1 and not deterministic, pdl(q.device)
    tiles = max(seqs, tokens) * cdiv(group, config.block_m)
    if not decode:
        tiles = tokens * group // config.block_m + seqs + 1
    processors, splits = sm_count(q.device), 1
    if not deterministic and (decode or tiles * kv_heads <= processors):
        splits = split_count(tiles * kv_heads, pages * page_size, processors)
    pairs = code_kind(k_cache) if config.dot else None
    k_cache, v_cache = (as_pairs(x) if pairs else readable(x) for x in (k_cache, v_cache))
    parts = Partials(out, splits) if splits > 1 else None
    into = (parts.results, parts.lse, parts.used) if parts else (None, None, None)
    _paged_attention_kernel[(tiles * kv_heads, 1, splits)](
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, sinks, out, *into,
        k_scale, v_scale, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(1), page_table.stride(0), tokens, seqs, splits,
        softmax_scale / softcap if softcap else softmax_scale * LOG2_E.value,
        softcap * LOG2_E.value,
        HEADS=kv_heads, GROUP=group, DECODE=decode, SPLIT=splits > 1, WINDOW=window, SOFTCAP=softcap > 0,
        SINKS=sinks is not None, DOT=config.dot, BRANCH=config.branch, PAGE=page_size,
        D=d, DV=dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_S=1 if decode else next_power_of_2(seqs + 1), LEAST=LEAST_KEYS // config.block_n,
        FEW=16 if pairs and config.block_m > 16 and not deterministic else 0,
        TWINS=d == dv and k_cache.stride() == v_cache.stride(),
        PAIRS=pairs, PDL=dependent,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent,
    )  # fmt: skip
    if parts:
        parts.combine(out, cu_seqlens_q)


def preferred_page_size(device: torch.device) -> int:
    """Tokens of a page: 64 where prefills copy whole pages into shared memory, else 16."""
    return 64 if device.type == "cuda" and sm(device) == 90 else 16


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, max_q: int, *, softmax_scale: float | None = None, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, deterministic: bool = False,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
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
    `sinks` [H] are logits that add to the denominator of the softmax alone. With `deterministic` a
    row's result is bitwise the same whatever other sequences, queries and padding it comes with; short
    batches over long sequences are then slow, since one program reads all keys of a head.

    Caches have the dtype of `q` or hold float8_e4m3fn or int8 codes: keys are then codes · `k_scale`,
    values codes · `v_scale` (float32 [Hk]; None: 1).

    Returns [T, H, Dv] in the dtype of `q`: float32, float16 or bfloat16. Rows
    that see nothing and rows beyond `cu_seqlens_q[S]` are 0. Head dims reach 256. Raises ValueError
    or TypeError on shapes, dtypes, devices or layouts other than these.
    """
    _check(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, sinks)
    check_scales(k_cache, k_scale, v_scale)
    for name, value in (("max_q", max_q), ("window", window), ("softcap", softcap)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if scale <= 0:
        raise ValueError(f"softmax_scale must be above 0, got {softmax_scale}")
    return _paged_attention(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, max_q, scale, window, softcap,
        sinks, deterministic, k_scale, v_scale,
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
    check_dtype("k_cache", k_cache, q.dtype, *CODES)
    check_dtype("v_cache", v_cache, k_cache.dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(name, cache, q.device)
        check_last_dim_contiguous(name, cache)
        if cache.dtype in CODES and cache.shape[3] % 2:
            raise ValueError(
                f"{name} must have an even head dim to hold codes, got {cache.shape[3]}"
            )
        if cache.stride(2) != cache.shape[3] and cache.shape[2] > 1:
            raise ValueError(f"{name} must have contiguous pages, got strides {cache.stride()}")
    indices = {"page_table": page_table, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
    for name, index in indices.items():
        check_dtype(name, index, torch.int32)
        check_device(name, index, q.device)
        check_last_dim_contiguous(name, index)
    check_last_dim_contiguous("q", q)
    for name, x in (("q", q), ("v_cache", v_cache)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
    if k_cache.shape[2] == 0:
        raise ValueError("k_cache must have pages of at least 1 token, got 0")
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"q must have a multiple of k_cache's {k_cache.shape[1]} heads, got {q.shape[1]}"
        )
    if sinks is not None:
        check_shape("sinks", sinks, q.shape[1])
        check_dtype("sinks", sinks, *FLOATS)
        check_device("sinks", sinks, q.device)
        check_last_dim_contiguous("sinks", sinks)
