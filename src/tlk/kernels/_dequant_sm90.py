"""The kernel under `dequant_mm` for sm_90 from 17 rows on, in Gluon: warps that copy, and warps that compute.

    yᵀ = W xᵀ, 64 rows of W a consumer

A producer fills a ring of tiles of codes and of x by TMA; codes before the wait for earlier kernels, since
nothing of W depends on them. Each consumer decodes 64 rows of W into the registers from which wgmma takes
its left operand (_dequant_sm90_codes.py), and keeps two operands of 64 columns: the second is decoded while
the first is multiplied, and consumers that decode leave the tensor cores to those that multiply. Rows of W
lie in a tile so that two neighbours of y, or a gate and its up, are in one thread. Sums of K split between
programs are written in float32 for _dequant_wide.py to add.

Gluon is experimental and changes between versions of Triton: `missing` says why this one cannot run the
kernel.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tlk.kernels._dequant import Quantized, as_bytes, halves
from tlk.kernels._dequant_pairs import _table
from tlk.kernels._dequant_sm90_codes import (
    ROWS,
    codes_of,
    columns,
    operand,
    scale_pairs,
    stored_scales,
    two_sources,
)
from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _activated, _weight_rows
from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels.gluon import untested

TRITON: tuple[str, ...] = ("3.6.",)  # versions with which it was right on a GPU
REGISTERS = {
    (1, 64): (80, 128, 32), (1, 128): (128, 216, 40), (1, 256): (168, 240, 40),
    (2, 32): (80, 104, 32), (2, 64): (80, 104, 32), (2, 128): (168, 232, 40), (2, 256): (168, 232, 40),
    (3, 64): (128, 152, 56), (3, 128): (128, 160, 32),
    (4, 32): (96, 112, 32), (4, 64): (96, 112, 32),
}  # fmt: skip
"""By consumers and BLOCK_M those of a thread: at the start, of a consumer, of the producer."""

BOX = (4, 2, 8, 16)  # of codes: 64 rows of 16 words
CODES = gl.constexpr(gl.NVMMASharedLayout(64, 32, 2))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _copy_codes(
    w_boxes, ring, ready, stage, first, at, pred, STEP: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """The codes of a stage for every consumer."""
    for part in gl.static_range(STEP // 64):
        for consumer in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                w_boxes, [first // 16 + 4 * consumer, 0, 0, at // 4 + 16 * part],
                ready.index(stage), ring.index((stage * (STEP // 64) + part) * CONSUMERS + consumer),
                pred=pred,
            )  # fmt: skip


@gluon.jit
def _copy_x(
    x_boxes, x, ready, stage, first_m, at, width, pred, STEP: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """The values that meet the two operands of a stage."""
    if STEP == 128:
        k = at
        apart = 64
    elif GROUP == 0:
        k = at
        apart = width
    elif GROUP <= 64:
        k = at * 2
        apart = 64
    else:
        k = at + at // GROUP * GROUP
        apart = GROUP
    for part in gl.static_range(2):
        tma.async_copy_global_to_shared(
            x_boxes, [first_m, k + apart * part], ready.index(stage), x.index(stage * 2 + part),
            pred=pred,
        )  # fmt: skip


@gluon.jit
def _produce(
    memory, numbers, STEP: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring as its stages become free."""
    w_boxes, x_boxes, ring, x, ready, free = memory
    tiles, tiles_m, _, _, _, begin, end, width, _ = numbers
    BYTES: gl.constexpr = CONSUMERS * ROWS * STEP + BLOCK_M * 256
    first = gl.program_id(0) // tiles_m * (CONSUMERS * ROWS)
    first_m = gl.program_id(0) % tiles_m * BLOCK_M
    for stage in gl.static_range(STAGES):
        at = begin + stage * STEP
        mbarrier.expect(ready.index(stage), BYTES, pred=at < end)
        _copy_codes(w_boxes, ring, ready, stage, first, at, at < end, STEP, CONSUMERS)
    wait_for_previous(True)
    for stage in gl.static_range(STAGES):
        at = begin + stage * STEP
        _copy_x(x_boxes, x, ready, stage, first_m, at, width, at < end, STEP, GROUP)
    # of the first tile the first stages are on their way
    stage = gl.minimum((end - begin) // STEP, STAGES) % STAGES
    turn = gl.where((end - begin) // STEP < STAGES, 1, 0)
    start = begin + STAGES * STEP
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = tile // tiles_m * (CONSUMERS * ROWS)
        first_m = tile % tiles_m * BLOCK_M
        for at in range(start, end, STEP):
            mbarrier.wait(free.index(stage), turn)
            mbarrier.expect(ready.index(stage), BYTES)
            _copy_codes(w_boxes, ring, ready, stage, first, at, True, STEP, CONSUMERS)
            _copy_x(x_boxes, x, ready, stage, first_m, at, width, True, STEP, GROUP)
            last = stage == STAGES - 1
            stage = gl.where(last, 0, stage + 1)
            turn = gl.where(last, turn ^ 1, turn)
        start = begin


@gluon.jit
def _consume(
    memory, pointers, numbers, INDEX: gl.constexpr, FLAGS: gl.constexpr, STEP: gl.constexpr,
    BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    UNROLL: gl.constexpr,
):  # fmt: skip
    """64 rows of W and BLOCK_M of x."""
    w, x, ready, free = memory
    scale_ptr, zero_ptr, table_ptr, _, _, _, _ = pointers
    tiles, tiles_m, _, N, groups, begin, end, width, _ = numbers
    DTYPE: gl.constexpr = x.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    if FLAGS[2]:
        wait_for_previous(True)
    table = 0
    if FLAGS[0] == "table4":
        table = _table(table_ptr, DTYPE)
    stage = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = (tile // tiles_m * CONSUMERS + INDEX) * ROWS
        first_m = tile % tiles_m * BLOCK_M
        s0 = stored_scales(scale_ptr, zero_ptr, first, begin, N, width, groups, 0, FLAGS)
        s1 = s0
        if two_sources(FLAGS):
            s1 = stored_scales(scale_ptr, zero_ptr, first, begin, N, width, groups, 1, FLAGS)
        if not FLAGS[2]:
            wait_for_previous(True)
        acc = gl.zeros((ROWS, BLOCK_M), gl.float32, ACC)
        mbarrier.wait(ready.index(stage), turn, pred=begin < end)
        codes = codes_of(w, stage, INDEX, CONSUMERS, FLAGS)
        scales = _both_scales(s0, s1, FLAGS, DTYPE)
        a = operand(codes, scales, table, 0, FLAGS, DTYPE, ACC)
        before = 0
        for at in range(begin, end, STEP * UNROLL):
            running = acc
            for step in gl.static_range(UNROLL):
                ahead = at + STEP * (step + 1)
                s0 = stored_scales(scale_ptr, zero_ptr, first, ahead, N, width, groups, 0, FLAGS)
                s1 = s0
                if two_sources(FLAGS):
                    s1 = stored_scales(
                        scale_ptr, zero_ptr, first, ahead, N, width, groups, 1, FLAGS
                    )
                running = warpgroup_mma(
                    a, x.index(2 * stage).permute((1, 0)), running, is_async=True
                )
                if step > 0:
                    running = warpgroup_mma_wait(1, deps=(running,))
                    mbarrier.arrive(free.index(before), count=1)
                b = operand(codes, scales, table, 1, FLAGS, DTYPE, ACC)
                running = warpgroup_mma(
                    b, x.index(2 * stage + 1).permute((1, 0)), running, is_async=True
                )
                before = stage
                last = stage == STAGES - 1
                stage = gl.where(last, 0, stage + 1)
                turn = gl.where(last, turn ^ 1, turn)
                mbarrier.wait(ready.index(stage), turn, pred=ahead < end)
                codes = codes_of(w, stage, INDEX, CONSUMERS, FLAGS)
                scales = _both_scales(s0, s1, FLAGS, DTYPE)
                running = warpgroup_mma_wait(1, deps=(running,))
                a = operand(codes, scales, table, 0, FLAGS, DTYPE, ACC)
            acc = warpgroup_mma_wait(0, deps=(running,))
            mbarrier.arrive(free.index(before), count=1)
        if BLOCK_M == 256 and FLAGS[7]:  # all at once need more registers than there are
            low, high = gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, 128)), (0, 2, 1)))
            _store(low, pointers, numbers, first, first_m, FLAGS, SPLITS)
            _store(high, pointers, numbers, first, first_m + 128, FLAGS, SPLITS)
        else:
            _store(acc, pointers, numbers, first, first_m, FLAGS, SPLITS)


