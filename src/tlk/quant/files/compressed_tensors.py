"""compressed-tensors' checkpoints: integers packed or not, 8-bit floats, MXFP4 and NVFP4, per group of layers.

A config group names the layers it is for ("targets": module names, class names, "re:" expressions)
and how their weights and inputs are quantized; the first that matches counts, unless the layer is in
"ignore". What lies in the files:

    pack-quantized     weight_packed int32 [N, K·b/32]: q + 2^(b-1) along K, lowest first; weight_shape
                       [N, K]; weight_scale [N, g]; weight_zero_point int32 [N·b/32, g] packed along N
    int-quantized      weight int8 [N, K], weight_scale [N, 1], input_scale [1] if static
    float-quantized    weight E4M3 [N, K], weight_scale [1], [N, 1] or [N/128, K/128], input_scale
    mxfp4-pack-…       weight_packed uint8 [N, K/2] lowest first, weight_scale uint8 [N, K/32]
    nvfp4-pack-…       the same with weight_scale E4M3 [N, K/16], and weight_global_scale [1], a divisor

https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.config import matches
from tlk.quant.files._bits import unpack_words, word_count
from tlk.quant.files.floats import fp8_layer, mxfp4_layer, nvfp4_layer
from tlk.quant.files.gptq import order_of_groups
from tlk.quant.files.layer import Layer, Tensors, group_count, integers
from tlk.quant.int8 import Int8

WEIGHTS = ("weight_packed", "weight_scale")


@dataclass(frozen=True)
class Group:
    """One config group: the layers it is for, their weights' and inputs' arguments, and its format."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    format: str

    def arguments(self) -> str:
        """For messages: "4 bit int, group of 128"."""
        w = self.weights
        return f"{w.get('num_bits')} bit {w.get('type', 'int')}, strategy {w.get('strategy')}"


