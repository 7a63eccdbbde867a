"""Quantized codes as pairs of float16 or bfloat16 numbers in a register, two at a time.

A 32-bit word of codes becomes planes of pairs: halves of a word that lie 16 bits apart are decoded by the
same few bit operations, and the pair is what a tensor core's register holds. No code is converted as an
integer (16 lanes a cycle and SM) and none is moved to another lane.

- int4: a code in the top mantissa bits of 16.0 is 16 + q; minus (16 + z), exactly.
- int8: float16 holds 1024 + (q + 128). bfloat16 has 7 bits of mantissa: 128 + the low 7 bits, minus 128
  or, where the sign bit moved the exponent, 256.
- fp8 and e2m1: the bits at their places in a number with a smaller exponent, times a power of two.
- table4: byte permutes look up the low and the high bytes of four codes among 8 entries, twice, and
  choose by the fourth bit.
"""

import triton
import triton.language as tl


@triton.jit
def _fma(a, b, c, HALF: tl.constexpr):
    """a · b + c of pairs, rounded once; float16 if HALF, else bfloat16."""
    if HALF:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _and_or(a, b, c):
    """(a & b) | c in one instruction, which the compiler does not find for two constants."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [a, b, c],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _permute(a, b, selector):
    """Four of the eight bytes of b:a, as the low four hex digits of `selector` say (each below 8)."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _scaled(pairs, factor, HALF: tl.constexpr):
    """pairs · factor, two pairs as int32."""
    return _fma(pairs, factor, tl.full(pairs.shape, -0x7FFF8000, tl.int32), HALF)  # -0, -0


@triton.jit
def _twice(bits):
    """The pair of a number whose 16 bits are the low ones of an int32."""
    return bits | (bits << 16)


