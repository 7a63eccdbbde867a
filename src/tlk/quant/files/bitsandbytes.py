"""bitsandbytes' checkpoints: NF4 and FP4, with double quantization or without, and LLM.int8.

    4 bit: w = quant_map[code] · absmax[block]        blocks run over the flattened [N, K]
    8 bit: w = q · SCB[n] / 127

weight is uint8 [N·K/2, 1], the first code of a byte in its HIGH half, or the same bytes as another
dtype; weight.quant_state.bitsandbytes__nf4 (or fp4) is JSON as bytes. Double quantization stores
weight.absmax in uint8, with nested_absmax for every 256 of them, nested_quant_map and an offset.
LLM.int8's outlier columns are for activations: they are not rounded here, which is more exact.
https://arxiv.org/abs/2305.14314, https://arxiv.org/abs/2208.07339
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.codes import pack_nibbles
from tlk.quant.files._bits import high_first, pair_high_first
from tlk.quant.files.deepseek import names
from tlk.quant.files.layer import Layer, Tensors
from tlk.quant.format import Packed
from tlk.quant.int8 import Int8Weight
from tlk.quant.table4 import NESTED_BLOCK, TableFormat, spread_runs

STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BitsAndBytes:
    """What quantization_config says."""

    skipped: tuple[str, ...] = ()

    method = "bitsandbytes"

    def listed(self, module: str) -> bool | None:
        return module != "lm_head" and not any(names(key, module) for key in self.skipped)

    def named(self) -> Collection[str]:
        return ()

    def holds(self, suffixes: Collection[str]) -> bool:
        return "SCB" in suffixes or "weight.absmax" in suffixes

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        t = Tensors(module, tensors)
        layer = _eight(t, shape) if t.has("SCB") else _four(t, shape)
        t.done()
        return layer


def scheme(fields: Mapping[str, Any]) -> BitsAndBytes:
    """The scheme of a quantization config."""
    return BitsAndBytes(tuple(fields.get("llm_int8_skip_modules") or ()))


def _eight(t: Tensors, shape: tuple[int, int]) -> Layer:
    n, k = shape
    if t.has("weight_format"):
        layout = t.take("weight_format", (torch.uint8, torch.int8, torch.int32, torch.int64), 1)
        if int(layout) != 0:
            raise UnsupportedError(
                f"{t.name('weight_format')} is {int(layout)}: tlk reads rows (0)"
            )
    scale = _finite(t, "SCB", n)  # 0 for a row of zeros
    weight = t.take("weight", torch.int8, n, k)
    return Layer(Int8Weight(), {"weight": weight, "scale": scale[:, None] / 127})


def _four(t: Tensors, shape: tuple[int, int]) -> Layer:
    n, k = shape
    state = _state(t, shape)
    name, size = state["quant_type"], int(state["blocksize"])
    unit = math.gcd(k, size)  # inputs of a row that share one absmax, also where blocks cross rows
    if unit < 32 or k % 2:
        raise UnsupportedError(
            f"{t.module} has {k} inputs and blocks of {size} across its rows: no 32 inputs share a scale"
        )
    codes = high_first(_octets(t, shape).view(n, k // 2))
    packed = {
        "weight": pack_nibbles(codes, unit),
        "table": t.take("weight.quant_map", torch.float32, 16)[None],
    }
    blocks = -(-n * k // size)
    if not t.has("weight.nested_absmax"):
        absmax = _finite(t, "weight.absmax", blocks)
        packed["scale"] = _per_group(absmax, n, k, unit, size)
        return Layer(TableFormat(name, unit), packed)
    run = int(state.get("nested_blocksize", NESTED_BLOCK))
    scale = t.take("weight.absmax", torch.uint8, blocks)
    largest = _finite(t, "weight.nested_absmax", -(-blocks // run))
    values = t.take("weight.nested_quant_map", torch.float32, 256)
    offset = torch.tensor(float(state["nested_offset"]), device=scale.device)
    if unit == size and run == NESTED_BLOCK:
        packed |= spread_runs(scale.view(n, -1), largest, values, offset)
        return Layer(TableFormat(name, unit, nested=True), packed)
    absmax = values[scale.int()] * largest.repeat_interleave(run)[:blocks] + offset
    packed["scale"] = _per_group(absmax, n, k, unit, size)
    return Layer(TableFormat(name, unit), packed)


def _octets(t: Tensors, shape: tuple[int, int]) -> Tensor:
    """The bytes of the codes, in whatever dtype they are stored."""
    n, k = shape
    stored = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
    octets = t.take("weight", stored, None, 1).contiguous().view(torch.uint8).flatten()
    if 2 * octets.numel() != n * k:
        raise CheckpointError(
            f"{t.name('weight')} holds {2 * octets.numel()} codes, expected {n} × {k}"
        )
    return octets


def _per_group(absmax: Tensor, n: int, k: int, unit: int, size: int) -> Tensor:
    """absmax [blocks of `size` in the flattened weight] as [n, k/unit]."""
    first = torch.arange(n * k // unit, device=absmax.device) * unit
    return absmax[first // size].view(n, k // unit)


def _finite(t: Tensors, suffix: str, size: int) -> Tensor:
    """A tensor of maxima, which may be zero, float32 [size]."""
    tensor = t.take(suffix, torch.float32, size).reshape(size)
    if not tensor.isfinite().all() or (tensor < 0).any():
        raise CheckpointError(f"{t.name(suffix)} holds values that are negative or not finite")
    return tensor


def _state(t: Tensors, shape: tuple[int, int]) -> dict[str, Any]:
    """The JSON of the quantization state, which must be that of an [n, k] weight."""
    suffix = next((s for s in t.tensors if s.startswith(STATE)), STATE + "nf4")
    octets = t.take(suffix, torch.uint8, None)
    try:
        state = json.loads(bytes(octets.tolist()))
        found, kind = list(state["shape"]), state["quant_type"]
        _ = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{t.name(suffix)} is corrupt: {error!r}") from error
    if found != list(shape):
        raise CheckpointError(f"{t.name(suffix)} is of a weight {found}, expected {list(shape)}")
    if kind not in ("nf4", "fp4"):
        raise UnsupportedError(f"{t.module} is stored as {kind!r}: tlk reads nf4 and fp4")
    return dict(state)


def write(
    format: TableFormat, packed: Packed, codes: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors, by suffix, of `codes` uint8 [N, K] in `format`, of a model in `dtype`.

    The double quantization of a layer that was fused or sharded may not be one run over its rows:
    ValueError then.
    """
    n, k = codes.shape
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": format.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [n, k],
    }
    tensors = {
        "weight": pair_high_first(codes).view(-1, 1),
        "weight.absmax": packed["scale"].flatten(),
        "weight.quant_map": packed["table"].flatten(),
    }
    if format.nested:
        tensors["weight.nested_absmax"] = _runs(packed)
        tensors["weight.nested_quant_map"] = packed["nested_map"].flatten()
        offset = packed["nested_offset"].unique()
        if len(offset) != 1:
            raise ValueError("nested_offset must be the same for all rows, as bitsandbytes has it")
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    octets = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {STATE + format.name: octets}


def _runs(packed: Packed) -> Tensor:
    """nested_absmax of every run of 256 over the flattened absmax."""
    n, blocks = packed["scale"].shape
    first = torch.arange(n, device=packed["scale"].device)[:, None] * blocks
    if not torch.equal(packed["nested_start"].long(), first % NESTED_BLOCK):
        raise ValueError(
            "the rows' nested scales must be runs over the whole weight, from its first row"
        )
    run = torch.arange(-(-n * blocks // NESTED_BLOCK), device=first.device)
    row = run * NESTED_BLOCK // blocks  # the row in which a run begins
    return packed["nested_absmax"][row, run - row * blocks // NESTED_BLOCK]