@gluon.jit
def _both_scales(s0, s1, FLAGS: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of scales and zero points of the two operands of a step."""
    first = scale_pairs(s0[0], s0[1], FLAGS, DTYPE)
    if two_sources(FLAGS):
        return first, scale_pairs(s1[0], s1[1], FLAGS, DTYPE)
    else:
        return first, first


@gluon.jit
def _store(acc, pointers, numbers, first, first_m, FLAGS: gl.constexpr, SPLITS: gl.constexpr):
    """The epilogue of products of 64 rows of W and some of x, or with SPLITS their part of the sums."""
    scale_ptr, _, _, global_ptr, bias_ptr, residual_ptr, y_ptr = pointers
    _, _, M, N, _, _, _, _, stride_residual = numbers
    ACTIVATION: gl.constexpr = FLAGS[3]
    GATED: gl.constexpr = FLAGS[4]
    L: gl.constexpr = acc.type.layout
    BLOCK_M: gl.constexpr = acc.shape[1]
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    column = columns(first, gl.SliceLayout(1, L))
    row = _weight_rows(column, N, GATED)
    if FLAGS[1] == 0 or FLAGS[0] == "nv4":
        scale = global_ptr if FLAGS[0] == "nv4" else scale_ptr
        acc *= gl.load(scale + row).to(gl.float32)[:, None]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, L))
    inside = (column < N * (1 + GATED))[:, None] & (first_m + m < M)[None, :]
    inside, _ = _by_pairs(inside, BLOCK_M)
    begin = first_m.to(gl.int64)
    if SPLITS > 1:
        y_ptr += (gl.program_id(1).to(gl.int64) * M + begin) * (N * (1 + GATED))
        at, _ = _by_pairs(m[None, :] * (N * (1 + GATED)) + column[:, None], BLOCK_M)
        low, high = _by_pairs(acc.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF, BLOCK_M)
        gl.store(y_ptr.to(gl.pointer_type(gl.int64)) + at // 2, low | high << 32, mask=inside)
    else:
        if FLAGS[6]:
            acc += gl.load(bias_ptr + row).to(gl.float32)[:, None]
        if GATED:
            low, high = _by_pairs(acc, BLOCK_M)
            at, _ = _by_pairs(m[None, :] * N + (column // 2)[:, None], BLOCK_M)
            y = (_activated(low, ACTIVATION) * high).to(DTYPE)
            gl.store(y_ptr + begin * N + at, y, mask=inside)
        else:
            low, high = _by_pairs(_activated(acc, ACTIVATION), BLOCK_M)
            if FLAGS[7]:
                at, _ = _by_pairs(m[None, :] * stride_residual + column[:, None], BLOCK_M)
                at = residual_ptr + begin * stride_residual + at
                low += gl.load(at, mask=inside, other=0.0).to(gl.float32)
                high += gl.load(at + 1, mask=inside, other=0.0).to(gl.float32)
            at, _ = _by_pairs(m[None, :] * N + column[:, None], BLOCK_M)
            both = low.to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
            both |= high.to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32) << 16
            y_ptr += begin * N
            gl.store(y_ptr.to(gl.pointer_type(gl.int32)) + at // 2, both, mask=inside)


@gluon.jit
def _by_pairs(t, BLOCK_M: gl.constexpr):
    """Of each 16 rows the first 8, and the others: what a thread has of both are neighbours of y."""
    return gl.split(gl.permute(gl.reshape(t, (4, 2, 8, BLOCK_M)), (0, 2, 3, 1)))


@gluon.jit(do_not_specialize=["M"])
def _wide_sm90_kernel(
    x_boxes, w_boxes, scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, width, groups, split_bytes, stride_residual,
    FLAGS: gl.constexpr, BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, UNROLL: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """64 · CONSUMERS rows of W, which for a gate alternate with their ups, and BLOCK_M of x."""
    allow_next(True)
    STEP: gl.constexpr = 128 if FLAGS[0] == "int8" or FLAGS[0] == "fp8" else 64
    GROUP: gl.constexpr = FLAGS[1]
    TILES: gl.constexpr = STAGES * (STEP // 64) * CONSUMERS
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles = gl.cdiv(N * (2 if FLAGS[4] else 1), CONSUMERS * ROWS) * tiles_m
    begin = gl.program_id(1) * split_bytes
    # a last step that is not full, or more, is full of zeros: TMA makes them
    end = gl.minimum(begin + split_bytes, gl.cdiv(width, STEP * UNROLL) * (STEP * UNROLL))
    w = gl.allocate_shared_memory(gl.int32, [TILES, ROWS, 16], CODES)
    x = gl.allocate_shared_memory(x_boxes.dtype, [STAGES * 2, BLOCK_M, 64], SWIZZLED)
    ring = w._reinterpret(gl.int32, [TILES, 4, 2, 8, 16], w_boxes.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    memory = (w, x, ready, free)
    pointers = (scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, residual_ptr, y_ptr)
    numbers = (tiles, tiles_m, M, N, groups, begin, end, width, stride_residual)
    copied = (w_boxes, x_boxes, ring, x, ready, free)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (memory, pointers, numbers, 0, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_produce, (copied, numbers, STEP, GROUP, BLOCK_M, CONSUMERS, STAGES)),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (memory, pointers, numbers, 0, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 1, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_produce, (copied, numbers, STEP, GROUP, BLOCK_M, CONSUMERS, STAGES)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (memory, pointers, numbers, 0, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 1, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 2, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_produce, (copied, numbers, STEP, GROUP, BLOCK_M, CONSUMERS, STAGES)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (memory, pointers, numbers, 0, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 1, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 2, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_consume, (memory, pointers, numbers, 3, FLAGS, STEP, BLOCK_M, CONSUMERS, STAGES, SPLITS, UNROLL)),
                (_produce, (copied, numbers, STEP, GROUP, BLOCK_M, CONSUMERS, STAGES)),
            ],
            [4, 4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def missing() -> str | None:
    """Why this kernel cannot run here, or None."""
    return untested(TRITON)


def launch(
    meta: dict[str, int], x: Tensor, w: Quantized, bias: Tensor | None, activation: str | None,
    out: Tensor, m: int, n: int, residual: Tensor | None, gated: bool, late: bool,
) -> None:  # fmt: skip
    """Run the kernel on x [m, K], for y [m, n] or with SPLITS their parts [SPLITS, m, rows of W]."""
    rows, width = w.weight.shape
    codes, consumers, block_m = halves(w.kind), meta["CONSUMERS"], meta["BLOCK_M"]
    start, computing, copying = REGISTERS[consumers, block_m]
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    pointers = (w.zero, w.table, w.global_scale, bias, residual)
    flags = (
        w.kind, 0 if w.whole_rows else w.group_size // codes, late, activation, gated,
        w.zero is not None, bias is not None, residual is not None,
    )  # fmt: skip
    step = 128 // codes * meta["UNROLL"]
    tiles = cdiv(rows, ROWS.value * consumers) * cdiv(m, block_m)
    if meta["SPLITS"] == 1:
        tiles = min(tiles, meta.get("PROGRAMS", tiles))
    meta = {k: v for k, v in meta.items() if k != "PROGRAMS"}
    _wide_sm90_kernel[(tiles, meta["SPLITS"])](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, 64], SWIZZLED.value),
        _boxes(w.weight, n, gated), as_bytes(w.scale),
        *(x if t is None else t for t in pointers), out,  # Gluon's tuples hold no None
        m, n, width, w.scale.shape[1], cdiv(cdiv(width, step), meta["SPLITS"]) * step,
        0 if residual is None else residual.stride(0), flags,
        **meta, REGISTERS=computing, PRODUCER_REGISTERS=copying,
        num_warps=4, maxnreg=start, launch_pdl=True,
    )  # fmt: skip


def _boxes(weight: Tensor, n: int, gated: bool) -> TensorDescriptor:
    """Copies of 64 rows, of each 16 first every other one, or of a gate 8 rows and 8 of its up."""
    words = as_bytes(weight).view(torch.int32)
    s = words.stride(0)
    runs, steps = (n // 8, (8 * s, n * s, s, 1)) if gated else (n // 16, (16 * s, s, 2 * s, 1))
    shape = [runs, 2, 8, words.shape[1]]
    return TensorDescriptor(words, shape, list(steps), list(BOX), gl.NVMMASharedLayout(64, 32, 4))
