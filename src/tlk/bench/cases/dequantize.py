"""A projection of Llama-3.1-8B made whole again from each kind of quantized weight."""

from typing import Any

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.bench.cases.dequant_mm import options_of, weight, weight_bytes
from tlk.kernels.dequantize import dequantize, dequantize_reference


def _case(variant: str, n: int, k: int) -> Case:
    def inputs(new: Inputs) -> tuple[Any, ...]:
        return new.dtype, *weight(new, variant, n, k)

    def run(dtype: torch.dtype, *stored: Any) -> Tensor:
        options = options_of(stored) | {"nested": tuple(stored[5]) or None}
        return dequantize(stored[0], stored[1], dtype=dtype, **options)

    def reference(dtype: torch.dtype, *stored: Any) -> Tensor:
        return dequantize_reference(stored[0], stored[1], dtype=dtype, **options_of(stored))

    return Case(
        "dequantize",
        f"{variant}-N{n}-K{k}",
        inputs,
        run,
        lambda size: weight_bytes(variant, n, k, size) + n * k * size,
        reference,
    )


CASES = tuple(
    _case(v, 6144, 4096)
    for v in ("int4", "int4-channel", "int8", "nf4-nested", "mx4", "nv4", "fp8-block")
)
