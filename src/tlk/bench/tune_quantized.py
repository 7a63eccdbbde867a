"""How the tuner calls the matmuls of quantized weights: through the formats that store them.

Weights are quantized from random ones, so that codes and scales are as in a model. "dequant_mm.<kind>"
has dims (N, K, G), G inputs to a scale; "scaled_mm.<kind>" multiplies 8-bit activations and has (N, K).
"""

from functools import partial

import torch
from torch import Tensor

from tlk.bench.case import Inputs
from tlk.bench.tune_keys import EPS, Call, Calls, Key, Projection, model_weight
from tlk.kernels._dequant_configs import CUBLAS as DEQUANTIZED
from tlk.kernels.act_quant import quantize_act
from tlk.kernels.gated_linear import gated_linear_reference
from tlk.kernels.matmul import matmul_reference
from tlk.kernels.norm_linear import norm_linear_reference
from tlk.kernels.scaled_mm import scaled_mm, scaled_mm_reference
from tlk.quant.format import Format, Norm, Packed
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import NF4

WEIGHT_ONLY: dict[str, tuple[Format, int | None]] = {
    "dequant_mm.int4": (Int4(), 128),
    "dequant_mm.int8": (Int8Weight(), None),
    "dequant_mm.table4": (NF4, 64),
    "dequant_mm.mx4": (MXFP4(), 32),
    "dequant_mm.nv4": (NVFP4(), 16),
    "dequant_mm.fp8": (Fp8(weight_only=True), None),
}
"""A format of each kind, and how many inputs share a scale; None: those of a row."""

EIGHT_BIT: dict[str, tuple[Format, torch.dtype, int | None]] = {
    "scaled_mm.fp8": (Fp8(), torch.float8_e4m3fn, None),
    "scaled_mm.fp8_block": (Fp8("block"), torch.float8_e4m3fn, 128),
    "scaled_mm.int8": (Int8(), torch.int8, None),
}
"""A format of each kind, what it stores, and the side of its blocks; None: a scale per output."""


def calls() -> dict[str, Calls]:
    """How each op is called, by its name."""
    found = {
        op: Calls(partial(_grouped_dims, format, group), partial(_weight_only, format))
        for op, (format, group) in WEIGHT_ONLY.items()
    }
    for op, (eight_bit, dtype, block) in EIGHT_BIT.items():
        make = partial(_eight_bit, eight_bit, dtype, block)
        found[op] = Calls(partial(_dims, eight_bit), make, dtype)
    return found


def _dims(format: Format, layer: Projection) -> tuple[int, ...] | None:
    n, k = layer.outputs, layer.inputs
    return (n, k) if format.refusal(n, k) is None else None


def _grouped_dims(format: Format, group: int | None, layer: Projection) -> tuple[int, ...] | None:
    dims = _dims(format, layer)
    return None if dims is None else (*dims, group or layer.inputs)


def _weight_only(format: Format, key: Key) -> Call:
    (n, k, _), layer = key.dims, key.layer
    names = tuple(format.empty(n, k, device="meta", dtype=key.dtype))

    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        norm = new.randn(k) if layer.norm else None
        residual = new.randn(key.running, n) if layer.residual else None
        packed = _packed(format, new, n, k)
        return new.randn(key.running, k), norm, residual, *(packed[name] for name in names)

    def run(x: Tensor, norm: Tensor | None, residual: Tensor | None, *stored: Tensor) -> Tensor:
        packed = dict(zip(names, stored, strict=True))
        before = None if norm is None else Norm(norm, EPS, 0.0)
        if layer.gated:
            return format.gated_linear(x, packed, activation="silu", norm=before)
        return format.linear(x, packed, norm=before, residual=residual)

    def reference(
        x: Tensor, norm: Tensor | None, residual: Tensor | None, *stored: Tensor
    ) -> Tensor:
        weight = format.dequantize(dict(zip(names, stored, strict=True)), torch.float32)
        if layer.gated:
            return gated_linear_reference(x, weight, None, "silu", norm, EPS)
        if norm is not None:
            return norm_linear_reference(x, norm, weight, eps=EPS)
        return matmul_reference(x, weight, residual=residual)

    return Call(inputs, run, reference, DEQUANTIZED)


def _eight_bit(format: Format, dtype: torch.dtype, block: int | None, key: Key) -> Call:
    (n, k), layer, m = key.dims, key.layer, key.running

    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        new = Inputs(new.device, torch.bfloat16, new.empty)
        residual = new.randn(m, n) if layer.residual else None
        packed = _packed(format, new, n, k)
        if new.empty:
            columns = 1 if block is None else -(-k // block)
            q, scale = new.randn(m, k, dtype=dtype), new.randn(m, columns, dtype=torch.float32)
        else:
            q, scale = quantize_act(new.randn(m, k), dtype, group_size=block)
        return q, scale, packed["weight"], packed["scale"], residual

    def run(
        q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, residual: Tensor | None
    ) -> Tensor:
        return scaled_mm(q, scale, weight, weight_scale, residual=residual)

    def reference(
        q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, residual: Tensor | None
    ) -> Tensor:
        return scaled_mm_reference(q, scale, weight, weight_scale, residual=residual)

    return Call(inputs, run, reference)


def _packed(format: Format, new: Inputs, n: int, k: int) -> Packed:
    if new.empty:
        return format.empty(n, k, device=new.device, dtype=new.dtype)
    return format.quantize(model_weight(new, n, k))
