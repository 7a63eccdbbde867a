"""A quantized weight as the matrix it stands for.

    w(n, k) = value(code(n, k)) · scale(n, group of k)          in float32, rounded once to `dtype`

The kinds and their layouts are in _dequant.py. The reference follows the definitions of the formats and
is bit-equal to the kernel, which must not contract a product and a sum.

Cost: the packed weight is read and N·K·itemsize bytes are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import FLOATS
from tlk.kernels._dequant import (
    BLOCK,
    NESTED,
    Quantized,
    _e2m1,
    _e4m3,
    _group_scale,
    _small_int,
    as_bytes,
    check_quantized,
)
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def codes_reference(weight: Tensor, group_size: int) -> Tensor:
    """The codes of four bits [N, K], int64, of bytes that hold both halves of each group."""
    halves = weight.unflatten(1, (-1, max(group_size // 2, 1))).long()
    return torch.cat([halves & 15, halves >> 4], -1).flatten(1)


def group_scales_reference(
    scale: Tensor, global_scale: Tensor | None, nested: list[Tensor], kind: str
) -> Tensor:
    """The float32 scales [N, K/G] of a weight whose groups lie within rows."""
    if kind == "mx4":
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    if kind == "nv4":
        assert global_scale is not None
        return scale.float() * global_scale
    if nested:
        absmax, start, values, offset = nested
        block = start + torch.arange(scale.shape[1], device=scale.device, dtype=torch.int32)
        outer = absmax.gather(1, (block // NESTED).long())
        return values[0][scale.long()] * outer + offset
    return scale.float()


def dequantize_reference(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    global_scale: Tensor | None,
    nested: list[Tensor],
    kind: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    if kind == "fp8":
        if scale.shape == (weight.shape[0], 1):
            return (weight.float() * scale).to(dtype)
        n, k = weight.shape
        blocks = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
        return (weight.float() * blocks).to(dtype)
    q = weight if kind == "int8" else codes_reference(weight, group_size)
    if kind == "table4":
        assert table is not None
        values = table[0][q]
    elif kind in ("mx4", "nv4"):
        signed = torch.tensor([*E2M1, *(-v for v in E2M1)], device=weight.device)
        values = signed[q]
    else:
        values = q.float()
    scales = group_scales_reference(scale, global_scale, nested, kind)
    groups = values.unflatten(1, (scales.shape[1], values.shape[1] // scales.shape[1]))
    if kind in ("int4", "int8"):
        none = 8.0 if kind == "int4" else 0.0
        groups = groups - (none if zero is None else zero.float()[..., None])
    return (groups * scales[..., None]).flatten(1).to(dtype)


@triton.jit
def _dequantize_kernel(
    w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, absmax_ptr, start_ptr, map_ptr, offset_ptr,
    out_ptr, N, WIDTH, groups, stride_w, stride_absmax,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """ROWS × BYTES bytes of the packed weight [N, WIDTH]; GROUP is in bytes, whole rows if 0."""
    blocks = tl.cdiv(WIDTH, BYTES)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BYTES + tl.arange(0, BYTES)[None, :]
    mask = (row < N) & (column < WIDTH)
    w = tl.load(w_ptr + row * stride_w + column, mask, other=0).to(tl.int32)
    if GROUP == 0:
        group, within, size = 0, column, WIDTH
    else:
        group, within, size = column // GROUP, column % GROUP, GROUP
    if KIND == "fp8":
        scale_row = row // 128 if BLOCKS else row
        s = tl.load(scale_ptr + scale_row * groups + group, mask, other=0.0)
        out = _e4m3(w) * s
        tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask)
        return
    s = _group_scale(
        scale_ptr, map_ptr, absmax_ptr, start_ptr, offset_ptr, global_ptr,
        row, group, groups, stride_absmax, mask, KIND,
    )  # fmt: skip
    if KIND == "int8":
        z = 0.0
        if zero_ptr is not None:
            z = tl.load(zero_ptr + row * groups + group, mask, other=0).to(tl.float32)
        out = (_small_int(w + 128) - 128.0 - z) * s
        tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask)
        return
    low, high = w & 15, w >> 4
    if KIND == "table4":
        low = tl.load(table_ptr + low, mask, other=0.0)
        high = tl.load(table_ptr + high, mask, other=0.0)
    elif KIND == "int4":
        z = 8.0
        if zero_ptr is not None:
            z = _small_int(tl.load(zero_ptr + row * groups + group, mask, other=0).to(tl.int32))
        low, high = _small_int(low) - z, _small_int(high) - z
    else:
        low, high = _e2m1(low), _e2m1(high)
    at = out_ptr + row * 2 * WIDTH + group * 2 * size + within
    tl.store(at, (low * s).to(out_ptr.dtype.element_ty), mask)
    tl.store(at + size, (high * s).to(out_ptr.dtype.element_ty), mask)


def _launch(w: Quantized, out: Tensor) -> None:
    n, width = w.weight.shape
    groups = w.scale.shape[1]
    codes = 1 if w.kind in ("int8", "fp8") else 2
    absmax, start, values, offset = w.nested or (None, None, None, None)
    group = 0 if groups == 1 and not w.blocks else w.group_size // codes
    rows, block = 4, 1024
    grid = (cdiv(n, rows) * cdiv(width, block),)
    _dequantize_kernel[grid](
        as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale,
        absmax, start, values, offset, out,
        n, width, groups, w.weight.stride(0), 0 if absmax is None else absmax.stride(0),
        KIND=w.kind, GROUP=group, BLOCKS=w.blocks, ROWS=rows, BYTES=block,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@op(dequantize_reference)
def _dequantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    global_scale: Tensor | None,
    nested: list[Tensor],
    kind: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    w = Quantized(weight, scale, zero, table, global_scale, nested, kind, group_size)
    out = weight.new_empty(w.shape, dtype=dtype)
    if out.numel() > 0:
        _launch(w, out)
    return out


def dequantize_unchecked(w: Quantized, dtype: torch.dtype) -> Tensor:
    """`dequantize` of tensors that were checked."""
    return _dequantize(
        w.weight, w.scale, w.zero, w.table, w.global_scale, w.nested, w.kind, w.group_size, dtype
    )


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
    global_scale: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the matrix [N, K] in `dtype` that a quantized weight stands for.

    The tensors are those of `dequant_mm`. Products are float32, rounded once to `dtype`: float32,
    float16 or bfloat16. Raises TypeError or ValueError naming the argument that does not fit.
    """
    w = Quantized(
        weight, scale, zero, table, global_scale, list(nested or ()), kind, group_size
    )  # fmt: skip
    check_quantized(w)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return dequantize_unchecked(w, dtype)
