"""The gate and up projections of Llama-3.1-8B with their activation, for one token up to a prefill, and of larger models."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.activation import silu_and_mul
from tlk.kernels.gated_linear import gated_linear, gated_linear_reference
from tlk.kernels.norm_linear import norm_linear

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def _torch(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
    h = F.rms_norm(x, norm_weight.shape, norm_weight, 1e-6)
    gate, up = F.linear(h, weight).chunk(2, -1)
    return F.silu(gate) * up


def _two_ops(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
    return silu_and_mul(norm_linear(x, norm_weight, weight))


def _case(
    m: int, size: int, k: int, dtypes: tuple[torch.dtype, ...] = HALVES, gate: bool = True
) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(m, k), new.randn(2 * size, k), new.randn(k)

    def run(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        return gated_linear(x, weight, activation="silu", norm_weight=norm_weight)

    def reference(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        return gated_linear_reference(x, weight, None, "silu", norm_weight)

    return Case(
        "gated_linear",
        f"M{m}-I{size}-K{k}",
        inputs,
        run,
        lambda nbytes: (m * k + k + 2 * size * k + m * size) * nbytes,
        reference,
        flops=4 * m * size * k,
        peers={"torch": _torch, "norm_linear, silu_and_mul": _two_ops},
        dtypes=dtypes,
        gate=gate,
    )


def _biased_case(m: int, activation: str) -> Case:
    """No norm before it, as behind a LayerNorm."""
    size, k = 4096, 4096

    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(m, k), new.randn(2 * size, k), new.randn(2 * size)

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gated_linear_reference(x, weight, bias, activation)

    return Case(
        "gated_linear",
        f"M{m}-I{size}-K{k}-bias-{activation}",
        inputs,
        partial(gated_linear, activation=activation),
        lambda nbytes: (m * k + 2 * size * k + m * size + 2 * size) * nbytes,
        reference,
        flops=4 * m * size * k,
        dtypes=FLOATS,
    )


CASES = (
    *(_case(m, 14336, 4096) for m in (1, 2, 4, 8, 16, 32, 64, 128, 4096)),
    *(_case(m, 512, 2048, FLOATS) for m in (1, 4, 16)),
    *(_case(m, 28672, 8192, gate=False) for m in (1, 64)),  # Llama-3.1-70B
    *(_case(m, n, 7168, gate=False) for m in (1, 64) for n in (18432, 2048)),  # DeepSeek-V3
    *(_biased_case(m, activation) for m, activation in ((1, "gelu"), (4, "gelu_tanh"))),
)
