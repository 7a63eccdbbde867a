"""Calibrate a decoder layer by layer: the residual stream waits on the host, one layer is at work.

A half of a layer (attention, MLP) is done in passes over the calibration data, some sequences at a time:

    1. what norm(x) is like: the inputs of q, k and v, or of gate and up
    2. AWQ and SmoothQuant: what the second linear layer reads; scales are searched and folded
    3. the first linear layer is rounded, and runs rounded from here on
    4. what the second one reads now; it is rounded
    5. the half runs as it will, and its result is the stream that the next half gets

So every layer is fitted to the errors of those before it ("true sequential" in GPTQ's terms).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlk.models.decoder import DecoderLayer
from tlk.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from tlk.quant.format import Packed
from tlk.quant.observe import Inputs
from tlk.quant.scaling import Choice, NotFinite
from tlk.quantize import scales
from tlk.quantize.half import Attending, Half, halves, reading
from tlk.quantize.plan import Target
from tlk.quantize.rounding import GPTQ, SCALED, Rounded, round_linear

CHUNK = 16384
"""Tokens that run at once."""
SEARCHED = 65536
"""Tokens that AWQ's search runs a half of a layer on, twenty times and more."""


@dataclass(slots=True)
class Stream:
    """The residual stream of the calibration data on the host, [sequences, length, hidden]."""

    x: Tensor
    attending: Attending
    device: torch.device

    @classmethod
    def start(cls, embedding: Embedding, ids: Tensor, device: torch.device) -> "Stream":
        """The embeddings of `ids` [n, length]; `embedding` may lie anywhere."""
        weight = embedding.weight
        shape = (*ids.shape, weight.shape[1])
        x = torch.empty(shape, dtype=weight.dtype, pin_memory=device.type == "cuda")
        for part, rows in zip(x, ids, strict=True):
            part.copy_(embedding(rows.to(weight.device)))
        return cls(x, Attending(ids.shape[1], device), device)

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def parts(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(rows of `x`, the same [T, hidden] on the device, sequences), of `limit` tokens at most."""
        length = self.x.shape[1]
        count = self.x.shape[0] if limit is None else min(-(-limit // length), self.x.shape[0])
        for rows in self.x[:count].split(max(1, CHUNK // length)):
            yield rows, rows.to(self.device, non_blocking=True).flatten(0, 1), rows.shape[0]

    def advance(self, run: Callable[[Tensor, int], Tensor]) -> None:
        """Replace the stream by what `run` makes of it."""
        for rows, x, n in self.parts():
            rows.copy_(run(x, n).view(rows.shape), non_blocking=True)


@dataclass(slots=True)
class LayerResult:
    """packed and reports by the layer's own names of its linear layers, "attention.qkv" and so on.

    The reports are one for each module of the checkpoint that the layer is fused from.

    kv_amax: the largest |k| after its rotation and |v| of each key head, float32 [Hk] each.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    reports: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    kv_amax: tuple[Tensor, Tensor] | None = None
    seconds: float = 0.0


@torch.no_grad()
def calibrate_layer(
    layer: DecoderLayer, targets: dict[str, Target], stream: Stream, *, kv: bool = False
) -> LayerResult:
    """Quantize the linear layers `targets`, by their names in `layer`, and move `stream` past it.

    `layer` lies on the stream's device with dense weights; afterwards it stores what was found, and its
    norms and biases have taken AWQ's or SmoothQuant's scales. kv: see how large keys and values get.
    """
    started = time.perf_counter()
    result = LayerResult()
    for half in halves(layer, stream.attending):
        wanted = [targets.get(name) for name in half.names]
        if any(wanted):
            _quantize_half(half, wanted, stream, result)
        run = half.run
        if kv and half.names[0] == "attention.qkv":
            run = _watching_kv(half, stream, result)
        stream.advance(run)
    result.seconds = time.perf_counter() - started
    return result


@torch.no_grad()
def quantize_layer(layer: nn.Module, targets: dict[str, Target]) -> LayerResult:
    """Round the linear layers `targets` of `layer` to nearest, without calibration data."""
    started = time.perf_counter()
    result = LayerResult()
    for name, target in targets.items():
        linear = layer.get_submodule(name)
        assert isinstance(linear, Linear)
        dense = linear.packed()["weight"]
        rounded = round_linear(dense.float(), target, dense.dtype, None)
        _keep(linear, name, target, rounded, result)
    result.seconds = time.perf_counter() - started
    return result


@torch.no_grad()
def calibrate_head(
    head: Linear, norm: RMSNorm | LayerNorm, target: Target, stream: Stream
) -> LayerResult:
    """Quantize an output layer that reads the normalized stream, under the name "lm_head"."""
    started = time.perf_counter()
    result = LayerResult()
    weight = head.packed()["weight"]
    inputs = _inputs(head, target, stream)
    for _, x, _ in stream.parts():
        inputs.add(norm(x))
    rounded = round_linear(weight.float(), target, weight.dtype, inputs)
    _keep(head, "lm_head", target, rounded, result)
    result.seconds = time.perf_counter() - started
    return result


def _quantize_half(
    half: Half, wanted: list[Target | None], stream: Stream, result: LayerResult
) -> None:
    first = wanted[0]
    dense = [linear.packed()["weight"] for linear in (half.first, half.second)]
    weights, dtype = [w.to(torch.float32, copy=True) for w in dense], dense[0].dtype
    seen = None
    if first is not None:
        seen = _inputs(half.first, first, stream)
        for _, x, _ in stream.parts():
            seen.add(half.norm(x))
    extra: list[dict[str, Any]] = [{}, {}]
    if any(t is not None and t.config.method in SCALED for t in wanted):
        _rescale(half, wanted, weights, dtype, seen, stream, extra)
    for i, (linear, target) in enumerate(zip((half.first, half.second), wanted, strict=True)):
        if target is None:
            linear.packed()["weight"].copy_(weights[i])  # its rows may have taken a scale
            continue
        if i == 1:
            seen = _seen_by_second(half, target, stream)
        assert seen is not None
        clip = target.config.method == "int4-awq" and half.names[i] != "attention.qkv"
        rounded = round_linear(weights[i], target, dtype, seen, clip=clip)
        for report in rounded.reports:
            report.update(extra[i])
        _keep(linear, half.names[i], target, rounded, result)


def _rescale(
    half: Half, wanted: list[Target | None], weights: list[Tensor], dtype: torch.dtype,
    seen: Inputs | None, stream: Stream, extra: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Search and fold the scales of both linear layers of a half into what comes before them."""
    first, second = wanted
    inner = None
    if second is not None and second.config.method in SCALED and half.absorbs is not None:
        inner = _seen_by_second(half, second, stream)
    if first is not None and first.config.method in SCALED and seen is not None:
        samples = [(x, n) for _, x, n in stream.parts(SEARCHED)]
        extra[0], scale = _searched(
            lambda: scales.scale_first(half, weights[0], first, seen, samples)
        )
        if scale is not None:
            scales.divide_norm(half.norm, scale)
            weights[0] *= scale
            seen.divide(scale)
    if inner is not None and second is not None and half.absorbs is not None:
        extra[1], scale = _searched(lambda: scales.scale_second(weights[1], second, inner, dtype))
        if scale is not None:
            scales.divide_rows(weights[0], half.first, half.absorbs, scale)
            weights[1] *= scale


def _searched(search: Callable[[], Choice]) -> tuple[dict[str, Any], Tensor | None]:
    """What the report says of a search, and the scale it found; None: nothing is scaled."""
    try:
        choice = search()
    except NotFinite as error:
        return {"fallback": f"not scaled: {error}"}, None
    gain = choice.loss / choice.unscaled if choice.unscaled else 1.0
    told = {"scaled_by": choice.setting, "loss_to_unscaled": gain}
    return told, None if choice.setting is None else choice.scale


def _seen_by_second(half: Half, target: Target, stream: Stream) -> Inputs:
    seen = _inputs(half.second, target, stream)
    with reading(half.second, seen.add):
        for _, x, n in stream.parts():
            half.run(x, n)
    return seen


def _inputs(linear: Linear, target: Target, stream: Stream) -> Inputs:
    hessian = target.config.method in GPTQ
    return Inputs(linear.in_features, stream.tokens, stream.device, hessian=hessian)


def _keep(linear: Linear, name: str, target: Target, rounded: Rounded, result: LayerResult) -> None:
    linear.store(target.format, rounded.packed)
    result.packed[name], result.reports[name] = rounded.packed, rounded.reports


def _watching_kv(
    half: Half, stream: Stream, result: LayerResult
) -> Callable[[Tensor, int], Tensor]:
    """The half's run, which also notes the largest keys and values that it wrote."""

    def run(x: Tensor, n: int) -> Tensor:
        y = half.run(x, n)
        pages = stream.attending.last
        assert pages is not None
        amax = [t.float().abs().amax((0, 2, 3)) for t in (pages.k, pages.v)]
        before = result.kv_amax or amax
        result.kv_amax = (torch.maximum(before[0], amax[0]), torch.maximum(before[1], amax[1]))
        return y

    return run
