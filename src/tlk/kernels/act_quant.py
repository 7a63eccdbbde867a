"""Activations in 8 bits, alone or fused with the norm or the gated activation before.

    s = max|h| / m,   q = round(h · (1 / s))        of h = x, norm(x) · w or act(g) · u with x = [g, u]

m is 448 for float8_e4m3fn and 127 for int8; the maximum runs over a row, or over blocks of 1 × 128 as in
DeepSeek-AI, "DeepSeek-V3 Technical Report", https://arxiv.org/abs/2412.19437, or s is given ("static").
Both round half to even and saturate at ±m. s is 1 where all of h is 0, and never below `SMALLEST`, whose
inverse is finite. A NaN or an infinity in h makes the scale of its row or block NaN or infinite, so that
it is still there after the matmul, in int8 too; with a static scale only float8 keeps a NaN.

h is float32 and is not rounded in between. A row stays in registers while its statistics are taken: it is
read once and written once, T·N·(itemsize + 1) bytes. Where no statistic spans the row, programs take parts
of it; rows too long for the registers are read again for each statistic, from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tlk.errors import UnsupportedError
from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels._rows import as_rows
from tlk.kernels.activation import _activate
from tlk.kernels.matmul import activate_reference
from tlk.kernels.norm import _row_start

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What may be quantized to, and the largest magnitude that is used of it."""

GROUP = 128
SMALLEST = 2.0**-120
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# Above this a row no longer fits in the registers of 16 warps.
LONGEST_IN_REGISTERS = 16384


def scale_reference(h: Tensor, dtype: torch.dtype, group_size: int | None) -> Tensor:
    """The scales of `h` [..., K], float32 [..., 1] or [..., ceil(K / group_size)]."""
    if group_size is not None:
        short = -h.shape[-1] % group_size
        h = torch.nn.functional.pad(h, (0, short)).unflatten(-1, (-1, group_size))
    largest = h.abs().amax(-1, keepdim=group_size is None)
    # by a tensor: a GPU multiplies by the inverse of a Python number
    scale = largest / largest.new_full((), LARGEST[dtype])
    scale = torch.where(scale < SMALLEST, SMALLEST, scale)  # and not a clamp: a NaN stays
    return torch.where(largest == 0, 1.0, scale)


def cast_reference(h: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None) -> Tensor:
    """`h` [..., K] divided by its `scale`, in `dtype`."""
    inverse = 1.0 / scale
    if group_size is not None:
        inverse = inverse.repeat_interleave(group_size, -1)[..., : h.shape[-1]]
    q = (h * inverse).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (q if dtype.is_floating_point else q.round()).to(dtype)


