"""One block of GPTQ's columns: round a column, spread its error over the columns to come, go on.

    q_c = decode(code_c),   code_c = nearest point of the grid to w_c
    e_c = (w_c − q_c) / U_cc
    w_j ← w_j − e_c · U_cj     for j > c

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323, whose inverse of the Hessian is UᵀU with U upper triangular.

Rows do not depend on each other, columns do: a program keeps ROWS rows of the block in registers and
walks over its columns, each warp on rows of its own, so that a step is a few shuffles and no barrier.
In PyTorch a step takes some eight launches; the 38,912 steps of a Llama-3.1-8B layer then cost seconds.
Moved are 17 bytes a weight and the block of U, which stays in the caches; the time is that of a chain of
128 dependent steps.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tlk.kernels._check import check_device, check_dtype, check_last_dim_contiguous, check_shape
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op

Grid = Literal["int", "e2m1"]
BLOCK = 128  # columns
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_reference(x: Tensor, zero: Tensor | None, grid: str, top: int) -> Tensor:
    """The codes, in float32, of `x` in units of the scale: the nearest points of the grid.

    "int": round(x) + zero (None: 0), halves to even, from 0 to `top`. "e2m1": the codes 0 to 7 of magnitudes in
    E2M1, halves to the even code, and 8 more for what is negative and not 0.
    """
    if grid == "int":
        return (x.round() + (0 if zero is None else zero)).clamp(0, top)
    bounds = torch.tensor([0.25, 1.25, 2.5, 5.0], device=x.device)  # a tie goes down
    ties_up = torch.tensor([0.75, 1.75, 3.5], device=x.device)
    a = x.abs()[..., None]
    code = ((a > bounds).sum(-1) + (a >= ties_up).sum(-1)).float()
    return code + 8.0 * ((x < 0) & (code > 0))


def decode_reference(codes: Tensor, zero: Tensor | None, grid: str) -> Tensor:
    """What float32 `codes` stand for, in units of the scale."""
    if grid == "int":
        return codes - (0 if zero is None else zero)
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
    return values[codes.long()]


def gptq_block_reference(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None, grid: str, top: int
) -> tuple[Tensor, Tensor]:
    w, codes = w.clone(), torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    errors = torch.empty_like(w, memory_format=torch.contiguous_format)
    for c in range(w.shape[1]):
        s = scale[:, c]
        z = None if zero is None else zero[:, c]
        code = encode_reference(w[:, c] / s, z, grid, top)
        e = (w[:, c] - decode_reference(code, z, grid) * s) / u[c, c]
        w[:, c + 1 :] -= e[:, None] * u[c, c + 1 :]
        codes[:, c], errors[:, c] = code.to(torch.uint8), e
    return codes, errors


def _fake(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None, grid: str, top: int
) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape)


@triton.jit
def _e2m1(x):
    """The code of `x` and its value. Halves go to the even code: 0.25 down, 0.75 up, and so on."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32)
    code += (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    # 0, .5, 1, 1.5 and from there a mantissa of one bit: 2, 3, 4, 6
    value = tl.where(code < 4, code * 0.5, (2 + (code & 1)) * (1 << tl.maximum(code - 4, 0) // 2))
    negative = (x < 0) & (code > 0)
    return tl.where(negative, code + 8, code), tl.where(negative, -value, value)


@triton.jit
def _gptq_block_kernel(
    w_ptr, u_ptr, scale_ptr, zero_ptr, codes_ptr, errors_ptr,
    w_stride, u_stride, n_rows, n_cols, top,
    INT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    mask = (rows < n_rows)[:, None] & inside[None, :]
    at = rows[:, None] * n_cols + cols[None, :]
    w = tl.load(w_ptr + rows[:, None] * w_stride + cols[None, :], mask, other=0.0)
    scale = tl.load(scale_ptr + at, mask, other=1.0)
    if INT:
        zero = tl.load(zero_ptr + at, mask, other=0.0)
    codes = tl.zeros([ROWS, BLOCK], tl.int32)
    errors = tl.zeros([ROWS, BLOCK], tl.float32)
    for c in range(n_cols):
        here = cols[None, :] == c
        u = tl.load(u_ptr + c * u_stride + cols, inside, other=0.0)
        diagonal = tl.load(u_ptr + c * u_stride + c)
        x = tl.sum(tl.where(here, w, 0.0), 1)
        s = tl.sum(tl.where(here, scale, 0.0), 1)
        if INT:
            z = tl.sum(tl.where(here, zero, 0.0), 1)
            level = tl.clamp(libdevice.rint(tl.div_rn(x, s)) + z, 0.0, top)
            code, value = level.to(tl.int32), level - z
        else:
            code, value = _e2m1(tl.div_rn(x, s))
        e = tl.div_rn(x - value * s, diagonal)
        w -= e[:, None] * u[None, :]  # columns up to c are not read again
        codes = tl.where(here, code[:, None], codes)
        errors = tl.where(here, e[:, None], errors)
    tl.store(codes_ptr + at, codes.to(tl.uint8), mask)
    tl.store(errors_ptr + at, errors, mask)


@op(gptq_block_reference, fake=_fake)
def _gptq_block(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None, grid: str, top: int
) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = w.shape
    codes = torch.empty(n_rows, n_cols, dtype=torch.uint8, device=w.device)
    errors = torch.empty(n_rows, n_cols, dtype=torch.float32, device=w.device)
    rows = 8
    if codes.numel():
        _gptq_block_kernel[(cdiv(n_rows, rows),)](
            w, u, scale, scale if zero is None else zero, codes, errors,
            w.stride(0), u.stride(0), n_rows, n_cols, float(top),
            INT=grid == "int", ROWS=rows, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return codes, errors


def gptq_block(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    grid: Grid = "int",
    top: int = 15,
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of `w` [N, B ≤ 128] in order, each with the errors of those before it.

    u [B, B]: the diagonal block of the upper factor of the inverse Hessian; what lies below its
    diagonal does not matter. scale [N, B] and, of the grid "int", zero [N, B]: of every weight, so that
    neighbours may be of any groups. All are float32, rows of `w` and `u` may be strided. `grid`: "int"
    with codes from 0 to `top`, whose values are (code − zero) · scale; or "e2m1", which knows no zero.

    Returns (codes [N, B] uint8, errors [N, B] float32): `errors @ u[:B, B:]` is what the columns after
    the block change by. `w` is left as it is.

    Raises TypeError for other dtypes and ValueError for other shapes, devices, strides or grids.
    """
    check_shape("w", w, None, None)
    n_rows, n_cols = w.shape
    if n_cols > BLOCK:
        raise ValueError(f"w must have at most {BLOCK} columns, got {n_cols}")
    if grid not in ("int", "e2m1"):
        raise ValueError(f"grid must be 'int' or 'e2m1', got {grid!r}")
    if (zero is None) != (grid == "e2m1"):
        raise ValueError(f"zero must be {'a tensor' if zero is None else 'None'} for grid {grid!r}")
    if not 0 < top < 256:
        raise ValueError(f"top must be in 1..255, got {top}")
    check_shape("u", u, n_cols, n_cols)
    for name, tensor in (("w", w), ("u", u), ("scale", scale), ("zero", zero)):
        if tensor is not None:
            check_dtype(name, tensor, torch.float32)
            check_device(name, tensor, w.device)
            check_last_dim_contiguous(name, tensor)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None:
            check_shape(name, tensor, n_rows, n_cols)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return _gptq_block(w, u, scale, zero, grid, top)
