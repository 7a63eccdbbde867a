"""The linear layers of Llama-3.1-8B in 8 bits, for one token up to a prefill, those of other models, and square matmuls."""

from functools import partial

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.bench.cases.matmul import DEEPSEEK_V3, FLUX, LAYERS, LLAMA_70B, QWEN3_30B, SD35_LARGE
from tlk.kernels.act_quant import GROUP
from tlk.kernels.scaled_mm import scaled_mm, scaled_mm_reference

DTYPES = (torch.bfloat16, torch.float16)  # of the output
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def _codes(new: Inputs, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == INT8:
        return new.randint(-127, 128, *shape, dtype=INT8)
    return new.randn(*shape).to(FP8)


def _scales(new: Inputs, *shape: int) -> Tensor:
    """Positive, around 0.01."""
    return new.randn(*shape, dtype=torch.float32).abs().add(1).mul(0.005)


def _fp8_torch(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *_: Tensor
) -> Tensor:
    return torch._scaled_mm(x, weight.T, x_scale, weight_scale.T, out_dtype=torch.bfloat16)


def _int8_torch(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *_: Tensor
) -> Tensor:
    return (torch._int_mm(x, weight.T) * x_scale * weight_scale.T).to(torch.bfloat16)


def _case(
    m: int, n: int, k: int, dtype: torch.dtype, *, block: bool = False, epilogue: bool = False,
    backend: str | None = None, gate: bool = True,
) -> Case:  # fmt: skip
    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        x_scale = _scales(new, m, -(-k // GROUP) if block else 1)
        shape = (-(-n // GROUP), -(-k // GROUP)) if block else (n, 1)
        bias, residual = (new.randn(n), new.randn(m, n)) if epilogue else (None, None)
        x, weight = _codes(new, dtype, m, k), _codes(new, dtype, n, k)
        return x, x_scale, weight, _scales(new, *shape), bias, residual

    def run(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
        bias: Tensor | None, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return scaled_mm(
            x, x_scale, weight, weight_scale, bias=bias, residual=residual, backend=backend,
            activation="silu" if epilogue else None,
            out_dtype=torch.bfloat16 if residual is None else residual.dtype,
        )  # fmt: skip

    def reference(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
        bias: Tensor | None, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return scaled_mm_reference(
            x, x_scale, weight, weight_scale, bias, "silu" if epilogue else None, residual,
            torch.bfloat16 if residual is None else residual.dtype,
        )  # fmt: skip

    kind = "int8" if dtype == INT8 else "fp8-block" if block else "fp8"
    parts = (kind, "epilogue" if epilogue else "", backend or "")
    peers = {}
    if not (block or epilogue) and (dtype == FP8 or m > 16):
        peers["torch"] = _int8_torch if dtype == INT8 else _fp8_torch
    return Case(
        "scaled_mm", f"M{m}-N{n}-K{k}-" + "-".join(filter(None, parts)), inputs, run,
        lambda size: (m + n) * k + m * n * (1 + epilogue) * size + n * epilogue * size,
        reference, flops=2 * m * n * k, peers=peers, gate=gate,
        dtypes=DTYPES if epilogue else DTYPES[:1], oldest=75 if dtype == INT8 else 89,
    )  # fmt: skip


EVERY = (
    partial(_case, dtype=FP8),
    partial(_case, dtype=FP8, block=True),
    partial(_case, dtype=INT8),
)

CASES = (
    *(
        case(m, n, k, gate=(n, k) == LAYERS[0])
        for case in EVERY
        for m in (1, 16, 64, 256)
        for n, k in LAYERS
    ),
    *(case(m, m, m, gate=m == 4096) for case in EVERY for m in (4096, 8192)),
    *(case(m, 4096, 14336, epilogue=True) for case in EVERY for m in (1, 16, 64, 4096)),
    *(case(m, 576, 192) for case in EVERY for m in (8, 128)),
    *(case(m, 4096, 4096, backend="triton") for case in EVERY for m in (33, 512)),
    *(case(512, 4096, 4096, backend="cublas") for case in (EVERY[0], EVERY[2])),
    *(
        case(m, n, k, gate=False)
        for case, layers, rows in (
            (EVERY[0], LLAMA_70B, (1, 64, 4096)),
            (EVERY[0], QWEN3_30B, (1, 64)),
            (EVERY[1], DEEPSEEK_V3, (1, 64, 4096)),
            (EVERY[0], FLUX, (4608,)),
            (EVERY[2], FLUX, (4608,)),
            (EVERY[0], SD35_LARGE, (8858,)),
        )
        for m in rows
        for n, k in layers
    ),
)
