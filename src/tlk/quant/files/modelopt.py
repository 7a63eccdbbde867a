"""NVIDIA ModelOpt's checkpoints: hf_quant_config.json, or quant_method "modelopt" in config.json.

    FP8                       weight E4M3, weight_scale (), input_scale ()
    FP8_PER_CHANNEL_PER_TOKEN weight E4M3, weight_scale [N]
    FP8_PB_WO                 weight E4M3, weight_scale [N/128, 1, K/128, 1]; inputs in 16 bit
    NVFP4, W4A16_NVFP4        weight uint8 [N, K/2] lowest first, weight_scale E4M3 [N, K/16], weight_scale_2 ()
    W4A16_AWQ                 weight uint8 [N/2, K]: two's complement, packed along N; weight_scale [N, g];
                              pre_quant_scale [K] multiplies the inputs where no norm took it
    W8A8_SQ_PER_CHANNEL       weight int8, weight_scale [N], input_scale (), pre_quant_scale [K]
    MXFP4                     weight uint8 [N, K/2], weight_scale uint8 [N, K/32]

https://github.com/NVIDIA/TensorRT-Model-Optimizer
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.quant.files.floats import fp8_layer, mxfp4_layer, nvfp4_layer
from tlk.quant.files.layer import SCALES, Layer, Tensors, group_count, integers
from tlk.quant.int8 import Int8

MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class ModelOpt:
    """What the config says; algorithms: of single modules, by name, where precision is mixed."""

    algorithm: str
    group_size: int | None = None
    skipped: tuple[str, ...] = ()
    algorithms: Mapping[str, str] = field(default_factory=dict)

    method = "modelopt"

    def listed(self, module: str) -> bool | None:
        if any(key in module or fnmatchcase(module, key) for key in self.skipped):
            return False
        return self.of(module) is not None

    def named(self) -> Collection[str]:
        return list(self.algorithms)

    def holds(self, suffixes: Collection[str]) -> bool:
        return "weight_scale" in suffixes

    def of(self, module: str) -> str | None:
        """The algorithm of `module`; None: it stays in 16 bit."""
        return self.algorithms.get(module) if self.algorithm == MIXED else self.algorithm

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        algorithm = self.of(module)
        if algorithm is None:
            raise UnsupportedError(f"{module} is quantized, and quantized_layers does not say how")
        t = Tensors(module, tensors)
        layer = READERS[algorithm](t, self, shape)
        if t.has("pre_quant_scale"):
            scale = t.scale("pre_quant_scale", shape[1])
            layer.packed["pre_scale"] = scale[None].contiguous()
        t.ignore("input_scale", "k_scale", "v_scale", "output_scale")
        t.done()
        return layer


def scheme(fields: Mapping[str, Any]) -> ModelOpt:
    """The scheme of either file; UnsupportedError for an algorithm that tlk does not read."""
    own = fields.get("quantization", fields)
    algorithm = str(own.get("quant_algo")).upper()
    layers = own.get("quantized_layers") or {}
    algorithms = {name: str(layer.get("quant_algo")).upper() for name, layer in layers.items()}
    if algorithm == MIXED and not algorithms:
        raise UnsupportedError(
            f"modelopt {MIXED} without quantized_layers: nothing says what is stored"
        )
    if own.get("quant_algo") is None and own.get("kv_cache_quant_algo"):
        return ModelOpt(MIXED)  # the cache alone
    for one in [*algorithms.values()] if algorithm == MIXED else [algorithm]:
        if one not in READERS:
            known = ", ".join([*READERS, MIXED])
            raise UnsupportedError(
                f"modelopt quant_algo {one!r} is not read by tlk; it reads {known}"
            )
    skipped = own.get("exclude_modules") or own.get("ignore") or ()
    return ModelOpt(algorithm, own.get("group_size"), tuple(skipped), algorithms)


def _fp8(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    static = "input_scale" if t.has("input_scale") else None
    return fp8_layer(t, shape, "tensor", "weight_scale", input_scale=static)


def _fp8_per_channel(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    return fp8_layer(t, shape, "channel", "weight_scale")


def _fp8_blocks(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    rows, columns = (-(-size // 128) for size in shape)
    scale = t.take("weight_scale", SCALES, rows, 1, columns, 1)  # one block: a scalar
    flat = Tensors(t.module, {**t.tensors, "weight_scale": scale.view(rows, columns)}, t.taken)
    return fp8_layer(flat, shape, "block", "weight_scale", weight_only=True)


def _nvfp4(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    n, k = shape
    pairs = t.take("weight", torch.uint8, n, k // 2)
    factor = t.scale("weight_scale_2", 1, dtypes=(torch.float32,))
    return nvfp4_layer(t, pairs, "weight_scale", factor, shape)


def _mxfp4(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    n, k = shape
    pairs = t.take("weight", torch.uint8, n, k // 2)
    return mxfp4_layer(t, pairs, t.take("weight_scale", torch.uint8, n, k // 32), shape)


def _awq(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    n, k = shape
    octets = t.take("weight", torch.uint8, n // 2, k)
    codes = torch.stack([octets & 15, octets >> 4], 1).flatten(0, 1) ^ 8  # two's complement
    scale = t.scale("weight_scale", n, group_count(t.module, k, scheme.group_size or 128))
    return integers(t.module, codes, scale, None, 4)


def _smooth(t: Tensors, scheme: ModelOpt, shape: tuple[int, int]) -> Layer:
    n, k = shape
    scale = t.scale("weight_scale", n).float()[:, None].contiguous()
    packed = {"weight": t.take("weight", torch.int8, n, k), "scale": scale}
    if static := t.has("input_scale"):
        packed["input_scale"] = t.scale("input_scale", 1).float().reshape(1, 1)
    return Layer(Int8(static), packed)


READERS: Mapping[str, Callable[[Tensors, ModelOpt, tuple[int, int]], Layer]] = {
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_per_channel,
    "FP8_PB_WO": _fp8_blocks,
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
    "MXFP4": _mxfp4,
    "W4A16_AWQ": _awq,
    "W8A8_SQ_PER_CHANNEL": _smooth,
}
