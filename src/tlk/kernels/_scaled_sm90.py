"""The kernel of `scaled_mm` for few rows on sm_90, in Gluon: every byte of W is on its way early.

    yᵀ = W xᵀ, 64 rows of W a program

A ring of tiles [64, BLOCK_K] of W fills by TMA before the wait for earlier kernels, since nothing of W
depends on them, and stays full to the end; tiles of x join theirs after the wait. Steps are wide because
the tensor cores' answer is awaited in each: for one row in float8 the layers of Llama-3.1-8B took 80 µs in
steps of 512 columns and 81 in steps of 256, on an H100, where "dot" took 87.
Every product of BLOCK_K columns is added in float32. Gluon is experimental and changes between
versions of Triton: `missing` says why this one cannot run the kernel.
"""

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

from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _activated
from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels.gluon import untested

TRITON: tuple[str, ...] = ("3.6.",)  # versions with which it was right on a GPU
ROWS = gl.constexpr(64)  # of W: those of an instruction
BLOCK = gl.constexpr(128)  # columns that share a scale
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))


@gluon.jit(do_not_specialize=["M"])
def _few_rows_sm90_kernel(
    x_boxes, xs_ptr, w_boxes, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_xs, stride_ws, stride_residual,
    ACTIVATION: gl.constexpr, BLOCKWISE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of W and BLOCK_M of x."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    dtype: gl.constexpr = w_boxes.dtype
    sums: gl.constexpr = gl.int32 if dtype == gl.int8 else gl.float32
    allow_next(True)
    first, first_m = gl.program_id(0) * ROWS, gl.program_id(1) * BLOCK_M
    w = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], w_boxes.layout)
    x = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_boxes.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        inside = stage * BLOCK_K < K
        mbarrier.expect(ready.index(stage), (ROWS + BLOCK_M) * BLOCK_K, pred=inside)
        tma.async_copy_global_to_shared(
            w_boxes, [first, stage * BLOCK_K], ready.index(stage), w.index(stage), pred=inside
        )  # fmt: skip
    wait_for_previous(True)
    for stage in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x_boxes, [first_m, stage * BLOCK_K], ready.index(stage), x.index(stage),
            pred=stage * BLOCK_K < K,
        )  # fmt: skip
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
    n = first + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    in_m = m < M
    xs_ptrs = xs_ptr + m.to(gl.int64) * stride_xs
    if BLOCKWISE:
        ws_ptr += first // BLOCK * stride_ws
        scale = gl.load(xs_ptrs, mask=in_m, other=0.0) * gl.load(ws_ptr)
    acc = gl.zeros((ROWS, BLOCK_M), sums, ACC)
    zero = gl.zeros((ROWS, BLOCK_M), sums, ACC)
    stage, turn = 0, 0
    for start in range(0, K, BLOCK_K):
        mbarrier.wait(ready.index(stage), turn)
        part = warpgroup_mma(
            w.index(stage), x.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        if BLOCKWISE:
            block = gl.minimum(start // BLOCK + 1, (K - 1) // BLOCK)
            next_scale = gl.load(xs_ptrs + block, mask=in_m, other=0.0) * gl.load(ws_ptr + block)
        part = warpgroup_mma_wait(0, deps=(part,))
        if BLOCKWISE:
            acc += part * scale[None, :]
            scale = next_scale
        else:
            acc += part
        ahead = start + STAGES * BLOCK_K
        mbarrier.expect(ready.index(stage), (ROWS + BLOCK_M) * BLOCK_K, pred=ahead < K)
        tma.async_copy_global_to_shared(
            w_boxes, [first, ahead], ready.index(stage), w.index(stage), pred=ahead < K
        )
        tma.async_copy_global_to_shared(
            x_boxes, [first_m, ahead], ready.index(stage), x.index(stage), pred=ahead < K
        )
        last = stage == STAGES - 1
        stage = gl.where(last, 0, stage + 1)
        turn = gl.where(last, turn ^ 1, turn)
    y = acc.to(gl.float32)
    in_n = n < N
    if not BLOCKWISE:
        y *= gl.load(xs_ptrs, mask=in_m, other=0.0)[None, :]
        y *= gl.load(ws_ptr + n * stride_ws, mask=in_n, other=0.0)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + n, mask=in_n, other=0.0).to(gl.float32)[:, None]
    y = _activated(y, ACTIVATION)
    inside = in_n[:, None] & in_m[None, :]
    row = m.to(gl.int64)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + row * stride_residual + n[:, None]
        y += gl.load(at, mask=inside, other=0.0).to(gl.float32)
    gl.store(y_ptr + row * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def missing() -> str | None:
    """Why this kernel cannot run here, or None."""
    return untested(TRITON)


def launch(
    meta: dict[str, int], x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, y: Tensor, stride_residual: int,
    activation: str | None, blockwise: bool,
) -> None:  # fmt: skip
    """Run the kernel on matrices `x` and `y`; with scales of blocks BLOCK_K is 128."""
    (m, n), k = y.shape, weight.shape[1]
    block_m, block_k = meta["BLOCK_M"], meta["BLOCK_K"]
    _few_rows_sm90_kernel[(cdiv(n, ROWS.value), cdiv(m, block_m))](
        _boxes(x, block_m, block_k), x_scale, _boxes(weight, ROWS.value, block_k), weight_scale,
        bias, residual, y, m, n, k, x_scale.stride(0), weight_scale.stride(0), stride_residual,
        activation, blockwise, **meta, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _boxes(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns], SWIZZLED.value)
