"""Layers of 8- and 4-bit floats, which several tools store alike but for names and reciprocals."""

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.codes import pack_nibbles
from tlk.quant.files._bits import low_first, pair_low_first
from tlk.quant.files.layer import SCALES, Layer, Tensors
from tlk.quant.format import BLOCK, Packed
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8

POWERS = (torch.uint8, torch.float8_e8m0fnu)
"""How powers of two are stored: e + 127, one byte."""


def fp8_layer(
    t: Tensors,
    shape: tuple[int, int],
    granularity: str | None,
    scale: str,
    *,
    input_scale: str | None = None,
    weight_only: bool = False,
) -> Layer:
    """A layer of weight E4M3 [N, K] with the tensor named `scale`, which multiplies.

    granularity: "tensor" (a scale of one element, stored here for every output), "channel" ([N] or
    [N, 1]) or "block" ([N/128, K/128] rounded up). input_scale: the name of that of static activations.
    """
    n, k = shape
    packed: Packed = {"weight": t.take("weight", torch.float8_e4m3fn, n, k)}
    if granularity == "tensor":
        packed["scale"] = _numbers(t, scale, 1).reshape(1, 1).expand(n, 1).contiguous()
        format = Fp8("tensor", static=input_scale is not None, weight_only=weight_only)
    elif granularity == "channel":
        dims = t.tensors[scale].dim() if t.has(scale) else 2
        packed["scale"] = _numbers(t, scale, *((n,) if dims == 1 else (n, 1))).reshape(n, 1)
        format = Fp8("channel", static=input_scale is not None, weight_only=weight_only)
    elif granularity == "block":
        packed["scale"] = _numbers(t, scale, -(-n // BLOCK), -(-k // BLOCK))
        format = Fp8("block", weight_only=weight_only)
    else:
        raise UnsupportedError(f"{t.module}: 8-bit floats with scales per {granularity}")
    if input_scale is not None:
        packed["input_scale"] = t.scale(input_scale, 1).float().reshape(1, 1)
    return Layer(format, packed)


def _numbers(t: Tensors, name: str, *shape: int) -> Tensor:
    """The scale `name` in float32, stored as such, in 16 bit or as powers of two."""
    if not t.has(name) or t.tensors[name].dtype not in POWERS:
        return t.scale(name, *shape, dtypes=SCALES).float()
    bits = t.take(name, POWERS, *shape)
    return powers(t, name, bits).view(torch.float8_e8m0fnu).float()


def powers(t: Tensors, name: str, stored: Tensor) -> Tensor:
    """Powers of two as their bytes; CheckpointError for 255, which is no number."""
    octets = stored.view(torch.uint8)
    if (octets == 255).any():
        raise CheckpointError(f"{t.name(name)} holds scales that are no number (255)")
    return octets


def mxfp4_layer(t: Tensors, pairs: Tensor, scale: Tensor, shape: tuple[int, int]) -> Layer:
    """A layer of bytes uint8 [N, K/2], first code low, and powers of two uint8 [N, K/32]."""
    _check_inputs(t, shape[1], 32)
    octets = powers(t, "weight_scale", scale).contiguous()
    return Layer(MXFP4(), {"weight": pack_nibbles(low_first(pairs), 32), "scale": octets})


def nvfp4_layer(
    t: Tensors, pairs: Tensor, scale: str, global_scale: Tensor, shape: tuple[int, int]
) -> Layer:
    """A layer of bytes uint8 [N, K/2], first code low, the E4M3 tensor `scale` [N, K/16], and one float."""
    n, k = shape
    _check_inputs(t, k, 16)
    blocks = t.scale(scale, n, k // 16, dtypes=(torch.float8_e4m3fn,))
    packed = {
        "weight": pack_nibbles(low_first(pairs), 16),
        "scale": blocks.contiguous(),
        "global_scale": global_scale.float().reshape(1, 1).expand(n, 1).contiguous(),
    }
    return Layer(NVFP4(), packed)


def _check_inputs(t: Tensors, k: int, unit: int) -> None:
    if k % unit:
        raise CheckpointError(f"{t.module} has {k} inputs, which groups of {unit} do not divide")


def write_pairs(codes: Tensor) -> Tensor:
    """The bytes of 4-bit `codes` [N, K], first code low."""
    return pair_low_first(codes)


def from_gpt_oss(blocks: Tensor, scales: Tensor, *, interleaved: bool) -> Packed:
    """The MXFP4 tensors of all experts of a gpt-oss layer, as MXFP4's packed tensors [E, N, …].

    blocks uint8 [E, N, K/32, 16], scales uint8 [E, N, K/32]. interleaved: rows are gate, up, gate, up
    (gate_up_proj), here [gate; up]. CheckpointError for other shapes or scales that are no number.
    """
    t = Tensors("experts", {})
    experts, n, groups = scales.shape
    if blocks.shape != (experts, n, groups, 16):
        raise CheckpointError(
            f"experts' blocks must have shape {[experts, n, groups, 16]}, got {list(blocks.shape)}"
        )
    powers(t, "scales", scales)
    if interleaved:
        blocks = torch.cat([blocks[:, ::2], blocks[:, 1::2]], 1)
        scales = torch.cat([scales[:, ::2], scales[:, 1::2]], 1)
    codes = low_first(blocks.reshape(experts * n, groups * 16))
    weight = pack_nibbles(codes, 32).view(experts, n, groups * 16)
    return {"weight": weight, "scale": scales.contiguous()}
