"""Which standard layout a quantized model is saved in, and what turns a layer into it.

By default AWQ's for 4 bit with zero points, bitsandbytes' for its tables, compressed-tensors' for all
else: those that most loaders read. Others can be asked for by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.quant.codes import unpack_nibbles
from tlk.quant.files import awq, bitsandbytes, gptq
from tlk.quant.files import write_compressed_tensors as compressed_tensors
from tlk.quant.format import Format, Packed
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import MIDDLE, Int4
from tlk.quant.table4 import TableFormat

SMALLEST, LARGEST = 6e-8, 65504.0
"""Between which float16 holds a number at all."""


class ScaleError(UnsupportedError):
    """Scales that float16, in which the layout stores them, does not hold."""


@dataclass(frozen=True)
class Saved:
    """What a quantization_config tells of a model.

    formats: by module. kept: linear layers in 16 bit. kv_dtype: of a cache with scales, else None.
    """

    formats: Mapping[str, Format]
    kept: Sequence[str]
    dtype: torch.dtype
    kv_dtype: str | None = None

    @property
    def format(self) -> Any:
        """That of all layers, where there is one."""
        return next(iter(self.formats.values()))


@dataclass(frozen=True)
class Writer:
    """A layout. refusal: why it cannot hold a layer of a format and shape [n, k], or None."""

    tensors: Callable[[str, Format, Packed, torch.dtype], dict[str, Tensor]]
    config: Callable[[Saved], dict[str, Any]]
    refusal: Callable[[Format, tuple[int, int]], str | None]
    mixes: bool = False  # formats in one model


def choose(
    formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]], wanted: str | None = None
) -> str:
    """The name in WRITERS of the layout for layers of `formats` and `shapes` [n, k] by module.

    wanted: a name, or "ct"; None is the default. Raises ValueError for an unknown name,
    UnsupportedError naming the module that the layout, or any, cannot hold.
    """
    wanted = {"ct": "compressed-tensors"}.get(wanted or "", wanted)
    if wanted is not None and wanted not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)} or ct, got {wanted!r}")
    kinds = set(formats.values())
    default = "compressed-tensors"
    if all(isinstance(f, TableFormat) for f in kinds):
        default = "bitsandbytes"
    elif all(isinstance(f, Int4) and not f.symmetric for f in kinds) and not _why_not(
        "awq", formats, shapes
    ):
        default = "awq"
    name = wanted or default
    if reason := _why_not(name, formats, shapes):
        raise UnsupportedError(f"{name} cannot hold {reason}")
    return name


def _why_not(
    name: str, formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]]
) -> str | None:
    writer = WRITERS[name]
    for module, format in formats.items():
        if reason := writer.refusal(format, shapes[module]):
            return f"{module}: {reason}"
    if not writer.mixes and len(set(formats.values())) > 1:
        return f"layers of {len(set(formats.values()))} formats in one model"
    return None


def _int4(format: Format, unit: int, shape: tuple[int, int]) -> str | None:
    if not isinstance(format, Int4):
        return f"{format} is not 4-bit integers"
    return None if shape[0] % unit == 0 else f"{shape[0]} outputs are not divisible by {unit}"


def _refuse_gptq(format: Format, shape: tuple[int, int]) -> str | None:
    if reason := _int4(format, 32, shape):
        return reason
    return None if isinstance(format, Int4) and format.symmetric else "it has zero points"


def _refuse_fp8(format: Format, shape: tuple[int, int]) -> str | None:
    blocks = isinstance(format, Fp8) and format.granularity == "block"
    return None if blocks else f"{format} is not fp8 in blocks of 128"


def _refuse_table(format: Format, shape: tuple[int, int]) -> str | None:
    return None if isinstance(format, TableFormat) else f"{format} is not one of its tables"


def _refuse_compressed(format: Format, shape: tuple[int, int]) -> str | None:
    return (
        None
        if isinstance(format, compressed_tensors.FORMATS)
        else f"{format} is not of its formats"
    )


def _codes(packed: Packed) -> Tensor:
    return unpack_nibbles(
        packed["weight"], 2 * packed["weight"].shape[1] // packed["scale"].shape[1]
    )


def half_scales(module: str, packed: Packed) -> None:
    """Raise ScaleError, naming the file's tensor, unless float16 holds the scales exactly."""
    scale = packed["scale"].float()
    held = (scale >= SMALLEST) & (scale <= LARGEST) & (scale.half().float() == scale)
    if not bool(held.all()):
        raise ScaleError(
            f"{module}.scales has {int((~held).sum())} scales that float16 does not hold"
        )


def _awq(module: str, format: Format, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    half_scales(module, packed)
    middle = torch.full_like(packed["scale"], MIDDLE, dtype=torch.uint8)
    return awq.write(_codes(packed), packed["scale"], packed.get("zero", middle))


def _gptq(module: str, format: Format, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    half_scales(module, packed)
    return gptq.write(packed, _codes(packed))


def _table(module: str, format: Format, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(format, TableFormat)
    return bitsandbytes.write(format, packed, _codes(packed), dtype)


def _fp8(module: str, format: Format, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": packed["weight"], "weight_scale_inv": packed["scale"]}


def _awq_config(saved: Saved) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": saved.format.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(saved.kept) or None,
    }


def _gptq_config(saved: Saved) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": saved.format.group_size or -1,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": "lm_head" in saved.formats,
        "dynamic": {f"-:{module.replace('.', '[.]')}$": {} for module in saved.kept} or None,
    }


def _table_config(saved: Saved) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": saved.format.name,
        "bnb_4bit_use_double_quant": saved.format.nested,
        "bnb_4bit_compute_dtype": str(saved.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(saved.kept) or None,
        "llm_int8_threshold": 6.0,
    }


def _fp8_config(saved: Saved) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(saved.kept) or None,
    }


WRITERS: Mapping[str, Writer] = {
    "compressed-tensors": Writer(
        compressed_tensors.tensors,
        lambda saved: compressed_tensors.config(saved.formats, saved.kept, saved.kv_dtype),
        _refuse_compressed,
        mixes=True,
    ),
    "awq": Writer(_awq, _awq_config, lambda format, shape: _int4(format, 32, shape)),
    "gptq": Writer(_gptq, _gptq_config, _refuse_gptq),
    "bitsandbytes": Writer(_table, _table_config, _refuse_table),
    "fp8": Writer(_fp8, _fp8_config, _refuse_fp8),
}


def layer_tensors(
    name: str, module: str, format: Format, packed: Packed, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a layer, by their names in the file, in the layout `name`.

    Raises UnsupportedError for a layer whose inputs are permuted or scaled: no layout here says so.
    """
    for extra in ("perm", "pre_scale"):
        if extra in packed:
            raise UnsupportedError(f"{module} has {extra} of its inputs, which {name} cannot store")
    found = WRITERS[name].tensors(module, format, packed, dtype)
    return {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in found.items()}
