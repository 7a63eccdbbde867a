"""The linear layers of Llama-3.1-8B with their epilogues, for one token up to a prefill, and those of other models."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.matmul import matmul, matmul_add_, matmul_reference

LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # outputs, inputs
LLAMA_70B = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))
QWEN3_30B = ((5120, 2048), (2048, 4096))
DEEPSEEK_V3 = (
    *((1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)),
    *((36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048)),
)
FLUX = ((9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
SD35_LARGE = ((7296, 2432), (9728, 2432), (2432, 9728))
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def _case(
    m: int,
    n: int,
    k: int,
    *,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
    backend: str | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    gate: bool = True,
) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        b, r = new.randn(n) if bias else None, new.randn(m, n) if residual else None
        return new.randn(m, k), new.randn(n, k), b, r

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return matmul(
            x, weight, bias, activation=activation, residual=residual, backend=backend
        )  # fmt: skip

    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return matmul_reference(x, weight, bias, activation, residual)

    extras = ("bias" if bias else None, activation, "residual" if residual else None, backend)
    return Case(
        "matmul",
        "-".join([f"M{m}-N{n}-K{k}", *filter(None, extras)]),
        inputs,
        run,
        lambda size: (m * k + n * k + m * n * (1 + residual) + n * bias) * size,
        reference,
        flops=2 * m * n * k,
        peers={"torch": partial(_torch, activation)},
        dtypes=dtypes,
        gate=gate,
    )


def _in_place_case(m: int, n: int, k: int) -> Case:
    """Before the residual stream of a decoder, which takes the sum."""

    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return new.randn(m, n), new.randn(m, k), new.randn(n, k)

    def reference(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return matmul_reference(x, weight, residual=residual)

    def copied(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(residual, x, weight.T)

    return Case(
        "matmul_add_",
        f"M{m}-N{n}-K{k}",
        inputs,
        matmul_add_,
        lambda size: (m * k + n * k + 2 * m * n) * size,
        reference,
        flops=2 * m * n * k,
        peers={"torch": copied},
        dtypes=HALVES,
    )


def _torch(
    activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": lambda y: F.relu(y).square(),
}

CASES = (
    *(_case(m, n, k, dtypes=HALVES) for m in (1, 16, 32, 64, 128, 4096) for n, k in LAYERS),
    *(_case(m, 128256, 4096, dtypes=HALVES) for m in (1, 16)),  # logits
    _case(32, 128256, 4096, dtypes=HALVES, gate=False),
    *(_case(m, 4096, 14336, residual=True, dtypes=HALVES) for m in (1, 16, 4096)),
    *(_in_place_case(m, n, k) for m in (1, 128, 4096) for n, k in LAYERS if n == 4096),
    *(_case(m, 1024, 4096, dtypes=HALVES) for m in (1, 2, 16)),
    *(_case(m, 6144, 4096, bias=True, dtypes=HALVES) for m in (1, 16)),  # Qwen2's qkv
    *(
        _case(m, 14336, 4096, bias=True, activation=act, residual=True)
        for m, act in ((1, "silu"), (16, "gelu"), (128, "gelu_tanh"), (1, "relu_squared"))
    ),
    *(_case(m, 4096, 4096) for m in (2, 4, 8)),
    _case(4096, 4096, 4096, backend="triton"),
    _case(512, 14336, 4096, bias=True, activation="gelu", residual=True, backend="triton"),
    *(
        _case(m, n, k, dtypes=HALVES, gate=False)
        for layers, rows in (
            (LAYERS, (256,)),
            (LLAMA_70B, (1, 64, 4096)),
            (QWEN3_30B, (1, 64)),
            (DEEPSEEK_V3, (1, 64)),
            (FLUX, (4608,)),
            (SD35_LARGE, (8858,)),
            (((8192, 8192),), (8192,)),
        )
        for m in rows
        for n, k in layers
    ),
)
