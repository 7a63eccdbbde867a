"""RMSNorm, alone or fused with the residual add before it, and LayerNorm.

    rms_norm    y = x / sqrt(mean(x²) + eps) · (offset + w)
    layer_norm  y = c / sqrt(mean(c²) + eps) · (offset + w) + b,   c = x − mean(x)

Zhang & Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467
Ba, Kiros & Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450

LayerNorm is RMSNorm of the centred row, so one kernel does both. A row is read once, stays in
registers while its statistics are taken (the mean first, then the variance around it: no
cancellation), and is written once: 2·T·N·itemsize bytes, twice that with a residual. Short rows
share a program; rows too long for the registers are read once per statistic, from the cache.
Launched as a dependent (_pdl.py), a program has its weight before it waits for x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels._rows import as_rows

# Above this a row no longer fits in the registers of 16 warps.
LONGEST_IN_REGISTERS = 16384


def _normalized(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.float() + weight_offset)
    return h if bias is None else h + bias.float()


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Tensor:
    h = x.contiguous().float()
    return _normalized(h, weight, None, eps, weight_offset).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    total = (x.contiguous().float() + residual.contiguous().float()).to(x.dtype)
    return rms_norm_reference(total, weight, eps, weight_offset), total


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
) -> Tensor:
    h = x.contiguous().float()
    h = h - h.mean(-1, keepdim=True)
    return _normalized(h, weight, bias, eps, weight_offset).to(x.dtype)


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    # divided in 32 bits, where that is quick, and multiplied in 64
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _load(x_ptr, x_offsets, residual_ptr, sum_offsets, mask):
    x = tl.load(x_ptr + x_offsets, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + sum_offsets, mask, other=0.0).to(tl.float32)
        # normalize the sum as the next block will read it, rounded to its dtype
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["n_rows"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    n_rows, inner, outer_stride, inner_stride, eps, weight_offset,
    N: tl.constexpr, UNIT: tl.constexpr, CENTER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < N)
    starts = _row_start(rows, inner, outer_stride, inner_stride)
    offsets = rows.to(tl.int64)[:, None] * N + cols
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + cols, cols < N, other=0.0)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + cols, cols < N, other=0.0)
    wait_for_previous(PDL)
    x = _load(x_ptr, (starts * UNIT)[:, None] + cols, residual_ptr, offsets, mask)  # [ROWS, BLOCK]
    if sum_ptr is not None:
        tl.store(sum_ptr + offsets, x.to(sum_ptr.dtype.element_ty), mask)
    if CENTER:
        x = tl.where(mask, x - (tl.sum(x, 1) / N)[:, None], 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
    if weight_ptr is not None:
        y *= scale.to(tl.float32) + weight_offset
    if bias_ptr is not None:
        y += shift.to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _norm_loop_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    inner, outer_stride, inner_stride, eps, weight_offset,
    N: tl.constexpr, UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    start = _row_start(tl.program_id(0), inner, outer_stride, inner_stride) * UNIT
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if CENTER:
        for first in range(0, N, BLOCK):
            cols = first + lanes
            acc += _load(x_ptr, start + cols, residual_ptr, row * N + cols, cols < N)
    mean = tl.sum(acc, 0) / N
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        cols = first + lanes
        x = _load(x_ptr, start + cols, residual_ptr, row * N + cols, cols < N)
        x = tl.where(cols < N, x - mean, 0.0)
        acc += x * x
    scale = tl.rsqrt(tl.sum(acc, 0) / N + eps)
    for first in range(0, N, BLOCK):
        cols = first + lanes
        x = _load(x_ptr, start + cols, residual_ptr, row * N + cols, cols < N)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * N + cols, x.to(sum_ptr.dtype.element_ty), cols < N)
        y = (x - mean) * scale
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + cols, cols < N, other=0.0).to(tl.float32) + weight_offset
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), cols < N)


def default_config(n: int, itemsize: int) -> tuple[int, int, int]:
    """Rows per program, columns per row tile and warps: 8 to 32 values a thread, any GPU."""
    if n > LONGEST_IN_REGISTERS:
        return 1, 16384 // itemsize, 16  # 8192 of float32 spill in the loop under Triton 3.9
    block = next_power_of_2(n)
    rows = max(2048 // block, 1)
    return rows, block, min(rows * block // 512, 16)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    y: Tensor, total: Tensor | None, eps: float, weight_offset: float, center: bool,
) -> None:  # fmt: skip
    n = x.shape[-1]
    if x.numel() == 0:
        return
    n_rows = x.numel() // n
    x, inner, outer_stride, inner_stride = as_rows(x)
    # In units of 8 the compiler sees that 16-byte loads are aligned; of a plain stride it knows
    # only whether 16 divides it, which misses heads of 72.
    unit = 8 if outer_stride % 8 == 0 and inner_stride % 8 == 0 else 1
    rows, block, num_warps = default_config(n, x.element_size())
    tensors = x, residual, weight, bias, y, total
    scalars = inner, outer_stride // unit, inner_stride // unit, eps, weight_offset
    dependent = pdl(x.device)
    if n > LONGEST_IN_REGISTERS:
        _norm_loop_kernel[(n_rows,)](
            *tensors, *scalars, N=n, UNIT=unit, CENTER=center, BLOCK=block, PDL=dependent,
            num_warps=num_warps, launch_pdl=dependent,
        )  # fmt: skip
    else:
        _norm_kernel[(cdiv(n_rows, rows),)](
            *tensors, n_rows, *scalars, N=n, UNIT=unit, CENTER=center, ROWS=rows, BLOCK=block,
            PDL=dependent, num_warps=num_warps, launch_pdl=dependent,
        )  # fmt: skip


@op(rms_norm_reference)
def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, None, y, None, eps, weight_offset, center=False)
    return y


@op(add_rms_norm_reference)
def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y)
    _launch(x, residual.contiguous(), weight, None, y, total, eps, weight_offset, center=False)
    return y, total


@op(layer_norm_reference)
def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, bias, y, None, eps, weight_offset, center=True)
    return y


def _check(x: Tensor, **vectors: Tensor | None) -> None:
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to normalize, got shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None:
            check_dtype(name, vector, *FLOATS)
            check_shape(name, vector, x.shape[-1])
            check_device(name, vector, x.device)
            check_last_dim_contiguous(name, vector)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> Tensor:
    """Scale every row of `x` [..., N] to a root mean square of 1, then by `weight` [N].

    The factor is `weight_offset + weight`: an offset of 1 for weights stored around zero; None
    means no factor. `x` may be a strided view, such as heads inside a fused projection; the
    result is contiguous, in the dtype of `x` (float32, float16 or bfloat16), rounded once.
    Raises TypeError for other dtypes and ValueError where `weight` does not match `x`.
    """
    _check(x, weight=weight)
    return _rms_norm(x, weight, eps, weight_offset)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm(x + residual)` and the sum, which is the next block's residual.

    `x` and `residual` are [..., N] of one dtype; the sum is rounded to it before it is
    normalized, as it would be by two calls. Raises as `rms_norm` does.
    """
    _check(x, weight=weight)
    check_dtype("residual", residual, x.dtype)
    check_shape("residual", residual, *x.shape)
    check_device("residual", residual, x.device)
    return _add_rms_norm(x, residual, weight, eps, weight_offset)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """Shift and scale every row of `x` [..., N] to mean 0 and variance 1, then apply
    `weight_offset + weight` [N] and `bias` [N], either of which may be None.

    Dtypes, strides and errors are those of `rms_norm`.
    """
    _check(x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps, weight_offset)
