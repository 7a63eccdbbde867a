"""The Triton kernels under `matmul`, `norm_linear` and `gated_linear`, and their launcher.

    y = act(norm(x) Wᵀ + b) + residual                          W [N, K]
    y = act(norm(x) Gᵀ + b₁) · (norm(x) Uᵀ + b₂)                W [2N, K], the rows of G and then of U

For few rows of x they differ in who holds what while W streams by once (`evict_first`):

- "gemv", one row: x stays in registers, and PER_SM programs an SM, or more of MOST_TILES tiles, walk
  over tiles of whole rows of W.
- "fma", up to 8 rows a program: BLOCK_N rows of W, K in steps, one step ahead of the arithmetic.
- "dot", tensor cores: W is the left operand, so that its rows fill the 16 or 64 rows of an instruction
  and the few rows of x its 8 or 16 columns; K is pipelined through shared memory.
- "tile", any number of rows: a tiled matmul in grouped order.

RMSNorm's division is applied to the sums: rstd · ((x · w) Wᵀ). Gate and up rows alternate within a
program, which is a matter of addresses. Weights do not depend on earlier kernels, so a dependent
launch (_pdl.py) asks for its first ones before it waits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._device import sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._pdl import allow_next, pdl, prefetch, wait_for_previous
from tlk.kernels.activation import _activate
from tlk.kernels.tuning import Config

NORMED = ("gemv", "fma")
"""The kernels that take a norm. "dot" took longer with it (gate and up of a Llama-3.1-8B layer for 16
rows 92 µs, and not 82, on an H100) than the launch of the norm, which overlaps."""


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu_squared":
        y = tl.maximum(y, 0.0)
        y = y * y
    elif ACTIVATION is not None:
        y = _activate(y, ACTIVATION)
    return y


@triton.jit
def _weight_rows(n, N, GATED: tl.constexpr):
    """Where the rows `n` of a program lie in W, past the end the last one: of G even, of U odd."""
    if GATED:
        return tl.minimum(n // 2, N - 1) + n % 2 * N
    return tl.minimum(n, N - 1)


@triton.jit
def _store_outputs(
    y, m, first, bias_ptr, residual_ptr, y_ptr, rows, cols, stride_residual,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The epilogue of y [BLOCK_M, BLOCK_N], products with W's rows from `first` on; float32."""
    n = first + tl.arange(0, y.shape[1])
    if bias_ptr is not None:
        at = n // 2 + n % 2 * cols if GATED else n
        b = tl.load(bias_ptr + at, n < cols * (1 + GATED), other=0.0).to(tl.float32)[None, :]
        y += b
    if GATED:
        gate, up = tl.split(tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2)))
        y = _activated(gate, ACTIVATION) * up
        n = first // 2 + tl.arange(0, y.shape[1])
    else:
        y = _activated(y, ACTIVATION)
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        y += tl.load(at, inside, other=0.0).to(tl.float32)
    at = y_ptr + m.to(tl.int64)[:, None] * cols + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["steps"])
