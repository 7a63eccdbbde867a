"""Quantize a decoder, one layer at a time, with or without calibration data."""

import re
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from tlk.models.decoder import Decoder, DecoderLayer
from tlk.models.rope import RotaryEmbedding
from tlk.quant.config import CALIBRATED, QuantConfig
from tlk.quant.format import Packed, rows
from tlk.quant.ranges import scale_of
from tlk.quantize.calibration import Calibration
from tlk.quantize.layers import LayerResult, Stream, calibrate_head, calibrate_layer, quantize_layer
from tlk.quantize.plan import Plan, Target

KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(slots=True)
class Quantized:
    """What quantizing a decoder found.

    report: for every module of the checkpoint how it was made and how far it is off. kv_scales: of each
    layer k and v, float32 [Hk]; empty if they were not asked for. seconds: in all. memory: the most
    bytes that were in use, on the GPU if there is one, else on the host.
    """

    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    kv_scales: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


def data_is_needed(config: QuantConfig) -> bool:
    """Whether something that `config` names cannot do without calibration data."""
    if config.static or config.method in CALIBRATED:
        return True
    others = config.per_layer.values()
    return any(
        data_is_needed(other) if isinstance(other, QuantConfig) else other in CALIBRATED
        for other in others
    )


def run(
    decoder: Decoder,
    plan: Plan,
    data: Calibration | None,
    device: torch.device,
    *,
    kv_dtype: str | None = None,
    load: Callable[[int], LayerResult | None] = lambda i: None,
    done: Callable[[int, LayerResult], None] = lambda i, result: None,
    progress: bool = True,
) -> Quantized:
    """Quantize the linear layers of `decoder` that `plan` names, in place, on `device`.

    data: None rounds to nearest; else methods that need none still tell how far their outputs are off.
    kv_dtype: "fp8" or "int8" finds the scales of a cache of keys and values, from `data`.
    load(i) puts the weights of layer i on the device, and returns its result if an earlier run found it:
    then the layer already stores it. done(i, result) is called when the result is there, and may take
    the layer's weights away. The head counts as one more layer, if it is quantized; the final norm goes
    where the head goes.
    """
    started = time.perf_counter()
    _reset_memory(device)
    found, targets = Quantized(), by_layer(plan)
    stream = None if data is None else Stream.start(decoder.embedding, data.ids, device)
    if stream is not None:
        for rope in cast(Iterable[RotaryEmbedding], decoder.ropes):
            rope.prepare(stream.x.shape[1], device)
    count = len(decoder.layers)
    steps = range(count + (count in targets))
    bar = tqdm(steps, desc=plan.method, unit="layer", disable=not progress)
    for i in bar:
        result = load(i)
        if result is None:
            result = _quantize(decoder, i, targets.get(i, {}), stream, kv_dtype is not None)
        elif stream is not None and i < count:
            calibrate_layer(cast(DecoderLayer, decoder.layers[i]), {}, stream)
        _note(found, result, targets.get(i, {}), kv_dtype)
        done(i, result)
        bar.set_postfix_str(_told(result, device))
    found.seconds, found.memory = time.perf_counter() - started, _memory(device)
    return found


def _quantize(
    decoder: Decoder, i: int, targets: dict[str, Target], stream: Stream | None, kv: bool
) -> LayerResult:
    if i < len(decoder.layers):
        layer = cast(DecoderLayer, decoder.layers[i])
        if stream is None:
            return quantize_layer(layer, targets)
        return calibrate_layer(layer, targets, stream, kv=kv)
    head = decoder.lm_head
    assert head is not None
    if stream is None:
        return quantize_layer(decoder, targets)
    return calibrate_head(head, decoder.final_norm, targets["lm_head"], stream)


def by_layer(plan: Plan) -> dict[int, dict[str, Target]]:
    """The targets of each layer by their names in it; the head's come after the last layer's."""
    found: dict[int, dict[str, Target]] = {}
    for name, target in plan.targets.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        index, own = (int(match[1]), match[2]) if match else (plan.layers, name)
        found.setdefault(index, {})[own] = target
    return found


def _note(
    found: Quantized, result: LayerResult, targets: dict[str, Target], kv_dtype: str | None
) -> None:
    for name, target in targets.items():
        found.report |= zip(target.modules, result.reports[name], strict=True)
    if kv_dtype is not None and result.kv_amax is not None:
        k, v = (scale_of(amax, KV_DTYPES[kv_dtype]) for amax in result.kv_amax)
        found.kv_scales.append((k, v))


def parts(result: LayerResult, targets: Mapping[str, Target]) -> dict[str, Packed]:
    """The packed tensors of a layer by the names of the checkpoint's modules, as views."""
    found: dict[str, Packed] = {}
    for name, target in targets.items():
        start = 0
        for module, height in zip(target.modules, target.heights, strict=True):
            found[module] = rows(result.packed[name], start, start + height)
            start += height
    return found


def _told(result: LayerResult, device: torch.device) -> str:
    reports = [report for of_parts in result.reports.values() for report in of_parts]
    errors = [report.get("output_error", report["weight_error"]) for report in reports]
    worst = f"error {max(errors):.3f}, " if errors else ""
    return f"{worst}{result.seconds:.1f} s, {_memory(device) / 2**30:.1f} GiB"


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
