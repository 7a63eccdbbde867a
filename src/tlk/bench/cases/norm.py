"""Norms of Llama-3.1, Qwen3 and its query heads, DeepSeek-V3, FLUX.1 and SD3.5, and every other width that has its own configuration."""

import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms(total, weight), total


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rms_case(t: int, n: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(n)

    return Case(
        "rms_norm", f"T{t}-N{n}", inputs, rms_norm, lambda size: (2 * t + 1) * n * size,
        rms_norm_reference, peers={"torch": _rms}, gate=gate,
    )  # fmt: skip


def _heads_case(t: int, heads: int, d: int, width: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, width)[:, : heads * d].view(t, heads, d), new.randn(d)

    return Case(
        "rms_norm", f"T{t}-H{heads}-D{d}", inputs, rms_norm,
        lambda size: (2 * t * heads + 1) * d * size, rms_norm_reference, peers={"torch": _rms},
    )  # fmt: skip


def _add_case(t: int, n: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(t, n), new.randn(n)

    return Case(
        "add_rms_norm", f"T{t}-N{n}", inputs, add_rms_norm, lambda size: (4 * t + 1) * n * size,
        add_rms_norm_reference, peers={"torch": _add_rms}, gate=gate,
    )  # fmt: skip


def _layer_case(t: int, n: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(n), new.randn(n)

    return Case(
        "layer_norm", f"T{t}-N{n}", inputs, layer_norm, lambda size: (2 * t + 2) * n * size,
        layer_norm_reference, peers={"torch": _layer}, gate=gate,
    )  # fmt: skip


TOKENS = (1, 16, 128, 8192)
WIDTHS = (1024, 2048, 5120, 14336, 18432)
HIDDEN = (2048, 7168, 8192)  # Qwen3-30B-A3B, DeepSeek-V3, Llama-3.1-70B

CASES: tuple[Case, ...] = (
    *(_rms_case(t, 4096) for t in TOKENS),
    *(_rms_case(4096, n) for n in WIDTHS),
    *(_heads_case(t, 32, 128, 6144) for t in TOKENS),
    *(_add_case(t, 4096) for t in TOKENS),
    *(_add_case(4096, n) for n in WIDTHS),
    *(_layer_case(t, 4096) for t in TOKENS),
    *(_layer_case(4096, n) for n in WIDTHS),
    *(_rms_case(t, n, gate=False) for t in (1, 128, 8192) for n in HIDDEN),
    *(_add_case(t, n, gate=False) for t in (1, 128, 8192) for n in HIDDEN),
    _layer_case(4608, 3072, gate=False),  # FLUX.1
    _layer_case(8858, 2432, gate=False),  # SD3.5 large, two images
)