def _gemv_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr,
    steps, N, K, stride_w, eps, weight_offset,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of x in registers; BLOCK_N rows of W at a time, the next ones already on their way."""
    allow_next(PDL)
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * steps * BLOCK_N
    end = tl.minimum(start + steps * BLOCK_N, N * (1 + GATED))
    w_ptrs = w_ptr + k[None, :]
    in_k = (k < K)[None, :]
    w = _load_rows(w_ptrs, start, N, stride_w, in_k, GATED, EVEN_K, BLOCK_N)
    if norm_ptr is not None:
        scale = tl.load(norm_ptr + k, k < K, other=0.0).to(tl.float32) + weight_offset
    wait_for_previous(PDL)
    x = tl.load(x_ptr + k, k < K, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        x *= scale
    for step in range(steps):
        first = start + step * BLOCK_N
        mask = in_k & (first + BLOCK_N < end)
        w_next = _load_rows(w_ptrs, first + BLOCK_N, N, stride_w, mask, GATED, False, BLOCK_N)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        if norm_ptr is not None:
            y *= rstd
        _store_outputs(
            y[None, :], tl.zeros((1,), tl.int32), first, bias_ptr, residual_ptr, y_ptr,
            1, N, 0, ACTIVATION, GATED,
        )  # fmt: skip
        w = w_next


@triton.jit
def _load_rows(
    w_ptrs, first, N, stride_w, mask,
    GATED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of W from the program's row `first` on; `WHOLE`: no element needs a mask."""
    rows = _weight_rows(first + tl.arange(0, BLOCK_N), N, GATED).to(tl.int64)
    ptrs = w_ptrs + rows[:, None] * stride_w
    if WHOLE:
        return tl.load(ptrs, eviction_policy="evict_first")
    return tl.load(ptrs, mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M"])
def _fma_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr,
    M, N, K, stride_x, stride_w, stride_residual, eps, weight_offset,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_N whole rows of W: products and sums in float32."""
    allow_next(PDL)
    first = tl.program_id(0) * BLOCK_N
    rows = _weight_rows(first + tl.arange(0, BLOCK_N), N, GATED)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # three dimensions from the pointers on: a load's layout is then the accumulator's
    x_ptrs = x_ptr + m.to(tl.int64)[:, None, None] * stride_x + k[None, None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :, None] * stride_w + k[None, None, :]
    in_m = (m < M)[:, None, None]
    in_k = (k < K)[None, None, :]
    if EVEN_K:
        w = tl.load(w_ptrs, eviction_policy="evict_first")
    else:
        w = tl.load(w_ptrs, in_k, other=0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        next_in_k = (start + BLOCK_K + k < K)[None, None, :]
        mask = (start + BLOCK_K < K) if EVEN_K else next_in_k
        next_ptrs = w_ptrs + start + BLOCK_K
        w_next = tl.load(next_ptrs, mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, in_m if EVEN_K else in_m & in_k, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            scale = tl.load(norm_ptr + start + k[None, None, :], in_k, other=0.0).to(tl.float32)
            x *= scale + weight_offset
        acc += x * w.to(tl.float32)
        w, in_k = w_next, next_in_k
    y = tl.sum(acc, 2)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    _store_outputs(
        y, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, M, N, K, stride_x, stride_w, stride_residual,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr = 0,
):  # fmt: skip
    """yᵀ = W xᵀ of BLOCK_N rows of W; PREFETCH columns of them are asked for before the wait."""
    allow_next(PDL)
    first = tl.program_id(0) * BLOCK_N
    rows = _weight_rows(first + tl.arange(0, BLOCK_N), N, GATED)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_starts = w_ptr + rows.to(tl.int64)[:, None] * stride_w
    if PDL:
        prefetch(w_starts, K, PREFETCH)
    wait_for_previous(PDL)
    w_ptrs = w_starts + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    in_m = (m < M)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = start + k < K
        if EVEN_K:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m, other=0.0)
        else:
            w = tl.load(w_ptrs + start, in_k[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m & in_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    _store_outputs(
        tl.trans(acc), m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_w, stride_residual,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y; GROUP_M rows of tiles go together, so that L2 keeps what they share."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (within // height) * BLOCK_N
    rows = _weight_rows(first + tl.arange(0, BLOCK_N), N, False)
    k = tl.arange(0, BLOCK_K)
    # rows past the end repeat the last one, whose result is not stored: loads stay unmasked
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, (start + k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    _store_outputs(
        acc, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, False
    )  # fmt: skip


def launch(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float, float] | None = None,
    gated: bool = False,
) -> None:
    """Run the kernel that `config` names; `norm` is RMSNorm's weight, eps and weight offset.

    "gemv" takes one row; only the kernels in NORMED take a norm, and "tile" no gate either.
    """
    (m, n), k = (y.shape[:-1].numel(), y.shape[-1]), weight.shape[1]
    x = x.reshape(m, k)
    stride_residual = 0
    if residual is not None:
        residual = residual.reshape(m, n)
        stride_residual = residual.stride(0)
    kernel, meta = config["kernel"], dict(config["meta"])
    assert norm is None or kernel in NORMED
    if kernel == "gemv":
        meta["BLOCK_K"] = next_power_of_2(k)
    tiles_n = cdiv(weight.shape[0], meta["BLOCK_N"])
    even_k = k % meta["BLOCK_K"] == 0
    strides = x.stride(0), weight.stride(0), stride_residual
    if kernel == "tile":
        grid = (cdiv(m, meta["BLOCK_M"]) * tiles_n,)
        _tile_kernel[grid](
            x, weight, bias, residual, y, m, n, k, *strides, activation, even_k, **meta
        )
        return
    norm_weight, eps, weight_offset = norm or (None, 0.0, 0.0)
    tensors = x, weight, bias, residual, norm_weight, y
    dependent = pdl(x.device)
    flags: tuple[Any, ...] = activation, gated, dependent, even_k
    if kernel == "gemv":
        steps = cdiv(tiles_n, meta.pop("PER_SM") * sm_count(x.device))
        steps = min(steps, meta.pop("MOST_TILES"))
        _gemv_kernel[(cdiv(tiles_n, steps),)](
            *tensors, steps, n, k, weight.stride(0), eps, weight_offset, *flags, **meta,
            launch_pdl=dependent,
        )  # fmt: skip
        return
    tiles = tiles_n, cdiv(m, meta["BLOCK_M"])
    if kernel == "dot":
        _dot_kernel[tiles](
            x, weight, bias, residual, y, m, n, k, *strides, *flags, **meta, launch_pdl=dependent
        )
        return
    _fma_kernel[tiles](
        *tensors, m, n, k, *strides, eps, weight_offset, *flags, **meta, launch_pdl=dependent
    )
