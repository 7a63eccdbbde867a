"""The kernel of `flash_attention` for sm_90, in Gluon: a warp that copies, groups of warps that compute.

Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608

A producer copies queries, keys and values by TMA. Each consumer owns 64 rows and overlaps its softmax
with matmuls (`_flash_sm90_tiles`). Blocks of equal length are dealt out to programs that stay on their
multiprocessors, so that the next block's copies overlap with this one's end. Under a causal mask a
program is one block, the longest first: the GPU balances them better than equal steps do. Of sequences
one behind the other it is the other way about: blocks without rows cost a program that stays little.

8-bit matmuls want values with keys next to each other: `_turn_kernel` transposes them beforehand, in the
order of keys in which the weights lie in registers. It moves 2·Sk·Dv bytes a head.

Gluon is experimental and changes between versions of Triton: `missing` says why this one cannot run it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tlk.kernels._device import sm_count
from tlk.kernels._flash_sm90_blocks import locate
from tlk.kernels._flash_sm90_tiles import HALF, attend_block
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels.gluon import untested

TRITON: tuple[str, ...] = ("3.6.",)  # versions with which it was right on a GPU
TILES = ((64, 64), (128, 128), (128, 64), (64, 128), (256, 128), (256, 256))  # padded head dims
NARROW = TILES[:4]  # in 8 bits
LOG2_E = 1.4426950408889634
L2_BYTES = 32 << 20  # keys and values that blocks running side by side may read
SHORT = 512  # rows of a sequence on average, up to which blocks without a mask are dealt out, too


@gluon.jit
def _produce(
    memory, barriers, work,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, TURNED: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fill the rows of queries and the rings of keys and values as they become free."""
    q_boxes, k_boxes, v_boxes, q_ring, k_ring, v_ring = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, group, pairs, wave, blocks = work
    SIZE: gl.constexpr = 1 if TURNED else 2
    base = 0
    turn = 0
    index = gl.program_id(0)
    while index < blocks:
        b, h, row, tiles, q_start, k_start, n_q, _ = locate(
            index, cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, pairs, wave, CAUSAL,
            VARLEN, CONSUMERS * HALF, BLOCK_N,
        )  # fmt: skip
        live = True
        if VARLEN:
            live = row < n_q
        if live:
            kv = h // group
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_ready.index(c), HALF * D * SIZE)
                q_row = q_start + row + c * HALF
                tma.async_copy_global_to_shared(
                    q_boxes, [b, h, q_row, 0], q_ready.index(c), q_ring.index(c)
                )
            for i in range(tiles):
                n = base + i
                stage = n % STAGES
                phase = ((n // STAGES) & 1) ^ 1
                key = k_start + (tiles - 1 - i) * BLOCK_N
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(k_ready.index(stage), BLOCK_N * D * SIZE)
                tma.async_copy_global_to_shared(
                    k_boxes, [b, kv, key, 0], k_ready.index(stage), k_ring.index(stage)
                )
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_ready.index(stage), BLOCK_N * DV * SIZE)
                if TURNED:
                    tma.async_copy_global_to_shared(
                        v_boxes, [b, kv, 0, key], v_ready.index(stage), v_ring.index(stage)
                    )
                else:
                    tma.async_copy_global_to_shared(
                        v_boxes, [b, kv, key, 0], v_ready.index(stage), v_ring.index(stage)
                    )
            base += tiles
            turn += 1
        index += gl.num_programs(0)


@gluon.jit
def _skip_tiles(base, skipped, k_ready, k_free, v_ready, v_free, STAGES: gl.constexpr):
    """Give back tiles that other rows of the block need; not before they came, lest turns mix."""
    for i in range(skipped):
        stage = (base + i) % STAGES
        phase = ((base + i) // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.wait(v_ready.index(stage), phase)
        mbarrier.arrive(v_free.index(stage), count=1)


@gluon.jit
def _store_rows(
    out_ptr, rows, h, first, q_start, len_q, heads, d_v, DV: gl.constexpr
):  # fmt: skip
    """Write the `rows` of shared memory that belong to the sequence."""
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    r = first + gl.arange(0, HALF, gl.SliceLayout(1, W))
    d = gl.arange(0, DV, gl.SliceLayout(0, W))
    at = ((q_start + r).to(gl.int64) * heads + h) * d_v
    gl.store(
        out_ptr + at[:, None] + d[None, :], rows.load(W),
        mask=(r < len_q)[:, None] & (d < d_v)[None, :],
    )  # fmt: skip


@gluon.jit
def _consume(
    memory, barriers, work,
    INDEX: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr,
    SCALED: gl.constexpr, TURNED: gl.constexpr, SHARED: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Attend rows [64 · INDEX, 64 · INDEX + 64) of every block of this program."""
    out_ptr, out_boxes, q_rows, out_rows, out_ring, k, v, d_v, softmax_scale, scales = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, group, pairs, wave, blocks = work
    DEPTH: gl.constexpr = 256 // k.dtype.primitive_bitwidth
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, DEPTH])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, DEPTH])
    q = q_rows.index(INDEX)
    base = 0
    turn = 0
    index = gl.program_id(0)
    while index < blocks:
        b, h, row, tiles, q_start, _, n_q, n_k = locate(
            index, cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, pairs, wave, CAUSAL,
            VARLEN, CONSUMERS * HALF, BLOCK_N,
        )  # fmt: skip
        live = True
        if VARLEN:
            live = row < n_q
        if live:
            first = row + INDEX * HALF
            scale = softmax_scale
            unit = 1.0
            if SCALED:
                q_scale_ptr, k_scale_ptr, v_scale_ptr, q_step, k_step, v_step = scales
                scale *= gl.load(q_scale_ptr + h * q_step)
                scale *= gl.load(k_scale_ptr + h // group * k_step)
                unit = gl.load(v_scale_ptr + h // group * v_step)
            skipped = 0
            if CAUSAL:
                end = gl.minimum(gl.minimum(first + HALF, n_q) + n_k - n_q, n_k)
                skipped = gl.maximum(tiles - gl.cdiv(gl.maximum(end, 0), BLOCK_N), 0)
            mbarrier.wait(q_ready.index(INDEX), turn & 1)
            _skip_tiles(base, skipped, k_ready, k_free, v_ready, v_free, STAGES)
            total = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, SCORES))
            acc = gl.zeros((HALF, DV), gl.float32, ACC)
            if skipped < tiles:
                acc, total = attend_block(
                    acc, skipped, tiles, base, first, q, k, v, q_free.index(INDEX), k_ready, k_free,
                    v_ready, v_free, n_q, n_k, scale, CAUSAL, VARLEN, TURNED, SHARED, DV, BLOCK_N,
                    STAGES, SCORES, ACC,
                )  # fmt: skip
            elif not SHARED:
                mbarrier.arrive(q_free.index(INDEX), count=1)
            base += tiles
            total = gl.where(total > 0.0, total / unit, 1.0)
            acc = acc / gl.convert_layout(total, gl.SliceLayout(1, ACC))[:, None]
            if not VARLEN:
                tma.store_wait(0)
            out_rows.index(INDEX).store(acc.to(out_rows.dtype))
            if VARLEN:
                _store_rows(out_ptr, out_rows.index(INDEX), h, first, q_start, n_q, heads, d_v, DV)
            else:
                fence_async_shared()
                tma.async_copy_shared_to_global(out_boxes, [b, h, first, 0], out_ring.index(INDEX))
            if SHARED:
                if VARLEN:
                    fence_async_shared()
                else:
                    tma.store_wait(0)
                mbarrier.arrive(q_free.index(INDEX), count=1)
            turn += 1
        index += gl.num_programs(0)
    if not VARLEN:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "q_step", "k_step", "v_step", "len_q", "len_k", "sequences", "heads", "group", "pairs", "wave",
        "blocks",
    ]
)  # fmt: skip
def _flash_attention_sm90_kernel(
    q_boxes, k_boxes, v_boxes, out_boxes, out_ptr, cu_q_ptr, cu_k_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, q_step, k_step, v_step, len_q, len_k, sequences, heads, group, pairs, wave, blocks,
    d_v, scale,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, SCALED: gl.constexpr,
    SHARED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Blocks of 64 · CONSUMERS queries × (batch, head), as many at a time as there are programs."""
    dtype: gl.constexpr = k_boxes.dtype
    TURNED: gl.constexpr = dtype.primitive_bitwidth == 8
    D: gl.constexpr = q_boxes.block_shape[3]
    DV: gl.constexpr = out_boxes.block_shape[3]
    BITS: gl.constexpr = dtype.primitive_bitwidth
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128 if D * BITS >= 1024 else 64, BITS, 2)
    q_rows = gl.allocate_shared_memory(dtype, [CONSUMERS, HALF, D], ROWS)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], ROWS)
    q_ring = q_rows._reinterpret(dtype, [CONSUMERS, 1, 1, HALF, D], q_boxes.layout)
    k_ring = k._reinterpret(dtype, [STAGES, 1, 1, BLOCK_N, D], k_boxes.layout)
    if TURNED:
        COLUMNS: gl.constexpr = gl.NVMMASharedLayout(128 if BLOCK_N >= 128 else 64, BITS, 2)
        v = gl.allocate_shared_memory(dtype, [STAGES, DV, BLOCK_N], COLUMNS)
        v_ring = v._reinterpret(dtype, [STAGES, 1, 1, DV, BLOCK_N], v_boxes.layout)
    else:
        v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DV], ROWS)
        v_ring = v._reinterpret(dtype, [STAGES, 1, 1, BLOCK_N, DV], v_boxes.layout)
    out_rows = q_rows
    if not SHARED:
        OUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        out_rows = gl.allocate_shared_memory(out_boxes.dtype, [CONSUMERS, HALF, DV], OUT)
    out_ring = out_rows._reinterpret(out_boxes.dtype, [CONSUMERS, 1, 1, HALF, DV], out_boxes.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=CONSUMERS)
        mbarrier.init(v_free.index(stage), count=CONSUMERS)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    work = (cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, group, pairs, wave, blocks)
    scales = (q_scale_ptr, k_scale_ptr, v_scale_ptr, q_step, k_step, v_step)
    consumer = (out_ptr, out_boxes, q_rows, out_rows, out_ring, k, v, d_v, scale, scales)
    producer = (q_boxes, k_boxes, v_boxes, q_ring, k_ring, v_ring)
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (
                    consumer, barriers, work, 0, CAUSAL, VARLEN, SCALED, TURNED,
                    SHARED, DV, BLOCK_N, STAGES, CONSUMERS,
                )),
                (_consume, (
                    consumer, barriers, work, 1, CAUSAL, VARLEN, SCALED, TURNED,
                    SHARED, DV, BLOCK_N, STAGES, CONSUMERS,
                )),
                (_consume, (
                    consumer, barriers, work, 2, CAUSAL, VARLEN, SCALED, TURNED,
                    SHARED, DV, BLOCK_N, STAGES, CONSUMERS,
                )),
                (_produce, (
                    producer, barriers, work, CAUSAL, VARLEN, TURNED, D, DV, BLOCK_N,
                    STAGES, CONSUMERS,
                )),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    consumer, barriers, work, 0, CAUSAL, VARLEN, SCALED, TURNED,
                    SHARED, DV, BLOCK_N, STAGES, CONSUMERS,
                )),
                (_consume, (
                    consumer, barriers, work, 1, CAUSAL, VARLEN, SCALED, TURNED,
                    SHARED, DV, BLOCK_N, STAGES, CONSUMERS,
                )),
                (_produce, (
                    producer, barriers, work, CAUSAL, VARLEN, TURNED, D, DV, BLOCK_N,
                    STAGES, CONSUMERS,
                )),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@triton.jit