@triton.jit
def _number_pair(value, DTYPE: tl.constexpr):
    """The pair of a float32, rounded to DTYPE."""
    return _twice(value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def _shifted(w, BY: tl.constexpr):
    """w shifted to the right, or to the left where BY is negative."""
    if BY >= 0:
        return w >> BY
    else:
        return w << -BY


@triton.jit
def _unsigned4(w, BIT: tl.constexpr, HALF: tl.constexpr):
    """16 + q for the codes of four bits at BIT and BIT + 16."""
    if HALF:
        mask = tl.full(w.shape, 0x03C003C0, tl.int32)
        return _and_or(_shifted(w, BIT - 6), mask, tl.full(w.shape, 0x4C004C00, tl.int32))
    else:
        mask = tl.full(w.shape, 0x00780078, tl.int32)
        return _and_or(_shifted(w, BIT - 3), mask, tl.full(w.shape, 0x41804180, tl.int32))


@triton.jit
def _signed8(w, BIT: tl.constexpr, HALF: tl.constexpr):
    """The int8 codes at BIT and BIT + 16; 1152 more if HALF."""
    v = _shifted(w, BIT)
    if HALF:
        return (v & 0x00FF00FF) ^ 0x64806480
    else:
        offset = tl.full(w.shape, 0x43004300, tl.int32)
        low = _and_or(v, tl.full(w.shape, 0x007F007F, tl.int32), offset)
        sign = _and_or(v, tl.full(w.shape, 0x00800080, tl.int32), offset)
        return _fma(sign, tl.full(w.shape, -0x407F4080, tl.int32), low, HALF)  # low - sign


@triton.jit
def _e4m3_pair(w, BIT: tl.constexpr, HALF: tl.constexpr):
    """The e4m3 codes at BIT and BIT + 16; NaN counts as 480."""
    v = _shifted(w, BIT - 8)
    signs = tl.full(w.shape, -0x7FFF8000, tl.int32)
    if HALF:
        bits = _and_or(v, signs, (v >> 1) & 0x3F803F80)
        return _scaled(bits, tl.full(w.shape, 0x5C005C00, tl.int32), HALF)  # 2⁸
    else:
        bits = _and_or(v, signs, (v >> 4) & 0x07F007F0)
        return _scaled(bits, tl.full(w.shape, 0x7B807B80, tl.int32), HALF)  # 2¹²⁰


@triton.jit
def _e2m1_pair(w, BIT: tl.constexpr, HALF: tl.constexpr):
    """The e2m1 codes at BIT and BIT + 16."""
    v = _shifted(w, BIT - 12)
    signs = tl.full(w.shape, -0x7FFF8000, tl.int32)
    if HALF:
        bits = _and_or(v, signs, (v >> 3) & 0x0E000E00)
        return _scaled(bits, tl.full(w.shape, 0x74007400, tl.int32), HALF)  # 2¹⁴
    else:
        bits = _and_or(v, signs, (v >> 6) & 0x01C001C0)
        return _scaled(bits, tl.full(w.shape, 0x7E807E80, tl.int32), HALF)  # 2¹²⁶


@triton.jit
def _table_bytes(table_ptr, FIRST: tl.constexpr, BYTE: tl.constexpr, DTYPE: tl.constexpr):
    """Low or high bytes of four entries of the table, rounded to DTYPE, as one int32."""
    word = 0
    for i in tl.static_range(4):
        value = tl.load(table_ptr + FIRST + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        word |= ((value >> (8 * BYTE)) & 0xFF) << (8 * i)
    return word


@triton.jit
def _table(table_ptr, DTYPE: tl.constexpr):
    """The low bytes of 16 entries in four registers, and their high bytes."""
    return (
        _table_bytes(table_ptr, 0, 0, DTYPE), _table_bytes(table_ptr, 4, 0, DTYPE),
        _table_bytes(table_ptr, 8, 0, DTYPE), _table_bytes(table_ptr, 12, 0, DTYPE),
        _table_bytes(table_ptr, 0, 1, DTYPE), _table_bytes(table_ptr, 4, 1, DTYPE),
        _table_bytes(table_ptr, 8, 1, DTYPE), _table_bytes(table_ptr, 12, 1, DTYPE),
    )  # fmt: skip


@triton.jit
def _looked_up(v, table):
    """Entries of the table for four codes: those of codes 0 and 2 as a pair, those of 1 and 3."""
    zero = tl.zeros(v.shape, tl.int32)
    index = v & 0x7777
    fourth = _and_or(v >> 1, zero + 0x4444, zero + 0x3210)
    low = _permute(
        _permute(zero + table[0], zero + table[1], index),
        _permute(zero + table[2], zero + table[3], index),
        fourth,
    )
    high = _permute(
        _permute(zero + table[4], zero + table[5], index),
        _permute(zero + table[6], zero + table[7], index),
        fourth,
    )
    return _permute(low, high, zero + 0x6240), _permute(low, high, zero + 0x7351)


@triton.jit
def _pairs(w, BIT: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr):
    """The codes at BIT and BIT + 16, without zero points and scales; not of a table."""
    if KIND == "int4":
        return _unsigned4(w, BIT, HALF)
    elif KIND == "int8":
        return _signed8(w, BIT, HALF)
    elif KIND == "fp8":
        return _e4m3_pair(w, BIT, HALF)
    else:
        return _e2m1_pair(w, BIT, HALF)


@triton.jit
def _less(pairs, zero, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """pairs of `_pairs` minus `zero`: pairs of its negative from `_minus`, or None where none is stored."""
    HALF: tl.constexpr = tl.float16 == DTYPE
    one: tl.constexpr = 0x3C003C00 if HALF else 0x3F803F80
    if zero is not None:
        return _fma(pairs, tl.full(pairs.shape, one, tl.int32), zero, HALF)
    elif KIND == "int4":
        minus: tl.constexpr = -0x31FF3200 if HALF else -0x3E3F3E40  # -24, -24
        return _fma(
            pairs, tl.full(pairs.shape, one, tl.int32), tl.full(pairs.shape, minus, tl.int32), HALF
        )
    elif KIND == "int8" and HALF:
        minus: tl.constexpr = -0x1B7F1B80  # -1152, -1152
        return _fma(
            pairs, tl.full(pairs.shape, one, tl.int32), tl.full(pairs.shape, minus, tl.int32), HALF
        )
    else:
        return pairs


@triton.jit
def _minus(zero, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What `_less` adds for stored zero points: they and the offset of `_pairs`, negative."""
    if KIND == "int4":
        offset: tl.constexpr = 16.0
    else:
        offset: tl.constexpr = 1152.0 if tl.float16 == DTYPE else 0.0
    return _number_pair(-(zero.to(tl.float32) + offset), DTYPE)
