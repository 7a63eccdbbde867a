"""The kernel of `paged_prefill` for sm_90, in Gluon: a warp that copies, two groups of warps that compute.

Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608

A producer copies keys and values by TMA into a ring of tiles. Two consumers own 64 rows each and
compute the scores of the next tile on the tensor cores during the softmax of this one. A tile is put
together from the boxes of several pages, so pages may be as small as 16 tokens. Gluon is experimental
and changes between versions of Triton: `missing` says why this one cannot run the kernel.
"""

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tlk.kernels._ints import next_power_of_2
from tlk.kernels.gluon import untested

TRITON: tuple[str, ...] = ("3.6.",)  # versions with which it was right on a GPU
LOG2_E = 1.4426950408889634
LOWEST = gl.constexpr(-3.4028234663852886e38)  # finite, so that exp2(-inf - LOWEST) is 0, not NaN
COLUMNS = gl.constexpr(64)  # of a box: 128 bytes, the widest that shared memory swizzles
HALF = gl.constexpr(64)  # rows of a consumer
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _copy_tile(
    boxes, ring, ready, stage, pages, slot, page_rows, first_row,
    D: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Let the boxes of a tile, at row `slot` of each of its `pages`, arrive at `ready`."""
    mbarrier.expect(ready, BLOCK_N * D * 2)
    parts: gl.constexpr = BLOCK_N // BOX
    halves: gl.constexpr = D // COLUMNS
    for part in gl.static_range(parts):
        row = pages[part] * page_rows + first_row + slot
        for half in gl.static_range(halves):
            box = ring.index((stage * halves + half) * parts + part)
            tma.async_copy_global_to_shared(boxes, [row, half * COLUMNS], ready, box)


@gluon.jit
def _produce(
    k_boxes, v_boxes, k_ring, v_ring, k_ready, k_free, v_ready, v_free, tiles, table_ptr,
    last_entry, k_page, v_page, k_row, v_row,
    PAGE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr,
    BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings as their tiles become free; pages behind a sequence's last one repeat it."""
    for tile in range(tiles):
        stage = tile % STAGES
        turn = ((tile // STAGES) & 1) ^ 1
        pages = ()
        for part in gl.static_range(BLOCK_N // BOX):
            entry = (tile * BLOCK_N + part * BOX) // PAGE
            pages += (gl.load(table_ptr + gl.minimum(entry, last_entry)),)  # type: ignore[assignment]
        slot = tile * BLOCK_N % PAGE if PAGE > BLOCK_N else 0
        mbarrier.wait(k_free.index(stage), turn)
        _copy_tile(
            k_boxes, k_ring, k_ready.index(stage), stage, pages, slot, k_page, k_row, D, BLOCK_N,
            BOX,
        )  # fmt: skip
        mbarrier.wait(v_free.index(stage), turn)
        _copy_tile(
            v_boxes, v_ring, v_ready.index(stage), stage, pages, slot, v_page, v_row, DV, BLOCK_N,
            BOX,
        )  # fmt: skip


@gluon.jit
def _softmax(
    s, total, top, tile, position, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """The weights of a tile, and what the sums so far must be multiplied by."""
    if MASKED:
        key = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return p, decay, total * decay + gl.sum(p, 1), new_top


@gluon.jit
def _attend_tiles(
    acc, total, top, s, begin, end, q, k, v, k_ready, k_free, v_ready, v_free, position, scale,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Tiles [begin, end), of which there is one more: its scores are computed here, too."""
    for tile in range(begin, end):
        stage = tile % STAGES
        after = (tile + 1) % STAGES
        mbarrier.wait(k_ready.index(after), ((tile + 1) // STAGES) & 1)
        zero = gl.zeros((HALF, BLOCK_N), gl.float32, SCORES)
        next_s = warpgroup_mma(
            q, k.index(after).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        p, decay, total, top = _softmax(
            s, total, top, tile, position, scale, MASKED, BLOCK_N, SCORES
        )
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
        weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, ACC, 2))
        mbarrier.wait(v_ready.index(stage), (tile // STAGES) & 1)
        next_acc = warpgroup_mma(weights, v.index(stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(next_s,))
        mbarrier.arrive(k_free.index(after), count=1)
        acc = warpgroup_mma_wait(0, deps=(next_acc,))
        mbarrier.arrive(v_free.index(stage), count=1)
    return acc, total, top, s


@gluon.jit
def _consume(
    q_ptr, out_ptr, q_rows, k, v, k_ready, k_free, v_ready, v_free, tiles, start, queries, length,
    row, kv_head, q_row, q_head, scale,
    HALF_INDEX: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    first = row + HALF_INDEX * HALF
    r = first + gl.arange(0, HALF, gl.SliceLayout(1, Q))
    token = (start + r // GROUP).to(gl.int64)
    at = token * q_row + (kv_head * GROUP + r % GROUP) * q_head
    d = gl.arange(0, D, gl.SliceLayout(0, Q))
    rows = gl.load(q_ptr + at[:, None] + d[None, :], mask=(r < queries * GROUP)[:, None], other=0.0)
    q = q_rows.index(HALF_INDEX)
    q.store(rows)
    fence_async_shared()

    top = gl.full((HALF,), LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros((HALF, DV), gl.float32, ACC)
    if tiles > 0:
        last = tiles - 1
        full = gl.minimum(gl.maximum(length - queries + first // GROUP + 1, 0) // BLOCK_N, last)
        mbarrier.wait(k_ready.index(0), 0)
        zero = gl.zeros((HALF, BLOCK_N), gl.float32, SCORES)
        s = warpgroup_mma(q, k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(0), count=1)
        acc, total, top, s = _attend_tiles(
            acc, total, top, s, 0, full, q, k, v, k_ready, k_free, v_ready, v_free, top,
            scale, False, BLOCK_N, STAGES, SCORES, ACC,
        )  # fmt: skip
        position = (
            length - queries + (first + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))) // GROUP
        )
        acc, total, top, s = _attend_tiles(
            acc, total, top, s, full, last, q, k, v, k_ready, k_free, v_ready, v_free, position,
            scale, True, BLOCK_N, STAGES, SCORES, ACC,
        )  # fmt: skip
        p, decay, total, top = _softmax(s, total, top, last, position, scale, True, BLOCK_N, SCORES)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
        weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, ACC, 2))
        values = v.index(last % STAGES)
        mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
        if tiles * BLOCK_N > length:  # a weight of 0 does not make 0 of a NaN
            # Both consumers clean the tile: they write the same.
            V: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
            key = last * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, V))
            values.store(gl.where((key < length)[:, None], values.load(V), 0.0))
            fence_async_shared()
        acc = warpgroup_mma(weights, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    total = gl.where(total > 0.0, total, 1.0)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, ACC))[:, None]
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), W)
    r = first + gl.arange(0, HALF, gl.SliceLayout(1, W))
    token = (start + r // GROUP).to(gl.int64)
    at = (token * (KV_HEADS * GROUP) + kv_head * GROUP + r % GROUP) * DV
    dv = gl.arange(0, DV, gl.SliceLayout(0, W))
    gl.store(out_ptr + at[:, None] + dv[None, :], out, mask=(r < queries * GROUP)[:, None])


@gluon.jit
def _zero_padding(
    out_ptr, start, n_rows, row, kv_head, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    DV: gl.constexpr,
):  # fmt: skip
    """Write rows of no sequence."""
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    r = row + gl.arange(0, 2 * HALF, gl.SliceLayout(1, W))
    token = (start + r // GROUP).to(gl.int64)
    at = (token * (KV_HEADS * GROUP) + kv_head * GROUP + r % GROUP) * DV
    dv = gl.arange(0, DV, gl.SliceLayout(0, W))
    zero = gl.zeros((2 * HALF, DV), out_ptr.dtype.element_ty, W)
    gl.store(out_ptr + at[:, None] + dv[None, :], zero, mask=(token < n_rows)[:, None])


@gluon.jit(do_not_specialize=["table_row", "n_rows", "n_seqs"])
def _paged_prefill_sm90_kernel(
    q_ptr, k_boxes, v_boxes, table_ptr, lens_ptr, cu_ptr, out_ptr, q_row, q_head, k_page, k_head,
    v_page, v_head, table_row, n_rows, n_seqs, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_S: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 (query, head of the group) rows of one sequence × kv head, those with most keys first."""
    block_m: gl.constexpr = 2 * HALF
    n_tiles = gl.num_programs(0) // KV_HEADS
    tile = n_tiles - 1 - gl.program_id(0) // KV_HEADS
    kv_head = gl.program_id(0) % KV_HEADS
    # As `_paged_tiles.locate` does it.
    i = gl.arange(0, BLOCK_S, gl.BlockedLayout([1], [32], [4], [0]))
    owned = gl.load(cu_ptr + i, mask=i <= n_seqs, other=0) * GROUP // block_m + i
    begun = (i <= n_seqs) & (owned <= tile)
    seq = gl.sum(begun.to(gl.int32), 0) - 1
    row = (tile - gl.max(gl.where(begun, owned, 0), 0)) * block_m
    start = gl.load(cu_ptr + seq)
    real = gl.minimum(seq, n_seqs - 1)
    queries = gl.load(cu_ptr + real + 1) - gl.load(cu_ptr + real)
    length = gl.load(lens_ptr + real)
    if seq == n_seqs:
        _zero_padding(out_ptr, start, n_rows, row, kv_head, KV_HEADS, GROUP, DV)
        queries = 0
    highest = length - queries + gl.minimum((row + block_m - 1) // GROUP, queries - 1)
    tiles = gl.cdiv(gl.maximum(highest + 1, 0), BLOCK_N)
    tiles = gl.where(row < queries * GROUP, tiles, 0)

    dtype: gl.constexpr = k_boxes.dtype
    L: gl.constexpr = SWIZZLED
    q_rows = gl.allocate_shared_memory(dtype, [2, HALF, D], L)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], L)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DV], L)
    parts: gl.constexpr = STAGES * (BLOCK_N // BOX)
    k_ring = k._reinterpret(dtype, [parts * (D // COLUMNS), BOX, COLUMNS], L)
    v_ring = v._reinterpret(dtype, [parts * (DV // COLUMNS), BOX, COLUMNS], L)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    table_ptr += real.to(gl.int64) * table_row
    last_entry = (length - 1) // PAGE
    gl.warp_specialize(
        [
            (_consume, (
                q_ptr, out_ptr, q_rows, k, v, k_ready, k_free, v_ready, v_free, tiles, start,
                queries, length, row, kv_head, q_row, q_head, scale, 0, KV_HEADS, GROUP, D, DV,
                BLOCK_N, STAGES,
            )),
            (_consume, (
                q_ptr, out_ptr, q_rows, k, v, k_ready, k_free, v_ready, v_free, tiles, start,
                queries, length, row, kv_head, q_row, q_head, scale, 1, KV_HEADS, GROUP, D, DV,
                BLOCK_N, STAGES,
            )),
            (_produce, (
                k_boxes, v_boxes, k_ring, v_ring, k_ready, k_free, v_ready, v_free, tiles,
                table_ptr, last_entry, k_page, v_page, kv_head * k_head, kv_head * v_head,
                PAGE, D, DV, BLOCK_N, BOX, STAGES,
            )),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """Keys of a tile and tiles of a ring; registers of a consumer's and a producer's thread."""

    block_n: int = 128
    stages: int = 2
    registers: int = 232
    producer_registers: int = 40


def missing() -> str | None:
    """Why this kernel cannot run here, or None."""
    return untested(TRITON)


def takes(page_size: int) -> bool:
    """Whether tiles are made of whole pages, or pages of whole tiles."""
    n = Config().block_n
    return page_size >= 8 and (n % page_size == 0 or page_size % n == 0)


def launch(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor,
    seq_lens: Tensor, cu_seqlens_q: Tensor, softmax_scale: float, config: Config | None = None,
) -> None:  # fmt: skip
    """`paged_prefill.launch` with this kernel."""
    config = config or Config()
    (tokens, heads, d), dv = q.shape, v_cache.shape[3]
    seqs, (_, kv_heads, page_size, _) = page_table.shape[0], k_cache.shape
    if not seqs:
        out.zero_()
        return
    group, box = heads // kv_heads, min(page_size, config.block_n)
    tiles = tokens * group // (2 * HALF.value) + seqs + 1
    _paged_prefill_sm90_kernel[(tiles * kv_heads,)](
        q, _boxes(k_cache, box), _boxes(v_cache, box), page_table, seq_lens, cu_seqlens_q, out,
        q.stride(0), q.stride(1), k_cache.stride(0) // d, k_cache.stride(1) // d,
        v_cache.stride(0) // dv, v_cache.stride(1) // dv, page_table.stride(0), tokens, seqs,
        softmax_scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, PAGE=page_size, D=d, DV=dv, BLOCK_N=config.block_n,
        BOX=box, STAGES=config.stages, BLOCK_S=max(128, next_power_of_2(seqs + 1)),
        REGISTERS=config.registers, PRODUCER_REGISTERS=config.producer_registers, num_warps=4,
        maxnreg=168,
    )  # fmt: skip


def _boxes(cache: Tensor, rows: int) -> TensorDescriptor:
    pages, heads, page_size, d = cache.shape
    last = (pages - 1) * cache.stride(0) + (heads - 1) * cache.stride(1)
    return TensorDescriptor(
        cache, [last // d + page_size, d], [d, 1], [rows, COLUMNS.value], SWIZZLED.value
    )