@dataclass(frozen=True)
class CompressedTensors:
    """What quantization_config says."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...] = ()

    method = "compressed-tensors"

    def listed(self, module: str) -> bool | None:
        if any(matches(key, module, "Linear") for key in self.ignored):
            return False
        return self.of(module) is not None

    def named(self) -> Collection[str]:
        keys = (key for group in self.groups for key in group.targets)
        return [key for key in keys if "." in key and not key.startswith("re:")]  # no class's name

    def holds(self, suffixes: Collection[str]) -> bool:
        return any(suffix in suffixes for suffix in WEIGHTS)

    def of(self, module: str) -> Group | None:
        """The first group whose targets name `module`."""
        for group in self.groups:
            if any(matches(key, module, "Linear") for key in group.targets):
                return group
        return None

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        group = self.of(module)
        if group is None:
            raise CheckpointError(f"{module} is quantized, and no config group has it as a target")
        t = Tensors(module, tensors)
        layer = READERS[group.format](t, group, shape)
        # of outputs, and of inputs that are not rounded here
        t.ignore("input_scale", "input_global_scale", "input_zero_point", "output_scale")
        t.done()
        return layer


def scheme(fields: Mapping[str, Any]) -> CompressedTensors:
    """The scheme of a quantization config; UnsupportedError for what tlk does not read."""
    for key in ("sparsity_config", "transform_config"):
        value = fields.get(key)
        if value and value.get("format", "") != "dense":
            raise UnsupportedError(f"compressed-tensors with a {key} is not read by tlk: {value}")
    top = fields.get("format")
    groups = tuple(_group(name, g, top) for name, g in (fields.get("config_groups") or {}).items())
    if not groups and not fields.get("kv_cache_scheme"):  # it may be the cache alone
        raise UnsupportedError(
            "compressed-tensors without config_groups: nothing says what is stored"
        )
    return CompressedTensors(groups, tuple(fields.get("ignore") or ()))


def _group(name: str, group: Mapping[str, Any], top: str | None) -> Group:
    weights, inputs = group.get("weights"), group.get("input_activations")
    format = group.get("format") or top
    if weights is None:
        raise UnsupportedError(f"compressed-tensors {name} quantizes activations and not weights")
    if format in (None, "mixed-precision"):
        format = _default_format(weights, inputs)
    if format not in READERS:
        known = ", ".join(READERS)
        raise UnsupportedError(f"compressed-tensors format {format!r} of {name}: tlk reads {known}")
    return Group(tuple(group.get("targets") or ()), weights, inputs, format)


def _default_format(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str:
    """What compressed-tensors writes where neither the group nor the config names a format."""
    if weights.get("type") == "float":
        return "float-quantized" if weights.get("num_bits") == 8 else "nvfp4-pack-quantized"
    return "pack-quantized" if inputs is None else "int-quantized"


def _packed(t: Tensors, group: Group, shape: tuple[int, int]) -> Layer:
    bits, (n, k) = _bits(t, group, range(2, 9)), shape
    stored = t.take("weight_shape", (torch.int64, torch.int32), 2)
    if tuple(stored.tolist()) != shape:
        raise CheckpointError(f"{t.name('weight_shape')} says {stored.tolist()}, expected {[n, k]}")
    dense, sparse = (
        word_count(k, bits),
        -(-k // (32 // bits)),
    )  # before version 0.19: whole codes a word
    words = t.take("weight_packed", torch.int32, n, None)
    if words.shape[1] == dense:
        codes = unpack_words(words, bits, k)
    elif words.shape[1] == sparse:
        codes = _whole_codes(words, bits)[:, :k]
    else:
        t.take("weight_packed", torch.int32, n, dense)  # says what is wrong
    scale = _group_scale(t, group, n, k)
    zero = None
    if not group.weights.get("symmetric", True):
        zero = _zero_point(t, bits, n, scale.shape[1])
    perm = None
    if t.has("weight_g_idx"):
        perm = order_of_groups(
            t.module, t.take("weight_g_idx", (torch.int32, torch.int64), k), scale.shape[1]
        )
    if perm is not None:
        codes = codes[:, perm[0]]
    return integers(t.module, codes, scale, zero, bits, perm)


def _whole_codes(words: Tensor, bits: int) -> Tensor:
    """Codes of words that hold 32 // bits of them and leave the rest of their bits unused."""
    shifts = torch.arange(32 // bits, device=words.device) * bits
    return ((words.long()[..., None] >> shifts) & (2**bits - 1)).flatten(1).to(torch.uint8)


def _zero_point(t: Tensors, bits: int, n: int, groups: int) -> Tensor:
    """Unsigned zero points [N, g]: packed along N, or, as old files have them, signed int8."""
    stored = t.take("weight_zero_point", (torch.int32, torch.int8), None, groups)
    if stored.dtype == torch.int8:
        return (stored.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    t.take("weight_zero_point", torch.int32, word_count(n, bits), groups)
    return unpack_words(stored.T, bits, n).T


def _group_scale(t: Tensors, group: Group, n: int, k: int) -> Tensor:
    """weight_scale as [N, g]."""
    strategy = group.weights.get("strategy")
    if strategy == "tensor":
        return t.scale("weight_scale", 1).expand(n, 1).contiguous()
    if strategy == "channel":
        return t.scale("weight_scale", n, 1)
    if strategy != "group":
        raise UnsupportedError(f"{t.module}: {group.arguments()} is no scale that tlk reads")
    return t.scale("weight_scale", n, group_count(t.module, k, group.weights.get("group_size")))


def _integers(t: Tensors, group: Group, shape: tuple[int, int]) -> Layer:
    bits, (n, k) = _bits(t, group, range(2, 9)), shape
    symmetric = group.weights.get("symmetric", True)
    weight = t.take("weight", torch.int8, n, k)
    scale = _group_scale(t, group, n, k)
    zero = None
    if not symmetric:
        zero = t.take("weight_zero_point", torch.int8, *scale.shape)
        zero = (zero.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    inputs = group.inputs or {}
    # where only the weight's arguments fit the kernel of 8-bit activations, they stay in 16 bit
    if bits < 8 or scale.shape[1] > 1 or not symmetric or not _rounds(inputs, "int"):
        codes = (weight.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        return integers(t.module, codes, scale, zero, bits)
    packed = {"weight": weight, "scale": scale.float()}
    static = not inputs.get("dynamic")
    if static:
        packed["input_scale"] = t.scale("input_scale", 1).float().reshape(1, 1)
    return Layer(Int8(static), packed)


def _rounds(inputs: Mapping[str, Any], kind: str) -> bool:
    """Whether inputs are rounded to 8 bit in a way that tlk's kernels have."""
    return (
        inputs.get("num_bits") == 8
        and inputs.get("type", "int") == kind
        and bool(inputs.get("symmetric", True))
        and inputs.get("strategy") in ("tensor", "token", "group", "channel", None)
    )


def _floats(t: Tensors, group: Group, shape: tuple[int, int]) -> Layer:
    weights, inputs = group.weights, group.inputs or {}
    if weights.get("type") != "float":
        return _integers(t, group, shape)
    if weights.get("num_bits") != 8:
        raise UnsupportedError(f"{t.module}: {group.arguments()} is no 8-bit float")
    block = weights.get("block_structure")
    if weights.get("strategy") == "block" and list(block or ()) != [128, 128]:
        raise UnsupportedError(f"{t.module}: blocks of {block}; tlk reads blocks of [128, 128]")
    static = bool(inputs) and not inputs.get("dynamic")
    return fp8_layer(
        t, shape, weights.get("strategy"), "weight_scale",
        input_scale="input_scale" if static else None, weight_only=not _rounds(inputs, "float"),
    )  # fmt: skip


def _mxfp4(t: Tensors, group: Group, shape: tuple[int, int]) -> Layer:
    n, k = shape
    packed = t.take("weight_packed", torch.uint8, n, k // 2)
    return mxfp4_layer(t, packed, t.take("weight_scale", torch.uint8, n, -(-k // 32)), shape)


def _nvfp4(t: Tensors, group: Group, shape: tuple[int, int]) -> Layer:
    n, k = shape
    packed = t.take("weight_packed", torch.uint8, n, k // 2)
    divisor = t.scale("weight_global_scale", 1, dtypes=(torch.float32,))
    return nvfp4_layer(t, packed, "weight_scale", 1 / divisor, shape)


def _bits(t: Tensors, group: Group, allowed: Collection[int]) -> int:
    bits = group.weights.get("num_bits", 8)
    if bits not in allowed or group.weights.get("type", "int") != "int":
        raise UnsupportedError(f"{t.module}: {group.arguments()} is no integer that tlk reads")
    return int(bits)


READERS = {
    "pack-quantized": _packed,
    "int-quantized": _integers,
    "float-quantized": _floats,
    "naive-quantized": _floats,
    "mxfp4-pack-quantized": _mxfp4,
    "nvfp4-pack-quantized": _nvfp4,
}