def _quantized(
    h: Tensor, dtype: torch.dtype, group_size: int | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if scale is None:
        used = scale_reference(h, dtype, group_size)
    else:
        used = scale.reshape(()).expand(*h.shape[:-1], 1)
        used = used.clone(memory_format=torch.contiguous_format)
    return cast_reference(h, used, dtype, group_size), used


def quantize_act_reference(
    x: Tensor, dtype: torch.dtype, group_size: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _quantized(x.contiguous().float(), dtype, group_size, scale)


def rms_norm_quant_reference(
    x: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = x.contiguous().float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.float() + weight_offset)
    return _quantized(h, dtype, group_size, scale)


def gated_quant_reference(
    x: Tensor,
    dtype: torch.dtype,
    activation: str,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    gate, up = x.contiguous().float().chunk(2, -1)
    return _quantized(activate_reference(gate, activation) * up, dtype, group_size, scale)


@triton.jit
def _values(x_ptr, offsets, mask, N: tl.constexpr, ACTIVATION: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        up = tl.load(x_ptr + N + offsets, mask, other=0.0).to(tl.float32)
        x = _activate(x, ACTIVATION) * up
    return x


@triton.jit
def _magnitude(h):
    # the bits of |h|, which as integers are ordered as |h| is, with infinity and NaN on top
    return tl.abs(h).to(tl.int32, bitcast=True)


@triton.jit
def _scale(magnitude, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    largest = magnitude.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _cast(q, LARGEST: tl.constexpr, dtype: tl.constexpr):
    if dtype == tl.int8:
        q = libdevice.rint(tl.minimum(tl.maximum(q, -LARGEST), LARGEST))
    return q.to(dtype)  # to float8 it saturates


@triton.jit(do_not_specialize=["n_rows"])
def _quant_kernel(
    x_ptr, weight_ptr, static_ptr, q_ptr, scale_ptr,
    n_rows, inner, outer_stride, inner_stride, eps, weight_offset,
    N: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows, whole ones if a statistic spans them, else BLOCK columns of them."""
    allow_next(PDL)
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < N)
    starts = (_row_start(rows, inner, outer_stride, inner_stride) * UNIT)[:, None]
    row = rows.to(tl.int64)[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, cols < N, other=0.0)
    wait_for_previous(PDL)
    h = _values(x_ptr, starts + cols, mask, N, ACTIVATION)  # [ROWS, BLOCK]
    if NORM:
        h *= tl.rsqrt(tl.sum(h * h, 1) / N + eps)[:, None]
        if weight_ptr is not None:
            h *= weight.to(tl.float32) + weight_offset
    if GROUP > 0:
        groups: tl.constexpr = (N + GROUP - 1) // GROUP
        h = tl.reshape(h, (ROWS, BLOCK // GROUP, GROUP))
        scale = _scale(tl.max(_magnitude(h), 2), LARGEST, SMALLEST)
        q = tl.reshape(h * _inverse(scale)[:, :, None], (ROWS, BLOCK))
        group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)[None, :]
        inside = (rows < n_rows)[:, None] & (group < groups)
        tl.store(scale_ptr + row * groups + group, scale, inside)
    else:
        if static_ptr is not None:
            scale = tl.load(static_ptr) + tl.zeros((ROWS,), tl.float32)
        else:
            scale = _scale(tl.max(_magnitude(h), 1), LARGEST, SMALLEST)
        q = h * _inverse(scale)[:, None]
        tl.store(scale_ptr + rows, scale, (rows < n_rows) & (block == 0))
    tl.store(q_ptr + row * N + cols, _cast(q, LARGEST, q_ptr.dtype.element_ty), mask)


@triton.jit
def _quant_loop_kernel(
    x_ptr, weight_ptr, static_ptr, q_ptr, scale_ptr,
    inner, outer_stride, inner_stride, eps, weight_offset,
    N: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row, too long for the registers."""
    allow_next(PDL)
    wait_for_previous(PDL)
    start = _row_start(tl.program_id(0), inner, outer_stride, inner_stride) * UNIT
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    rstd = 1.0
    if NORM:
        acc = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, N, BLOCK):
            cols = first + lanes
            x = _values(x_ptr, start + cols, cols < N, N, ACTIVATION)
            acc += x * x
        rstd = tl.rsqrt(tl.sum(acc, 0) / N + eps)
    scale = 1.0
    if static_ptr is not None:
        scale = tl.load(static_ptr)
    elif GROUP == 0:
        top = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, N, BLOCK):
            cols = first + lanes
            h = _values(x_ptr, start + cols, cols < N, N, ACTIVATION)
            top = tl.maximum(
                top, _magnitude(_normed(h, weight_ptr, cols, rstd, weight_offset, N, NORM))
            )
        scale = _scale(tl.max(top, 0), LARGEST, SMALLEST)
    if GROUP == 0:
        inverse = _inverse(scale)
        tl.store(scale_ptr + row, scale)
    for first in range(0, N, BLOCK):
        cols = first + lanes
        h = _values(x_ptr, start + cols, cols < N, N, ACTIVATION)
        h = _normed(h, weight_ptr, cols, rstd, weight_offset, N, NORM)
        if GROUP > 0:
            groups: tl.constexpr = (N + GROUP - 1) // GROUP
            h = tl.reshape(h, (BLOCK // GROUP, GROUP))
            scales = _scale(tl.max(_magnitude(h), 1), LARGEST, SMALLEST)
            q = tl.reshape(h * _inverse(scales)[:, None], (BLOCK,))
            group = first // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(scale_ptr + row * groups + group, scales, group < groups)
        else:
            q = h * inverse
        tl.store(q_ptr + row * N + cols, _cast(q, LARGEST, q_ptr.dtype.element_ty), cols < N)


@triton.jit
def _normed(h, weight_ptr, cols, rstd, weight_offset, N: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        h *= rstd
        if weight_ptr is not None:
            h *= tl.load(weight_ptr + cols, cols < N, other=0.0).to(tl.float32) + weight_offset
    return h


def default_config(n_rows: int, n: int, whole: bool, processors: int) -> tuple[int, int, int]:
    """Rows per program, columns per row tile and warps; `whole`: a program needs whole rows."""
    if whole:
        block = max(next_power_of_2(n), GROUP)
        rows = max(2048 // block, 1)
        return rows, block, min(rows * block // 512, 16)
    block = 512 if n_rows * n <= 4 * 512 * processors else 2048
    if n <= block:
        return default_config(n_rows, n, True, processors)
    return 1, block, block // 512 if block > 512 else 2


def _launch(
    x: Tensor, n: int, dtype: torch.dtype, group_size: int | None, static: Tensor | None,
    weight: Tensor | None = None, eps: float = 0.0, weight_offset: float = 0.0,
    norm: bool = False, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Quantize rows of `n` values, which `x` holds or which are made of it."""
    require_fp8(x.device, dtype)
    lead = x.shape[:-1]
    q = torch.empty((*lead, n), dtype=dtype, device=x.device)
    columns = 1 if group_size is None else cdiv(n, group_size)
    scale = torch.empty((*lead, columns), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scale
    n_rows = lead.numel()
    x, inner, outer_stride, inner_stride = as_rows(x)
    # as in norm.py: in units of 8 the compiler sees that loads are aligned
    unit = 8 if outer_stride % 8 == 0 and inner_stride % 8 == 0 else 1
    tensors = x, weight, static, q, scale
    scalars = inner, outer_stride // unit, inner_stride // unit, eps, weight_offset
    dependent = pdl(x.device)
    meta = {
        "N": n, "UNIT": unit, "NORM": norm, "ACTIVATION": activation, "GROUP": group_size or 0,
        "LARGEST": LARGEST[dtype], "SMALLEST": SMALLEST, "PDL": dependent, "launch_pdl": dependent,
    }  # fmt: skip
    whole = norm or (group_size is None and static is None)
    if whole and n > LONGEST_IN_REGISTERS:
        _quant_loop_kernel[(n_rows,)](
            *tensors, *scalars, **meta, BLOCK=16384 // x.element_size(), num_warps=16
        )
        return q, scale
    rows, block, num_warps = default_config(n_rows, n, whole, sm_count(x.device))
    grid = (cdiv(n_rows, rows) * cdiv(n, block),)
    _quant_kernel[grid](
        *tensors, n_rows, *scalars, **meta, ROWS=rows, BLOCK=block, num_warps=num_warps
    )
    return q, scale


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UnsupportedError for an 8-bit float on a GPU that has none."""
    if dtype.is_floating_point and sm(device) < 89:
        raise UnsupportedError(
            f"float8_e4m3fn activations need sm_89 or newer, {device} is sm_{sm(device)}: "
            'use int8, or keep the activations and multiply by dequant_mm(..., kind="fp8")'
        )


@op(quantize_act_reference)
def _quantize_act(
    x: Tensor, dtype: torch.dtype, group_size: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _launch(x, x.shape[-1], dtype, group_size, scale)


@op(rms_norm_quant_reference)
def _rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    return _launch(x, n, dtype, group_size, scale, weight, eps, weight_offset, norm=True)


@op(gated_quant_reference)
def _gated_quant(
    x: Tensor,
    dtype: torch.dtype,
    activation: str,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _launch(x, x.shape[-1] // 2, dtype, group_size, scale, activation=activation)


def _check(x: Tensor, dtype: torch.dtype, group_size: int | None, scale: Tensor | None) -> None:
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to quantize, got shape {tuple(x.shape)}")
    if dtype not in LARGEST:
        raise TypeError(f"dtype must be torch.float8_e4m3fn or torch.int8, got {dtype}")
    if group_size not in (None, GROUP):
        raise ValueError(f"group_size must be None or {GROUP}, got {group_size}")
    if scale is not None:
        if group_size is not None:
            raise ValueError("a static scale is for whole tensors: group_size must be None")
        check_dtype("scale", scale, torch.float32)
        check_device("scale", scale, x.device)
        if scale.numel() != 1:
            raise ValueError(f"scale must have 1 element, got shape {tuple(scale.shape)}")


def quantize_act(
    x: Tensor, dtype: torch.dtype, *, group_size: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `x` [..., K] in `dtype` and its float32 scale; x ≈ q · scale.

    `dtype` is torch.float8_e4m3fn or torch.int8. The scale is [..., 1], or with `group_size` 128
    [..., ceil(K / 128)], one for each block of a row. A `scale` given (float32, 1 element) is used
    instead and returned as [..., 1]. `x` is float32, float16 or bfloat16 and may be a strided view.
    Raises TypeError or ValueError naming the argument that does not fit, and UnsupportedError for
    float8 on a GPU below sm_89.
    """
    _check(x, dtype, group_size, scale)
    return _quantize_act(x, dtype, group_size, scale)


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_act` of `rms_norm(x, weight, eps)` [..., K], which is not rounded in between.

    The factor is `weight_offset + weight` [K]; None means no factor. Raises as `quantize_act` does.
    """
    _check(x, dtype, group_size, scale)
    if weight is not None:
        check_dtype("weight", weight, *FLOATS)
        check_shape("weight", weight, x.shape[-1])
        check_device("weight", weight, x.device)
        check_last_dim_contiguous("weight", weight)
    return _rms_norm_quant(x, weight, dtype, eps, weight_offset, group_size, scale)


def gated_quant(
    x: Tensor,
    dtype: torch.dtype,
    activation: str,
    *,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_act` of act(gate) · up [..., I] of `x` [..., 2I] = [gate, up], not rounded in between.

    `activation` is "silu", "gelu" or "gelu_tanh". Raises as `quantize_act` does, and ValueError for
    an odd last dimension or another activation.
    """
    _check(x, dtype, group_size, scale)
    if x.shape[-1] % 2 != 0:
        raise ValueError(f"x must have an even last dimension, got shape {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return _gated_quant(x, dtype, activation, group_size, scale)
