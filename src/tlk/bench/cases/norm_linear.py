"""The linear layers of Llama-3.1-8B and 70B and Qwen3 that follow a norm, for one token up to a prefill."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.matmul import matmul
from tlk.kernels.norm import rms_norm
from tlk.kernels.norm_linear import norm_linear, norm_linear_reference

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def _torch(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, 1e-6), weight)


def _two_kernels(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
    return matmul(rms_norm(x, norm_weight), weight)


def _case(
    m: int, n: int, k: int, dtypes: tuple[torch.dtype, ...] = HALVES, gate: bool = True
) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(m, k), new.randn(k), new.randn(n, k)

    return Case(
        "norm_linear",
        f"M{m}-N{n}-K{k}",
        inputs,
        norm_linear,
        lambda size: (m * k + k + n * k + m * n) * size,
        norm_linear_reference,
        flops=2 * m * n * k,
        peers={"torch": _torch, "rms_norm, matmul": _two_kernels},
        dtypes=dtypes,
        gate=gate,
    )


CASES = (
    *(_case(m, n, 4096) for m in (1, 16, 128, 4096) for n in (6144, 28672)),
    *(_case(m, 128256, 4096) for m in (1, 16)),  # logits
    *(_case(m, 1024, 4096) for m in (1, 16)),
    *(_case(m, 4096, 4096, FLOATS) for m in (1, 2, 4, 8)),
    *(_case(m, 10240, 8192, gate=False) for m in (1, 64)),  # Llama-3.1-70B
    *(_case(m, 5120, 2048, gate=False) for m in (1, 64)),  # Qwen3-30B-A3B
)
