"""Causal attention of long chunks over a paged cache, its keys and values copied by the TMA unit.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / Σ_j exp(s_ij),   s_ij = scale · q_i · k_j

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691

The half-precision prefill of `paged_attention` on sm_90 and sm_100. Where a page holds whole tiles of
keys, a tile of one head is one contiguous box, which a single instruction brings to shared memory in
the layout that the tensor cores read: no addresses, masks or registers for it. Only tiles that the
diagonal cuts pay for a mask, and only the tile that a sequence ends in has its values cleaned, since
a page may hold anything behind the end. 2·(D + Dv) flops per visible pair of query and key and head.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._paged_tiles import locate

try:
    from tlk.kernels import paged_prefill_sm90 as hopper
except ImportError as error:  # Gluon moves between versions of Triton
    hopper, _import_error = None, str(error)  # type: ignore[assignment]

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that exp2(-inf - LOWEST) is 0, not NaN
HEAD_DIMS = {64, 128}
BLOCK_M = 128


@triton.jit
def _attend_boxes(
    acc, total, top, q, position, begin, end, length, table_ptr, k_boxes, v_boxes, k_page, v_page,
    k_row, v_row, scale, DIAGONAL: tl.constexpr, END: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [begin, end); `top` is the row maximum in base 2.

    DIAGONAL hides keys behind a query's `position`, END values behind the sequence's `length`.
    """
    n = tl.arange(0, BLOCK_N)
    for tile in range(begin, end):
        page = tl.load(table_ptr + tile * BLOCK_N // PAGE)
        row = tile * BLOCK_N % PAGE
        k = k_boxes.load([page * k_page + k_row + row, 0])  # [BLOCK_N, D]
        s = tl.dot(q, k.T)
        if DIAGONAL:
            s = tl.where((tile * BLOCK_N + n)[None, :] <= position[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v = v_boxes.load([page * v_page + v_row + row, 0])
        if END:  # a weight of 0 does not make 0 of a NaN
            v = tl.where((tile * BLOCK_N + n < length)[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["table_row", "n_rows", "n_seqs"])
def _paged_prefill_kernel(
    q_ptr, k_boxes, v_boxes, table_ptr, lens_ptr, cu_ptr, out_ptr, q_row, q_head, k_page, k_head,
    v_page, v_head, table_row, n_rows, n_seqs, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tile of (query, head of the group) rows of one sequence × kv head, those with most keys first.

    `k_page`, `k_head`, `v_page` and `v_head` count rows of the boxes' tensors.
    """
    tiles = tl.num_programs(0) // KV_HEADS
    tile = tiles - 1 - tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    seq, row = locate(tile, cu_ptr, n_seqs, GROUP, BLOCK_M, BLOCK_S)
    rows = row + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + rows % GROUP
    start = tl.load(cu_ptr + seq)
    out_row = (start + rows // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head
    out_tile = (out_row * DV)[:, None] + tl.arange(0, DV)[None, :]
    if seq == n_seqs:  # rows of no sequence
        empty = (start + rows // GROUP < n_rows)[:, None]
        tl.store(out_ptr + out_tile, tl.zeros((BLOCK_M, DV), out_ptr.dtype.element_ty), mask=empty)
        return
    queries = tl.load(cu_ptr + seq + 1) - start
    if row >= queries * GROUP:
        return
    live = (rows < queries * GROUP)[:, None]
    q_tile = ((start + rows // GROUP).to(tl.int64) * q_row + head * q_head)[:, None]
    q = tl.load(q_ptr + q_tile + tl.arange(0, D)[None, :], mask=live, other=0.0)

    length = tl.load(lens_ptr + seq)
    position = length - queries + rows // GROUP
    lowest = length - queries + row // GROUP
    highest = length - queries + tl.minimum((row + BLOCK_M - 1) // GROUP, queries - 1)
    end = tl.cdiv(tl.maximum(highest + 1, 0), BLOCK_N)
    whole = tl.minimum(end, length // BLOCK_N)  # the tiles before hold no slot behind the end
    full = tl.minimum(whole, tl.maximum(lowest + 1, 0) // BLOCK_N)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    table_ptr += seq.to(tl.int64) * table_row
    acc, total, top = _attend_boxes(
        acc, total, top, q, position, 0, full, length, table_ptr, k_boxes, v_boxes, k_page, v_page,
        kv_head * k_head, kv_head * v_head, scale, False, False, PAGE, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _attend_boxes(
        acc, total, top, q, position, full, whole, length, table_ptr, k_boxes, v_boxes, k_page,
        v_page, kv_head * k_head, kv_head * v_head, scale, True, False, PAGE, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _attend_boxes(
        acc, total, top, q, position, whole, end, length, table_ptr, k_boxes, v_boxes, k_page,
        v_page, kv_head * k_head, kv_head * v_head, scale, True, True, PAGE, BLOCK_N,
    )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + out_tile, acc.to(out_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True, slots=True)
class Config:
    """Rows of queries × keys of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def default_config(sm: int, page_size: int) -> Config:
    """The largest tiles that a page holds whole and `sm` without spills."""
    return Config(128, 128 if sm == 90 and page_size % 128 == 0 else 64, 8, 2)


def backend(q: Tensor, k_cache: Tensor, v_cache: Tensor, max_q: int) -> str | None:
    """The kernel that takes such a batch, "gluon" or "triton_tma"; None where another is better.

    Depends on shapes, layouts and the device: decode and short chunks are left to kernels with
    smaller tiles, which split the keys.
    """
    heads, (kv_heads, page_size) = q.shape[1], k_cache.shape[1:3]
    if max_q * heads < BLOCK_M * kv_heads:  # first, as decode steps come most often
        return None
    group, arch = heads // kv_heads, sm(q.device)
    if (
        arch not in (90, 100)  # on sm_120 tiles of 64 × 128 spill
        or q.element_size() != 2
        or k_cache.dtype != q.dtype
        or not {q.shape[2], v_cache.shape[3]} <= HEAD_DIMS
        or 2 * cdiv(q.shape[0] * group, BLOCK_M) * kv_heads <= sm_count(q.device)
        or not (_in_boxes(k_cache) and _in_boxes(v_cache))
    ):
        return None
    if arch == 90 and gluon_missing() is None and hopper.takes(page_size):
        return "gluon"
    return "triton_tma" if page_size % 64 == 0 else None


def gluon_missing() -> str | None:
    """Why the kernel for sm_90 cannot run with this Triton, or None; then the portable one runs."""
    if hopper is None:
        return f"triton {triton.__version__} has another Gluon: {_import_error}"
    return hopper.missing()


def _in_boxes(cache: Tensor) -> bool:
    """Whether `cache` is a matrix of rows of D in memory, aligned as the TMA unit wants it."""
    page, head, _, _ = cache.stride()
    d = cache.shape[3]
    return cache.numel() > 0 and page % d == head % d == 0 and cache.data_ptr() % 16 == 0


def launch(
    backend: str, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor,
    seq_lens: Tensor, cu_seqlens_q: Tensor, softmax_scale: float,
) -> None:  # fmt: skip
    """Attend into `out` [T, H, Dv] what `paged_attention` says of its arguments, with `backend`."""
    run = hopper.launch if backend == "gluon" else launch_tma
    run(out, q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, softmax_scale)


def launch_tma(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor,
    seq_lens: Tensor, cu_seqlens_q: Tensor, softmax_scale: float, config: Config | None = None,
) -> None:  # fmt: skip
    """`launch` with the portable kernel."""
    (tokens, heads, d), dv = q.shape, v_cache.shape[3]
    seqs, (_, kv_heads, page_size, _) = page_table.shape[0], k_cache.shape
    group = heads // kv_heads
    config = config or default_config(sm(q.device), page_size)
    tiles = tokens * group // config.block_m + seqs + 1
    k_boxes, v_boxes = (_boxes(cache, config.block_n) for cache in (k_cache, v_cache))
    _paged_prefill_kernel[(tiles * kv_heads,)](
        q, k_boxes, v_boxes, page_table, seq_lens, cu_seqlens_q, out,
        q.stride(0), q.stride(1), k_cache.stride(0) // d, k_cache.stride(1) // d,
        v_cache.stride(0) // dv, v_cache.stride(1) // dv, page_table.stride(0), tokens, seqs,
        softmax_scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, PAGE=page_size, D=d, DV=dv, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_S=max(128, next_power_of_2(seqs + 1)), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _boxes(cache: Tensor, rows: int) -> TensorDescriptor:
    pages, heads, page_size, d = cache.shape
    last = (pages - 1) * cache.stride(0) + (heads - 1) * cache.stride(1)
    return TensorDescriptor(cache, [last // d + page_size, d], [d, 1], [rows, d])
