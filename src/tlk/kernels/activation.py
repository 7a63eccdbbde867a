"""Activations between the two matmuls of an MLP.

    silu_and_mul   y = g / (1 + exp(−g)) · u                      x = [g, u]
    gelu_and_mul   y = g · Φ(g) · u                               x = [g, u]
    relu_squared   y = max(x, 0)²

Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202
Hendrycks & Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415
So et al., "Primer: Searching for Efficient Transformers", https://arxiv.org/abs/2109.08668

Every element is read once and every result written once: 3·T·I·itemsize bytes for the gated
ones, 2·numel·itemsize for relu_squared. The float32 result is rounded once.
"""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import FLOATS, check_dtype
from tlk.kernels._device import sm_count
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels._rows import as_rows


def silu_and_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.contiguous().float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_and_mul_reference(x: Tensor, approximate: str = "none") -> Tensor:
    gate, up = x.contiguous().float().chunk(2, -1)
    return (F.gelu(gate, approximate=approximate) * up).to(x.dtype)


def relu_squared_reference(x: Tensor) -> Tensor:
    return F.relu(x.contiguous().float()).square().to(x.dtype)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # 0.5 · (1 + tanh(t)) = 1 / (1 + exp(−2t)), which overflows to the right limits
    t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * t))


@triton.jit
def _gated_kernel(
    x_ptr, y_ptr, row_stride, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x_ptr += row * row_stride
    gate = tl.load(x_ptr + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + WIDTH + cols, mask, other=0.0).to(tl.float32)
    y = _activate(gate, ACTIVATION) * up
    tl.store(y_ptr + row * WIDTH + cols, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _relu_squared_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    allow_next(PDL)
    wait_for_previous(PDL)
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + cols, cols < n, other=0.0).to(tl.float32), 0.0)
    tl.store(y_ptr + cols, (x * x).to(y_ptr.dtype.element_ty), cols < n)


def default_config(n: int, sm_count: int) -> tuple[int, int]:
    """Elements per program and warps: small tiles until every SM has four, then twice the work."""
    return (512, 2) if n <= 4 * 512 * sm_count else (2048, 4)


def _gated(x: Tensor, activation: str) -> Tensor:
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, inner, row_stride, _ = as_rows(x)
    if inner > 1:
        x, row_stride = x.contiguous(), 2 * width
    block, num_warps = default_config(y.numel(), sm_count(x.device))
    dependent = pdl(x.device)
    _gated_kernel[(y.numel() // width * cdiv(width, block),)](
        x, y, row_stride, WIDTH=width, ACTIVATION=activation, BLOCK=block, PDL=dependent,
        num_warps=num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return y


@op(silu_and_mul_reference)
def _silu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, "silu")


@op(gelu_and_mul_reference)
def _gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    return _gated(x, "gelu" if approximate == "none" else "gelu_tanh")


@op(relu_squared_reference)
def _relu_squared(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        block, num_warps = default_config(y.numel(), sm_count(x.device))
        dependent = pdl(x.device)
        _relu_squared_kernel[(cdiv(y.numel(), block),)](
            x.contiguous(), y, y.numel(), BLOCK=block, PDL=dependent,
            num_warps=num_warps, launch_pdl=dependent,
        )  # fmt: skip
    return y


def _check_halves(x: Tensor) -> None:
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x must have an even last dimension, got shape {tuple(x.shape)}")


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up of `x` [..., 2I] = [gate, up], as [..., I] in the dtype of `x`.

    Raises TypeError unless `x` is float32, float16 or bfloat16, ValueError if 2I is odd.
    """
    _check_halves(x)
    return _silu_and_mul(x)


def gelu_and_mul(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """gelu(gate) · up of `x` [..., 2I] = [gate, up], as [..., I] in the dtype of `x`.

    `approximate` is "none" (by the error function) or "tanh". Raises as `silu_and_mul` does, and
    ValueError for another `approximate`.
    """
    _check_halves(x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    return _gelu_and_mul(x, approximate)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² of `x` [...], contiguous and in the dtype of `x`.

    Raises TypeError unless `x` is float32, float16 or bfloat16.
    """
    check_dtype("x", x, *FLOATS)
    return _relu_squared(x)
