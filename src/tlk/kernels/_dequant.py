"""How quantized weights lie in memory, checks of their tensors, and decoders in Triton to float32.

| kind | bits of a code | value | group |
|---|---|---|---|
| int4 | unsigned | (q - z) · s, z = 8 if there is none | 32, 64, 128 or K |
| int8 | signed | (q - z) · s | powers of two from 16, or K |
| table4 | index of `table` | table[q] · absmax | powers of two from 32, or K |
| mx4 | e2m1 | q · 2^(s - 127) | 32 |
| nv4 | e2m1 | q · (s · global), s in e4m3 | 16 |
| fp8 | e4m3 | q · s | rows, or blocks of 128 × 128 |

Products in float32, in this order. Codes of four bits: byte j of a group of G inputs holds code j in its low
half and code j + G/2 in its high one. Integers become floats without a conversion instruction, of which
an SM has 16 lanes a cycle and not 64 or 128: their bits go into the mantissa of a power of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._ints import cdiv

KINDS = ("int4", "int8", "table4", "mx4", "nv4", "fp8")
BLOCK = 128  # rows and columns of a block of fp8
NESTED = 256  # values of absmax under one absmax of their own


@dataclass(frozen=True, slots=True)
class Quantized:
    """The tensors of one weight [N, K], as `dequant_mm` takes them; `nested` is empty or four tensors."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    global_scale: Tensor | None
    nested: list[Tensor]
    kind: str
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        n, width = self.weight.shape
        return n, width * halves(self.kind)

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one scale, so that its codes are not in groups."""
        return not self.blocks and self.scale.shape[1] == 1 and self.kind not in ("mx4", "nv4")

    @property
    def blocks(self) -> bool:
        """Whether a scale serves a block of rows, and not one row."""
        return self.kind == "fp8" and self.scale.shape != (self.weight.shape[0], 1)


def check_quantized(w: Quantized) -> None:
    """Raise TypeError or ValueError unless the tensors of `w` are those of its kind."""
    if w.kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {w.kind!r}")
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(w.kind, torch.uint8)
    check_dtype("weight", w.weight, stored)
    check_shape("weight", w.weight, None, None)
    check_last_dim_contiguous("weight", w.weight)
    n, k = w.shape
    check_group_size(w, k)
    groups = k // w.group_size
    if w.blocks:
        check_shape("scale", w.scale, cdiv(n, BLOCK), cdiv(k, BLOCK))
    elif w.kind == "int8" and w.scale.shape[-1:] == (1,):
        check_shape("scale", w.scale, n, 1)
        groups = 1
    else:
        check_shape("scale", w.scale, n, 1 if w.kind == "fp8" else groups)
    check_dtype("scale", w.scale, *scale_dtypes(w))
    check_extras(w, n, groups)


def check_group_size(w: Quantized, k: int) -> None:
    sizes: tuple[int, ...] = {
        "int4": (32, 64, 128, k), "mx4": (32,), "nv4": (16,), "fp8": (BLOCK, k)
    }.get(w.kind, (w.group_size,))  # fmt: skip
    if w.group_size not in sizes or w.group_size < 1:
        raise ValueError(f"group_size of {w.kind} must be one of {sizes}, got {w.group_size}")
    if k % w.group_size and w.kind != "fp8":
        raise ValueError(f"group_size must divide the {k} inputs, got {w.group_size}")
    smallest = {"table4": 32, "int8": 16}.get(w.kind, 1)
    if w.group_size != k and (w.group_size < smallest or w.group_size & (w.group_size - 1)):
        raise ValueError(
            f"group_size of {w.kind} must be {k} or a power of two from {smallest}, got {w.group_size}"
        )


def scale_dtypes(w: Quantized) -> tuple[torch.dtype, ...]:
    return {
        "table4": (torch.uint8 if w.nested else torch.float32,),
        "mx4": (torch.uint8,),
        "nv4": (torch.float8_e4m3fn,),
        "fp8": (torch.float32,),
    }.get(w.kind, FLOATS)


def check_extras(w: Quantized, n: int, groups: int) -> None:
    needed = {"table": w.kind == "table4", "global_scale": w.kind == "nv4"}
    for name, there in (("table", w.table), ("global_scale", w.global_scale)):
        if needed[name] != (there is not None):
            must = "needs" if needed[name] else "takes no"
            raise ValueError(f"kind {w.kind} {must} {name}")
    if w.zero is not None and w.kind not in ("int4", "int8"):
        raise ValueError(f"kind {w.kind} takes no zero")
    if w.nested and w.kind != "table4":
        raise ValueError(f"kind {w.kind} takes no nested")
    if w.nested and len(w.nested) != 4:
        raise ValueError(
            f"nested must be absmax, start, map and offset, got {len(w.nested)} tensors"
        )
    known: list[tuple[str, Tensor | None, torch.dtype, tuple[int | None, int]]] = [
        ("zero", w.zero, torch.uint8 if w.kind == "int4" else torch.int8, (n, groups)),
        ("table", w.table, torch.float32, (1, 16)),
        ("global_scale", w.global_scale, torch.float32, (n, 1)),
    ]
    if w.nested:
        absmax, start, values, offset = w.nested
        known += [
            ("nested absmax", absmax, torch.float32, (n, absmax.shape[-1])),
            ("nested start", start, torch.int32, (n, 1)),
            ("nested map", values, torch.float32, (1, 256)),
            ("nested offset", offset, torch.float32, (n, 1)),
        ]
    for name, tensor, dtype, shape in known:
        if tensor is not None:
            check_dtype(name, tensor, dtype)
            check_shape(name, tensor, *shape)
    for name, tensor in (("scale", w.scale), *((name, t) for name, t, *_ in known)):
        if tensor is not None:
            check_device(name, tensor, w.weight.device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def halves(kind: str) -> int:
    """How many codes share a byte."""
    return 1 if kind in ("int8", "fp8") else 2


def run_bytes(w: Quantized) -> int:
    """How many bytes of a row kernels that go group by group take as one, a power of two."""
    return 128 if w.whole_rows else w.group_size // halves(w.kind)


def as_bytes(tensor: Tensor) -> Tensor:
    """Values of fp8 as the bytes that store them: below sm_89 Triton does not know their type."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@triton.jit
