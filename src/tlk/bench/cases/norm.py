"""Norms of Llama-3.1-8B, the query heads of Qwen3, and rows of every size that has its own configuration."""

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


def _rms_case(t: int, n: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(n)

    return Case(
        "rms_norm", f"T{t}-N{n}", inputs, rms_norm, lambda size: (2 * t + 1) * n * size,
        rms_norm_reference, peers={"torch": _rms},
    )  # fmt: skip


def _heads_case(t: int, heads: int, d: int, width: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, width)[:, : heads * d].view(t, heads, d), new.randn(d)

    return Case(
        "rms_norm", f"T{t}-H{heads}-D{d}", inputs, rms_norm,
        lambda size: (2 * t * heads + 1) * d * size, rms_norm_reference, peers={"torch": _rms},
    )  # fmt: skip


def _add_case(t: int, n: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(t, n), new.randn(n)

    return Case(
        "add_rms_norm", f"T{t}-N{n}", inputs, add_rms_norm, lambda size: (4 * t + 1) * n * size,
        add_rms_norm_reference, peers={"torch": _add_rms},
    )  # fmt: skip


def _layer_case(t: int, n: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(t, n), new.randn(n), new.randn(n)

    return Case(
        "layer_norm", f"T{t}-N{n}", inputs, layer_norm, lambda size: (2 * t + 2) * n * size,
        layer_norm_reference, peers={"torch": _layer},
    )  # fmt: skip


TOKENS = (1, 16, 128, 8192)
WIDTHS = (1024, 2048, 5120, 14336, 18432)

CASES: tuple[Case, ...] = (
    *(_rms_case(t, 4096) for t in TOKENS),
    *(_rms_case(4096, n) for n in WIDTHS),
    *(_heads_case(t, 32, 128, 6144) for t in TOKENS),
    *(_add_case(t, 4096) for t in TOKENS),
    *(_add_case(4096, n) for n in WIDTHS),
    *(_layer_case(t, 4096) for t in TOKENS),
    *(_layer_case(4096, n) for n in WIDTHS),
)
