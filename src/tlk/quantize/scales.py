"""Scaling a half of a layer: AWQ's and SmoothQuant's scales, found by trying and folded into what is before."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.models.layers import LayerNorm, Linear, RMSNorm
from tlk.quant import awq, smoothquant
from tlk.quant.format import DENSE
from tlk.quant.observe import Inputs
from tlk.quant.ranges import input_scale, rounded
from tlk.quant.scaling import Choice, best
from tlk.quantize.half import Half
from tlk.quantize.plan import Target
from tlk.quantize.rounding import nearest

Samples = list[tuple[Tensor, int]]
"""Parts of the residual stream [T, hidden], and how many sequences each holds."""


def scale_first(
    half: Half, weight: Tensor, target: Target, inputs: Inputs, samples: Samples
) -> Choice:
    """The scale of what `half.first` reads. `weight` float32 is its weight, `inputs` what was seen of norm(x).

    For weights alone, the loss is that of the whole half on `samples`, run with the rounded weight; where
    activations are rounded too, that of the product alone, on the rows that `inputs` kept.
    """
    dtype = half.first.packed()["weight"].dtype
    if target.config.method == "int8":
        return _smooth(weight, target, inputs, dtype)
    second = half.second.packed()["weight"]
    wanted = [half.inner(x, n) for x, n in samples]

    def loss(scale: Tensor) -> float:
        values = _rounded(weight, scale, target, dtype)
        with _weight(half.first, values.to(dtype)):
            off = [half.inner(x, n) - y for (x, n), y in zip(samples, wanted, strict=True)]
        return sum(float(F.linear(d, second).float().square().sum()) for d in off)

    w_mean = awq.weight_mean(weight, _group_size(target))
    return best(awq.candidates(inputs.mean_abs, w_mean), loss)


def scale_second(weight: Tensor, target: Target, inputs: Inputs, dtype: torch.dtype) -> Choice:
    """The scale of what `half.second` reads, by the error of its own product on the rows of `inputs`."""
    if target.config.method == "int8":
        return _smooth(weight, target, inputs, dtype)
    x = inputs.rows.float()

    def loss(scale: Tensor) -> float:
        return float(F.linear(x, _rounded(weight, scale, target, dtype) - weight).square().sum())

    w_mean = awq.weight_mean(weight, _group_size(target))
    return best(awq.candidates(inputs.mean_abs, w_mean), loss)


def _smooth(weight: Tensor, target: Target, inputs: Inputs, dtype: torch.dtype) -> Choice:
    x = inputs.rows.float()
    exact = F.linear(x, weight)

    def loss(scale: Tensor) -> float:
        packed = nearest(weight * scale, target, dtype)
        seen = rounded(x / scale, torch.int8, _fixed(inputs, scale, target, dtype))
        values = target.format.dequantize(packed)
        return float((F.linear(seen, values) - exact).square().sum())

    return best(smoothquant.candidates(inputs.amax, weight.abs().amax(0)), loss)


def _fixed(inputs: Inputs, scale: Tensor, target: Target, dtype: torch.dtype) -> Tensor | None:
    """The one scale of static activations, of inputs divided by `scale`; None if each row has its own."""
    if not target.config.static:
        return None
    return input_scale(inputs.amax / scale, torch.int8, dtype)


def _rounded(weight: Tensor, scale: Tensor, target: Target, dtype: torch.dtype) -> Tensor:
    """`weight` as it is in effect if it is rounded with its inputs scaled."""
    return target.format.dequantize(nearest(weight * scale, target, dtype)) / scale


def _group_size(target: Target) -> int | None:
    size: int | None = getattr(target.format, "group_size", None)
    return size


class _weight:
    """Inside the block, `linear` multiplies by another dense weight."""

    def __init__(self, linear: Linear, weight: Tensor) -> None:
        self.linear, self.weight = linear, weight

    def __enter__(self) -> None:
        self.before = self.linear.packed()
        self.linear.store(DENSE, {"weight": self.weight})

    def __exit__(self, *error: object) -> None:
        self.linear.store(DENSE, self.before)


@torch.no_grad()
def divide_norm(norm: RMSNorm | LayerNorm, scale: Tensor) -> None:
    """Have `norm` give its result divided by `scale` [K]."""
    offset = norm.weight_offset
    norm.weight.copy_((norm.weight.float() + offset) / scale - offset)
    bias: Any = getattr(norm, "bias", None)
    if bias is not None:
        bias.copy_(bias.float() / scale)


@torch.no_grad()
def divide_rows(weight: Tensor, linear: Linear, rows: slice, scale: Tensor) -> None:
    """Have the outputs `rows` of `linear` come out divided by `scale`; `weight` float32 is its weight."""
    weight[rows] /= scale[:, None]
    if linear.bias is not None:
        linear.bias[rows] = (linear.bias[rows].float() / scale).to(linear.bias.dtype)