def _small_int(q):
    """An int32 of 0 to 2²³ - 1 as float32."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _e4m3(byte):
    """The float32 that `byte`, an int32, stands for; 0x7F and 0xFF are NaN."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰: the exponents' biases
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _e2m1(code):
    """The float32 that `code`, an int32 of four bits, stands for."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2¹²⁶


@triton.jit
def _e8m0(byte):
    """2^(byte - 127) of an int32, and infinity for 255."""
    return tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def _group_scale(
    scale_ptr, global_ptr, row, group, mask, groups, KIND: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """The float32 scale of `group` of `row`."""
    scale_row = row // 128 if BLOCKS else row
    stored = tl.load(scale_ptr + scale_row * groups + group, mask, other=0)
    if KIND == "mx4":
        return _e8m0(stored.to(tl.int32))
    elif KIND == "nv4":
        return _e4m3(stored.to(tl.int32)) * tl.load(global_ptr + row, mask, other=0.0)
    else:
        return stored.to(tl.float32)


@triton.jit
def _values(
    w, scale_ptr, zero_ptr, table_ptr, global_ptr, row, run, in_run, groups,
    KIND: tl.constexpr, WHOLE_ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """float32 values of bytes `w` [..., runs, bytes], int32: of low halves and of high ones, or twice all.

    A run is a group's bytes. `row`, `run` and their mask `in_run` have no dimension of bytes: spread over
    bytes, every byte would load its scale.
    """
    group = run * 0 if WHOLE_ROWS else run
    mask = in_run & (row >= 0)
    s = _group_scale(scale_ptr, global_ptr, row, group, mask, groups, KIND, BLOCKS)
    s = tl.expand_dims(s, -1)
    z = 8.0 if KIND == "int4" else 0.0
    if zero_ptr is not None:
        z = tl.load(zero_ptr + row * groups + group, mask, other=0).to(tl.float32)
        z = tl.expand_dims(z, -1)
    if KIND == "fp8":
        value = _e4m3(w) * s
        return value, value
    elif KIND == "int8":
        value = (_small_int(w + 128) - 128.0 - z) * s
        return value, value
    elif KIND == "int4":
        return (_small_int(w & 15) - z) * s, (_small_int(w >> 4) - z) * s
    elif KIND == "table4":
        return _looked_up_wide(table_ptr, w & 15) * s, _looked_up_wide(table_ptr, w >> 4) * s
    else:
        return _e2m1(w & 15) * s, _e2m1(w >> 4) * s


@triton.jit
def _looked_up_wide(table_ptr, code):
    """The float32 entries of a table of 16."""
    table = tl.load(table_ptr + tl.arange(0, 16))
    found = tl.gather(table, tl.reshape(code, (code.numel,)), 0)
    return tl.reshape(found, code.shape)