def _turn_kernel(
    v_ptr, out_ptr, v_batch, v_row, v_head, len_k, padded, heads, d_v,
    DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V [B, S, H, Dv] -> [B, H, Dv, padded]; of sixteen keys 8i + 2j + k comes to 4j + 2i + k."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = at // 16 * 16 + at % 4 // 2 * 8 + at % 16 // 4 * 2 + at % 2
    d = tl.arange(0, DV)
    live = d < d_v
    v_ptr += b * v_batch + h * v_head
    v = tl.load(
        v_ptr + key.to(tl.int64)[:, None] * v_row + d[None, :],
        mask=(key < len_k)[:, None] & live[None, :],
        other=0,
    )
    out_ptr += (b * heads + h) * d_v * padded
    out_tile = d.to(tl.int64)[:, None] * padded + at[None, :]
    tl.store(out_ptr + out_tile, tl.trans(v), mask=live[:, None] & (at < padded)[None, :])


@dataclass(frozen=True, slots=True)
class Config:
    """Groups of warps that compute 64 rows each; keys of a tile and tiles of a ring; registers a thread.

    `shared`: the output leaves through the memory of the queries, which then come later.
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    registers: int = 232
    producer_registers: int = 40
    shared: bool = False


def default_config(itemsize: int, d: int, d_v: int) -> Config:
    """The blocks for head dims padded to `d` and `d_v`; larger ones spill or fill the shared memory."""
    if max(d, d_v) > 128:
        return Config(block_n=64, shared=d == d_v)
    if d == d_v == 64:
        return Config(3, 128, 4, 160, 32)
    return Config(stages=4 if itemsize == 1 else 2)


def missing() -> str | None:
    """Why this kernel cannot run here, or None."""
    return untested(TRITON)


def refused(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> str | None:
    """Why this kernel does not take these tensors, or None. `varlen`: of concatenated sequences."""
    size, wide = q.element_size(), _padded(q, v)
    if size == 4:
        return "float32 has no fast matmul"
    if varlen and size == 1:
        return "8-bit values of different lengths are not turned"
    if wide not in (TILES if size == 2 else NARROW):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} are left to the portable kernel"
    if k.shape[-3] == 0:
        return "there are no keys"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16 or any(
            n > 1 and (step <= 0 or step * size % 16)
            for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        ):
            return f"the TMA unit wants {name} in steps of 16 bytes"
    return None if v.shape[-1] * size % 16 == 0 else "the TMA unit wants rows of 16 bytes"


def _padded(q: Tensor, v: Tensor) -> tuple[int, int]:
    d, d_v = (max(64, next_power_of_2(x.shape[-1])) for x in (q, v))
    return d, d_v


def launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_q: int, max_k: int,
    q_scale: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Attend into `out` what `flash_attention` says of its arguments, of which `refused` must say None.

    All of `out` is written: rows behind the last sequence are 0.
    """
    heads, (kv_heads, d_v) = q.shape[-2], v.shape[-2:]
    varlen = cu_seqlens_q is not None
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    size, wide = q.element_size(), _padded(q, v)
    config = config or default_config(size, *wide)
    n, group, rows = config.block_n, heads // kv_heads, max_q
    wave = group * max(1, L2_BYTES // max(1, max_k * sum(wide) * size))
    boxed = out
    if varlen:
        q, k, v, boxed, rows = q[None], k[None], v[None], out[None], q.shape[0]
    blocks, stay = _grid(config, rows, sequences, heads, causal, varlen)
    programs = min(blocks, sm_count(q.device)) if stay else blocks
    pairs = heads if varlen else heads * sequences
    v_boxes = _boxes(v, n, wide[1]) if size == 2 else _turned(v, n, wide[1])
    scales = (q_scale, k_scale, v_scale)
    pointers = (cu_seqlens_q, cu_seqlens_k, *scales)
    _flash_attention_sm90_kernel[(programs,)](
        _boxes(q, HALF.value, wide[0]), _boxes(k, n, wide[0]), v_boxes,
        _boxes(boxed, HALF.value, wide[1]), out,
        *(out if x is None else x for x in pointers),  # Gluon's tuples hold no None
        *(0 if s is None or s.shape[0] == 1 else 1 for s in scales),
        rows, max_k, sequences, heads, group, pairs, min(wave, pairs), blocks, d_v,
        softmax_scale * LOG2_E,
        CAUSAL=causal, VARLEN=varlen, SCALED=q_scale is not None, SHARED=config.shared, BLOCK_N=n,
        STAGES=config.stages, CONSUMERS=config.consumers, REGISTERS=config.registers,
        PRODUCER_REGISTERS=config.producer_registers, num_warps=4,
        maxnreg=168 if config.consumers == 2 else 128,
    )  # fmt: skip


def _grid(
    config: Config, rows: int, sequences: int, heads: int, causal: bool, varlen: bool
) -> tuple[int, bool]:
    """How many blocks there are, and whether a program takes more than one of them.

    `rows` of the longest sequence, or of all together if they lie one behind the other.
    """
    block_m = HALF.value * config.consumers
    if varlen:
        return (rows // block_m + sequences + 1) * heads, causal or rows <= SHORT * sequences
    return cdiv(rows, block_m) * sequences * heads, not causal


def _boxes(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Copies of `rows` × `columns` of a head of `x` [B, S, H, D]."""
    b, s, h, d = x.shape
    size = x.element_size()
    # The TMA unit looks at the stride of a dimension of one, too.
    steps = [step if n > 1 else 16 * d for n, step in zip((b, h, s), _steps(x), strict=True)]
    layout = gl.NVMMASharedLayout(min(128, columns * size), 8 * size, 4)
    return TensorDescriptor(x, [b, h, s, d], [*steps, 1], [1, 1, rows, columns], layout)


def _steps(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(1)


def _turned(v: Tensor, columns: int, rows: int) -> TensorDescriptor:
    """Copies of `rows` of Dv × `columns` keys of a head of 8-bit `v`, which is transposed first."""
    b, s, h, d = v.shape
    padded = cdiv(s, 16) * 16
    out = torch.empty(b, h, d, padded, dtype=v.dtype, device=v.device)
    _turn_kernel[(cdiv(padded, 128), b * h)](
        v.view(torch.uint8), out.view(torch.uint8), v.stride(0), v.stride(1), v.stride(2), s,
        padded, h, d, DV=rows, BLOCK=128, num_warps=4,
    )  # fmt: skip
    layout = gl.NVMMASharedLayout(min(128, columns), 8, 4)
    steps = [h * d * padded, d * padded, padded, 1]
    return TensorDescriptor(out, [b, h, d, padded], steps, [1, 1, rows, columns], layout)
