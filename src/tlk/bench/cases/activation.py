"""Activations of the MLPs of Llama-3.1 and DeepSeek-V3 (silu), Gemma (gelu) and Nemotron (relu squared)."""

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.activation import (
    gelu_and_mul,
    gelu_and_mul_reference,
    relu_squared,
    relu_squared_reference,
    silu_and_mul,
    silu_and_mul_reference,
)


def _silu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _gelu(x: Tensor, approximate: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate=approximate) * up


def _silu_case(t: int, width: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return (new.randn(t, 2 * width),)

    return Case(
        "silu_and_mul", f"T{t}-I{width}", inputs, silu_and_mul,
        lambda size: 3 * t * width * size, silu_and_mul_reference, peers={"torch": _silu},
        gate=gate,
    )  # fmt: skip


def _gelu_case(t: int, width: int, approximate: Literal["none", "tanh"]) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return (new.randn(t, 2 * width),)

    return Case(
        "gelu_and_mul", f"T{t}-I{width}-{approximate}", inputs,
        partial(gelu_and_mul, approximate=approximate), lambda size: 3 * t * width * size,
        partial(gelu_and_mul_reference, approximate=approximate),
        peers={"torch": partial(_gelu, approximate=approximate)},
        options={"approximate": approximate},
    )  # fmt: skip


def _relu_case(t: int, n: int) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return (new.randn(t, n),)

    return Case(
        "relu_squared", f"T{t}-N{n}", inputs, relu_squared,
        lambda size: 2 * t * n * size, relu_squared_reference,
        peers={"torch": lambda x: F.relu(x).square()},
    )  # fmt: skip


APPROXIMATE: tuple[Literal["none", "tanh"], ...] = ("none", "tanh")

CASES: tuple[Case, ...] = (
    *(_silu_case(t, 14336) for t in (1, 16, 128, 8192)),
    # Llama-3.1-70B, the dense layers and the shared expert of DeepSeek-V3
    *(_silu_case(t, n, gate=False) for t in (1, 128, 8192) for n in (28672, 18432, 2048)),
    *(_gelu_case(t, 14336, a) for t in (1, 8192) for a in APPROXIMATE),
    *(_relu_case(t, 16384) for t in (1, 128, 8192)),
)
