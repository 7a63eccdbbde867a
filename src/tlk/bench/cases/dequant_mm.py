"""Linear layers with quantized weights: Llama-3.1-8B's for one token up to a prefill, and other models'."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.bench.cases.matmul import FLUX, LAYERS, LLAMA_70B, QWEN3_30B, SD35_LARGE
from tlk.kernels.dequant_mm import dequant_mm, dequant_mm_reference
from tlk.quant.table4 import NF4

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)

# Name of a variant: its kind, its group size (0: whole rows), and whether it stores zero points.
VARIANTS: dict[str, tuple[str, int, bool]] = {
    "int4": ("int4", 128, False),
    "int4-g32": ("int4", 32, False),
    "int4-g64": ("int4", 64, False),
    "int4-channel": ("int4", 0, False),
    "int4-asymmetric": ("int4", 128, True),
    "int8": ("int8", 0, False),
    "int8-g128": ("int8", 128, False),
    "int8-asymmetric": ("int8", 128, True),
    "nf4": ("table4", 64, False),
    "nf4-nested": ("table4", 64, False),
    "mx4": ("mx4", 32, False),
    "nv4": ("nv4", 16, False),
    "fp8": ("fp8", 0, False),
    "fp8-block": ("fp8", 128, False),
}


def weight(new: Inputs, variant: str, n: int, k: int) -> list[Any]:
    """weight, scale, zero, table, global_scale, nested, kind and group size of a random [n, k]."""
    kind, group, asymmetric = VARIANTS[variant]
    group = group or k
    groups = n, k // group
    table = global_scale = zero = None
    nested: list[Tensor] = []
    codes = new.randint(0, 256, n, k if kind in ("int8", "fp8") else k // 2, dtype=torch.uint8)
    scale = new.randn(*groups) * (1 if new.empty else 0.01)
    if asymmetric:
        zero = new.randint(0, 16, *groups, dtype=torch.int8 if kind == "int8" else torch.uint8)
    if kind == "table4":
        table = NF4.table(new.device)
        scale = scale.float()
        if variant.endswith("nested"):
            scale = new.randint(0, 256, *groups, dtype=torch.uint8)
            nested = [
                new.randn(n, k // group // 256 + 2, dtype=torch.float32),
                new.randint(0, 256, n, 1),
                new.randn(1, 256, dtype=torch.float32),
                new.randn(n, 1, dtype=torch.float32),
            ]
    elif kind == "mx4":
        scale = new.randint(110, 125, *groups, dtype=torch.uint8)
    elif kind == "nv4":
        scale = new.randint(30, 80, *groups, dtype=torch.uint8).view(torch.float8_e4m3fn)
        global_scale = new.randn(n, 1, dtype=torch.float32)
    elif kind == "fp8":
        codes = new.randint(0, 127, n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
        shape = (n, 1) if group == k else (-(-n // 128), -(-k // 128))
        scale = new.randn(*shape, dtype=torch.float32)
    elif kind == "int8":
        codes = codes.view(torch.int8)
    return [codes, scale, zero, table, global_scale, nested, kind, group]


def weight_bytes(variant: str, n: int, k: int, itemsize: int) -> int:
    kind, group, asymmetric = VARIANTS[variant]
    codes = n * k // (1 if kind in ("int8", "fp8") else 2)
    scale = {"table4": 4, "mx4": 1, "nv4": 1, "fp8": 4}.get(kind, itemsize) + asymmetric
    return codes + n * (k // (group or k)) * scale


def options_of(stored: tuple[Any, ...]) -> dict[str, Any]:
    """What `weight` returned, without the codes and their scale, as the functions' keywords."""
    _, _, zero, table, global_scale, nested, kind, group = stored
    return {
        "zero": zero,
        "table": table,
        "global_scale": global_scale,
        "nested": nested,
        "kind": kind,
        "group_size": group,
    }


def _call(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    *stored: Any,
    **options: Any,
) -> Tensor:
    options |= options_of(stored) | {"nested": tuple(stored[5]) or None}
    return dequant_mm(
        x, stored[0], stored[1], bias=bias, residual=residual, norm_weight=norm_weight, **options
    )


def _reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    *stored: Any,
    **options: Any,
) -> Tensor:
    options |= options_of(stored)
    return dequant_mm_reference(
        x, stored[0], stored[1], bias=bias, residual=residual, norm_weight=norm_weight, **options
    )


def _case(
    variant: str,
    m: int,
    n: int,
    k: int,
    *,
    extras: str = "",
    dtypes: tuple[torch.dtype, ...] = HALVES,
    gate: bool = True,
    **options: Any,
) -> Case:
    """`extras` names what there is of bias, residual and norm."""

    def inputs(new: Inputs) -> tuple[Any, ...]:
        bias = new.randn(n) if "bias" in extras else None
        residual = new.randn(m, n) if "residual" in extras else None
        norm_weight = new.randn(k) if "norm" in extras else None
        return new.randn(m, k), bias, residual, norm_weight, *weight(new, variant, n, k)

    run: Callable[..., Tensor] = partial(_call, **options)
    parts = [variant, f"M{m}-N{n}-K{k}", *extras.split(), *(str(v) for v in options.values())]
    outputs = n // 2 if options.get("gated") else n
    return Case(
        "dequant_mm",
        "-".join(parts),
        inputs,
        run,
        lambda size: weight_bytes(variant, n, k, size) + m * (k + outputs) * size,
        partial(_reference, **options),
        flops=2 * m * n * k,
        dtypes=dtypes,
        gate=gate,
        gathers=("_wide_sm90_kernel",),  # scales: codes and x come by TMA
    )


CASES = (
    *(
        _case(v, m, n, k)
        for v in ("int4", "int8", "nf4", "fp8")
        for m in (1, 16)
        for n, k in LAYERS
    ),
    *(_case("int4", m, n, k) for m in (64, 256, 4096) for n, k in LAYERS),
    *(_case("int4", m, 6144, 4096) for m in (4, 8, 32)),
    *(_case("int4", m, n, k) for m in (128, 512) for n, k in LAYERS),
    *(_case(v, 1, 6144, 4096) for v in VARIANTS if v not in ("int4", "int8", "nf4", "fp8")),
    *(_case(v, m, 4096, 4096) for v in ("mx4", "nv4", "int4-asymmetric") for m in (16, 64)),
    *(_case(v, 64, 4096, 4096) for v in ("nf4", "int8", "fp8", "fp8-block")),
    *(
        _case("int4", m, 28672, 4096, extras="norm", activation="silu", gated=True)
        for m in (1, 16, 64)
    ),
    *(_case("int4", m, 4096, 14336, extras="bias residual") for m in (1, 64)),
    *(
        _case(v, m, n, k, gate=False)
        for v, layers, rows in (
            ("int4", LLAMA_70B, (1, 64)),
            ("int4", QWEN3_30B, (1, 64)),
            ("int4", FLUX, (4608,)),
            ("nf4", FLUX, (4608,)),
            ("nf4", SD35_LARGE, (8858,)),
        )
        for m in rows
        for n, k in layers
    ),
    *(_case(v, 1, 2048, 2048, dtypes=(torch.float32,)) for v in ("int4", "nf4-nested", "nv4")),
    *(_case(v, 9, 1024, 2048, dtypes=FLOATS) for v in ("int8-asymmetric", "fp8-block", "mx4")),
)
