"""A quantized weight as the matrix it stands for.

    w(n, k) = value(code(n, k)) · scale(n, group of k)          in float32, rounded once to `dtype`

The kinds and their layouts are in _dequant.py. The reference follows the definitions of the formats and
is bit-equal to the kernel, which must not contract a product and a sum.

Cost: the packed weight is read and N·K·itemsize bytes are written.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import FLOATS
from tlk.kernels._dequant import (
    BLOCK,
    NESTED,
    Quantized,
    _values,
    as_bytes,
    check_quantized,
    run_bytes,
)
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous

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
    w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, out_ptr, N, WIDTH, groups, stride_w,
    KIND: tl.constexpr, WHOLE_ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, of each RUNS runs of bytes: those of a group, or just some where rows are whole."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    blocks = tl.cdiv(WIDTH, RUN * RUNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    run = tl.program_id(0) % blocks * RUNS + tl.arange(0, RUNS)[None, :]
    byte = run[:, :, None] * RUN + tl.arange(0, RUN)
    in_run = (row < N) & (run * RUN < WIDTH)
    mask = (row < N)[:, :, None] & (byte < WIDTH)
    w = tl.load(w_ptr + row[:, :, None] * stride_w + byte, mask, other=0).to(tl.int32)
    low, high = _values(
        w, scale_ptr, zero_ptr, table_ptr, global_ptr, row, run, in_run, groups,
        KIND, WHOLE_ROWS, BLOCKS,
    )  # fmt: skip
    row, run = row[:, :, None], run[:, :, None]
    if KIND == "int8" or KIND == "fp8":
        tl.store(out_ptr + row * WIDTH + byte, low.to(DTYPE), mask)
    else:
        at = out_ptr + row * 2 * WIDTH + (byte if WHOLE_ROWS else byte + run * RUN)
        tl.store(at, low.to(DTYPE), mask)
        tl.store(at + (WIDTH if WHOLE_ROWS else RUN), high.to(DTYPE), mask)


def _launch(w: Quantized, out: Tensor) -> None:
    n, width = w.weight.shape
    run = run_bytes(w)
    runs, rows = max(1024 // run, 1), 4
    grid = (cdiv(n, rows) * cdiv(width, run * runs),)
    _dequantize_kernel[grid](
        as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale, out,
        n, width, w.scale.shape[1], w.weight.stride(0), w.kind, w.whole_rows, w.blocks,
        ROWS=rows, RUN=run, RUNS=runs, num_warps=8,
    )  # fmt: skip


@triton.jit
def _unnest_kernel(
    code_ptr, absmax_ptr, start_ptr, map_ptr, offset_ptr, out_ptr, N, groups, stride_absmax,
    PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scales of ROWS rows, BLOCK ≤ 256 of each: map[code] · absmax of 256 of them + offset."""
    allow_next(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(start_ptr + row, row < N, other=0)
    offset = tl.load(offset_ptr + row, row < N, other=0.0)
    # so few scales lie in one block, or in one and the next
    first = (start + tl.program_id(1) * BLOCK) // 256
    last = (start + tl.minimum(tl.program_id(1) * BLOCK + BLOCK, groups) - 1) // 256
    low = tl.load(absmax_ptr + row * stride_absmax + first, row < N, other=0.0)
    high = tl.load(absmax_ptr + row * stride_absmax + last, row < N, other=0.0)
    block = (start[:, None] + group[None, :]) // 256
    absmax = tl.where(block == first[:, None], low[:, None], high[:, None])
    mask = (row < N)[:, None] & (group < groups)[None, :]
    at = row[:, None] * groups + group[None, :]
    code = tl.load(code_ptr + at, mask, other=0).to(tl.int32)
    values = tl.load(map_ptr + tl.arange(0, 256))
    inner = tl.reshape(tl.gather(values, tl.reshape(code, (ROWS * BLOCK,)), 0), (ROWS, BLOCK))
    wait_for_previous(PDL)
    tl.store(out_ptr + at, inner * absmax + offset[:, None], mask)


def unnested(w: Quantized) -> Quantized:
    """`w` with float32 scales, where its own are nested: written by a kernel of N·K/G elements."""
    if not w.nested:
        return w
    n, groups = w.scale.shape
    scale = torch.empty(n, groups, device=w.scale.device)
    absmax, start, values, offset = w.nested
    dependent = pdl(w.scale.device)
    block = min(next_power_of_2(groups), 64)
    rows = 2048 // block
    _unnest_kernel[(cdiv(n, rows), cdiv(groups, block))](
        w.scale, absmax, start, values, offset, scale, n, groups, absmax.stride(0), dependent, rows,
        block, num_warps=4, enable_fp_fusion=False, launch_pdl=dependent,
    )  # fmt: skip
    return replace(w, scale=scale, nested=[])


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
        _launch(unnested(w), out)
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
