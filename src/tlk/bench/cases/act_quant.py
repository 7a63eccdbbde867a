"""What is quantized in a layer of Llama-3.1-8B, for one token up to a prefill; DeepSeek-V3's blocks."""

from functools import partial

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.act_quant import (
    LARGEST,
    gated_quant,
    gated_quant_reference,
    quantize_act,
    quantize_act_reference,
    rms_norm_quant,
    rms_norm_quant_reference,
)
from tlk.kernels.activation import silu_and_mul
from tlk.kernels.norm import rms_norm

FP8, INT8 = torch.float8_e4m3fn, torch.int8
NAMES = {FP8: "fp8", INT8: "int8"}


def _torch(x: Tensor, dtype: torch.dtype, group: int | None) -> tuple[Tensor, Tensor]:
    """Scales of rows or of blocks that divide them, composed of torch's own ops."""
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST[dtype]
    q = (groups / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (q if dtype == FP8 else q.round()).to(dtype).flatten(-2), scale[..., 0]


def _name(dtype: torch.dtype, group: int | None) -> str:
    return NAMES[dtype] + ("" if group is None else f"-G{group}")


def _bytes(t: int, n: int, reads: int, group: int | None, size: int) -> int:
    scales = 4 * t * (1 if group is None else -(-n // group))
    return reads * size + t * n + scales


def _plain_case(t: int, n: int, dtype: torch.dtype, group: int | None = None) -> Case:
    return Case(
        "quantize_act", f"T{t}-N{n}-{_name(dtype, group)}", lambda new: (new.randn(t, n),),
        partial(quantize_act, dtype=dtype, group_size=group),
        lambda size: _bytes(t, n, t * n, group, size),
        partial(quantize_act_reference, dtype=dtype, group_size=group),
        peers={"torch": partial(_torch, dtype=dtype, group=group)},
        oldest=89 if dtype == FP8 else 75,
    )  # fmt: skip


def _norm_case(t: int, n: int, dtype: torch.dtype, group: int | None = None) -> Case:
    def two_kernels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_act(rms_norm(x, weight), dtype, group_size=group)

    return Case(
        "rms_norm_quant", f"T{t}-N{n}-{_name(dtype, group)}",
        lambda new: (new.randn(t, n), new.randn(n)),
        partial(rms_norm_quant, dtype=dtype, group_size=group),
        lambda size: _bytes(t, n, (t + 1) * n, group, size),
        partial(rms_norm_quant_reference, dtype=dtype, group_size=group),
        peers={"rms_norm, quantize_act": two_kernels}, oldest=89 if dtype == FP8 else 75,
    )  # fmt: skip


def _gated_case(t: int, n: int, dtype: torch.dtype, group: int | None = None) -> Case:
    def two_kernels(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_act(silu_and_mul(x), dtype, group_size=group)

    return Case(
        "gated_quant", f"T{t}-I{n}-{_name(dtype, group)}", lambda new: (new.randn(t, 2 * n),),
        partial(gated_quant, dtype=dtype, activation="silu", group_size=group),
        lambda size: _bytes(t, n, 2 * t * n, group, size),
        partial(gated_quant_reference, dtype=dtype, activation="silu", group_size=group),
        peers={"silu_and_mul, quantize_act": two_kernels}, oldest=89 if dtype == FP8 else 75,
    )  # fmt: skip


def _static_case(t: int, n: int, dtype: torch.dtype) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, Tensor]:
        return new.randn(t, n), new.tensor([0.01], dtype=torch.float32)

    return Case(
        "quantize_act", f"T{t}-N{n}-{NAMES[dtype]}-static", inputs,
        lambda x, scale: quantize_act(x, dtype, scale=scale),
        lambda size: _bytes(t, n, t * n, None, size),
        lambda x, scale: quantize_act_reference(x, dtype, scale=scale),
        oldest=89 if dtype == FP8 else 75,
    )  # fmt: skip


TOKENS = (1, 16, 8192)

CASES: tuple[Case, ...] = (
    *(_plain_case(t, 4096, dtype) for dtype in NAMES for t in TOKENS),
    *(_plain_case(t, 7168, FP8, 128) for t in TOKENS),
    *(_static_case(t, 4096, dtype) for dtype in NAMES for t in TOKENS),
    *(_norm_case(t, 4096, dtype) for dtype in NAMES for t in TOKENS),
    *(_norm_case(t, 7168, FP8, 128) for t in TOKENS),
    *(_gated_case(t, 14336, dtype) for dtype in NAMES for t in TOKENS),
    *(_gated_case(t, 18432, FP8, 128) for t in TOKENS),
    _norm_case(4096, 18432, FP8),  # rows too long for the registers
    _gated_case(4096, 28672, INT8),
)
