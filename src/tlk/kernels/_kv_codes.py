"""Keys and values in 8 bits: e4m3 or int8 codes, and a float32 scale for each kv head.

    code = cast(x / scale),   x ≈ code · scale

e4m3 codes are rounded to nearest even and end at ±448, int8 codes at ±127. A product of a half-precision
row with codes needs no scale inside: of keys it multiplies the scores, of values the result. All codes are
exact in float16. GPUs below sm_89 do not know e4m3 (sm_89 rounds to it twice): there the bytes are made and
read by integer arithmetic, in which NaN is not a number apart (480 when read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tlk.kernels._check import check_device, check_dtype, check_last_dim_contiguous, check_shape
from tlk.kernels._device import sm

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
CODES = tuple(LARGEST)


def encode_reference(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` [..., Hk, D] as a cache of `dtype` stores it; `scale` [Hk] or None, which is 1."""
    if dtype not in LARGEST:
        return x.to(dtype)
    y = x.float() if scale is None else x.float() / scale[:, None]
    y = y.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (y.round() if dtype == torch.int8 else y).to(dtype)


def decode_reference(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Pages [..., Hk, page, D] as float32, or as they are unless they hold codes."""
    if codes.dtype not in LARGEST:
        return codes
    return codes.float() if scale is None else codes.float() * scale[:, None, None]


@triton.jit
def _round_to_e4m3(x):
    """The byte of float32 `x` within ±448, by integer arithmetic."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2⁻⁶ codes are multiples of 2⁻⁹, which is what float32 rounds to above 2¹⁴
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(bits < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def encode(x, scale, dtype: tl.constexpr):
    """float32 `x` as stored in `dtype`; uint8 stands for e4m3."""
    if dtype.primitive_bitwidth > 8:
        stored = x.to(dtype)
    else:
        largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
        x = tl.math.div_rn(x, scale)
        x = tl.clamp(x, -largest, largest)
        if dtype == tl.int8:
            stored = libdevice.rint(x).to(tl.int8)
        elif dtype == tl.uint8:
            stored = _round_to_e4m3(x)
        else:
            stored = x.to(dtype)
    return stored


@triton.jit
def decode(codes):
    """Codes as float32 numbers, unscaled; uint8 stands for e4m3. Numbers as float32."""
    if codes.dtype == tl.uint8:  # e4m3's exponent is 8 less than float16's
        wide = codes.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        numbers = codes.to(tl.float32)
    return numbers


# Each turns two pairs of codes, in a register of 32 bits, into the two first and the two second of them.
# Of e4m3 where there is no such type the 256th part comes, which is exact too.
E4M3 = tl.constexpr("""{
.reg .b32 codes; .reg .b16 first, second;
prmt.b32 codes, $2, 0, 0x3120;
mov.b32 {first, second}, codes;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")
E4M3_BITS = tl.constexpr("""{
.reg .b32 sign, rest;
shl.b32 sign, $2, 8;
and.b32 sign, sign, 0x80008000;
shl.b32 rest, $2, 7;
lop3.b32 $0, rest, 0x3f803f80, sign, 0xea;
and.b32 sign, $2, 0x80008000;
shr.u32 rest, $2, 1;
lop3.b32 $1, rest, 0x3f803f80, sign, 0xea;
}""")
INT8 = tl.constexpr("""{
.reg .b32 codes, offset;
xor.b32 codes, $2, 0x80808080;
mov.b32 offset, 0x64806480;
prmt.b32 $0, codes, 0x64646464, 0x4240;
prmt.b32 $1, codes, 0x64646464, 0x4341;
sub.rn.f16x2 $0, $0, offset;
sub.rn.f16x2 $1, $1, offset;
}""")


@triton.jit
def unpair(pairs, dtype: tl.constexpr, KIND: tl.constexpr):
    """int16 pairs of codes as their first and their second numbers, unscaled, in `dtype`."""
    asm: tl.constexpr = INT8 if KIND == "int8" else E4M3 if KIND == "e4m3" else E4M3_BITS
    first, second = tl.inline_asm_elementwise(
        asm, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )
    return first.to(dtype), second.to(dtype)


def code_kind(cache: Tensor) -> str | None:
    """What `unpair` does with the codes of `cache` on its device; None if it holds none."""
    if cache.dtype == torch.float8_e4m3fn:
        return "e4m3" if sm(cache.device) >= 89 else "e4m3_bits"
    return "int8" if cache.dtype == torch.int8 else None


def as_bytes(cache: Tensor) -> Tensor:
    """Codes as bytes, which torch can index on every device; numbers as they are."""
    return cache.view(torch.uint8) if cache.dtype in LARGEST else cache


def as_pairs(cache: Tensor) -> Tensor:
    """`cache` as `unpair` reads it, [..., D / 2]."""
    return cache.view(torch.int16)


def readable(cache: Tensor) -> Tensor:
    """`cache` as `decode` reads it: the bytes of e4m3 below sm_89."""
    unknown = cache.dtype == torch.float8_e4m3fn and sm(cache.device) < 89
    return cache.view(torch.uint8) if unknown else cache


def writable(cache: Tensor) -> Tensor:
    """`cache` as kernels on its device can round to it: the bytes of e4m3 below sm_90."""
    unknown = cache.dtype == torch.float8_e4m3fn and sm(cache.device) < 90
    return cache.view(torch.uint8) if unknown else cache


def check_scales(cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise unless both scales or none are there, for an 8-bit cache [P, Hk, page, D]."""
    if (k_scale is None) != (v_scale is None):
        missing = "k_scale" if k_scale is None else "v_scale"
        raise ValueError(f"{missing} must not be None, the other is not")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            if cache.dtype not in LARGEST:
                raise ValueError(f"{name} must be None for a cache of {cache.dtype}, got a tensor")
            check_dtype(name, scale, torch.float32)
            check_shape(name, scale, cache.shape[1])
            check_device(name, scale, cache.device)
            check_last_dim_contiguous(name, scale)
