"""Layers as compressed-tensors stores them, and the quantization_config that says so.

Layers of one format are one config group. The group of most layers has the target "Linear"; the others
come before it and name their layers. compressed-tensors forbids fields of other tools in a group.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.quant.codes import unpack_nibbles
from tlk.quant.files._bits import pack_words, pair_low_first
from tlk.quant.format import Format, Packed
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight

FORMATS = (Int4, Int8Weight, Int8, Fp8, MXFP4, NVFP4)


def tensors(module: str, format: Format, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer by suffix; scales in `dtype`, the model's, which must hold them exactly."""
    if isinstance(format, MXFP4):
        codes = unpack_nibbles(packed["weight"], 32)
        return {"weight_packed": pair_low_first(codes), "weight_scale": packed["scale"]}
    if isinstance(format, NVFP4):
        return _nvfp4(module, packed)
    if isinstance(format, Int4 | Int8Weight):
        return _packed(module, format, packed, dtype)
    if not isinstance(format, Int8 | Fp8):
        raise UnsupportedError(f"{module}: compressed-tensors cannot store {format}")
    scale = packed["scale"]
    if isinstance(format, Fp8) and _strategy(format) == "tensor":
        scale = _single(module, "scale", scale)
    found = {"weight": packed["weight"], "weight_scale": in_dtype(module, scale, dtype)}
    if format.static:
        found["input_scale"] = packed["input_scale"].flatten().to(dtype)
    return found


def _packed(
    module: str, format: Int4 | Int8Weight, packed: Packed, dtype: torch.dtype
) -> dict[str, Tensor]:
    scale, zero = packed["scale"], packed.get("zero")
    if isinstance(format, Int4):
        codes = unpack_nibbles(packed["weight"], 2 * packed["weight"].shape[1] // scale.shape[1])
    else:
        codes = _unsigned(packed["weight"])
    bits = _num_bits(format)
    found = {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": in_dtype(module, scale, dtype),
        "weight_shape": torch.tensor(list(codes.shape)),
    }
    if zero is not None:
        points = zero if isinstance(format, Int4) else _unsigned(zero)
        found["weight_zero_point"] = pack_words(points.T, bits).T.contiguous()
    return found


def _unsigned(signed: Tensor) -> Tensor:
    return (signed.to(torch.int16) + 128).to(torch.uint8)


def _nvfp4(module: str, packed: Packed) -> dict[str, Tensor]:
    return {
        "weight_packed": pair_low_first(unpack_nibbles(packed["weight"], 16)),
        "weight_scale": packed["scale"],
        "weight_global_scale": 1 / _single(module, "global_scale", packed["global_scale"]),
    }


def _single(module: str, name: str, each: Tensor) -> Tensor:
    """The one number [1] that all of `each` are; UnsupportedError if they are not."""
    if not bool((each == each[:1]).all()):
        raise UnsupportedError(
            f"{module} has rows of different {name}, which is one number in the file"
        )
    return each.flatten()[:1].clone()


def in_dtype(module: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`; UnsupportedError if that would change a number."""
    cast = scale.to(dtype)
    if not torch.equal(cast.float(), scale.float()):
        raise UnsupportedError(
            f"{module} has scales in {scale.dtype} that {dtype}, the model's dtype, does not hold exactly"
        )
    return cast


def config(
    formats: Mapping[str, Format], kept: Sequence[str], kv_dtype: str | None
) -> dict[str, Any]:
    """quantization_config for layers of `formats` by module, and the linear layers `kept` in 16 bit.

    kv_dtype: "fp8" or "int8" where the cache has scales, one per head.
    """
    (most, _), *others = Counter(formats.values()).most_common()
    groups = [_group(f, [m for m, own in formats.items() if own == f]) for f, _ in others]
    groups.append(_group(most, ["Linear"]))
    kinds = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(kept),
        "kv_cache_scheme": None if kv_dtype is None else _cache(kv_dtype),
    }


def _cache(kv_dtype: str) -> dict[str, Any]:
    kind = "float" if kv_dtype == "fp8" else "int"
    return {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "attn_head", "dynamic": False
    }  # fmt: skip


def _group(format: Format, targets: list[str]) -> dict[str, Any]:
    weights, inputs = _arguments(format)
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": file_format(format),
    }


def file_format(format: Format) -> str:
    """What compressed-tensors calls the layout of `format`."""
    if isinstance(format, Fp8):
        return "naive-quantized" if format.weight_only else "float-quantized"
    return {
        Int4: "pack-quantized",
        Int8Weight: "pack-quantized",
        Int8: "int-quantized",
        MXFP4: "mxfp4-pack-quantized",
        NVFP4: "nvfp4-pack-quantized",
    }[type(format)]


def _arguments(format: Format) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of the weights, and of the inputs if they are rounded too."""
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    if isinstance(format, MXFP4):
        own = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return weights | own | {"num_bits": 4, "type": "float"}, None
    if isinstance(format, NVFP4):
        own = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return weights | own | {"num_bits": 4, "type": "float"}, None
    if isinstance(format, Int4 | Int8Weight):
        size = format.group_size
        own = {"strategy": "group" if size else "channel", "group_size": size}
        own |= {"symmetric": format.symmetric, "num_bits": _num_bits(format), "type": "int"}
        return weights | own, None
    assert isinstance(format, Int8 | Fp8)
    weights |= {"num_bits": 8, "type": "int" if isinstance(format, Int8) else "float"}
    weights["strategy"] = _strategy(format)
    if weights["strategy"] == "block":
        weights["block_structure"] = [128, 128]
    return weights, None if format.act is None else _inputs(format, weights["type"])


def _inputs(format: Int8 | Fp8, kind: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True}
    if format.static:
        return inputs | {"strategy": "tensor", "dynamic": False}
    if _strategy(format) == "block":
        return inputs | {"strategy": "group", "group_size": 128, "dynamic": True}
    return inputs | {"strategy": "token", "dynamic": True}


def _strategy(format: Int8 | Fp8) -> str:
    return format.granularity if isinstance(format, Fp8) else "channel"


def _num_bits(format: Int4 | Int8Weight) -> int:
    return 4 if isinstance(format, Int4) else 8
