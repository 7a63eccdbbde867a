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

from tlk.kernels._dequant import _e4m3, _e8m0


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
def _table_bits(table_ptr, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """Two entries of the table, rounded to DTYPE, as the halves of an int32."""
    both = tl.load(table_ptr.to(tl.pointer_type(tl.int64)) + FIRST // 2)
    low = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True).to(DTYPE)
    high = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True).to(DTYPE)
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | high.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _table_bytes(table_ptr, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """The low bytes of four entries of the table as one int32, and their high bytes."""
    a = _table_bits(table_ptr, FIRST, DTYPE)
    b = _table_bits(table_ptr, FIRST + 2, DTYPE)
    low = (a & 0xFF) | (a >> 8 & 0xFF00) | (b & 0xFF) << 16 | (b << 8 & -0x1000000)
    return low, (a >> 8 & 0xFF) | (a >> 16 & 0xFF00) | (b << 8 & 0xFF0000) | (b & -0x1000000)


@triton.jit
def _table(table_ptr, DTYPE: tl.constexpr):
    """The low bytes of 16 entries in four registers, and their high bytes."""
    l0, h0 = _table_bytes(table_ptr, 0, DTYPE)
    l1, h1 = _table_bytes(table_ptr, 4, DTYPE)
    l2, h2 = _table_bytes(table_ptr, 8, DTYPE)
    l3, h3 = _table_bytes(table_ptr, 12, DTYPE)
    return l0, l1, l2, l3, h0, h1, h2, h3


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
        middle: tl.constexpr = -0x1B7F1B80  # -1152, -1152
        return _fma(
            pairs, tl.full(pairs.shape, one, tl.int32), tl.full(pairs.shape, middle, tl.int32), HALF
        )
    else:
        return pairs


@triton.jit
def _minus(zero, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What `_less` adds for stored zero points: they and the offset of `_pairs`, negative."""
    of_bytes: tl.constexpr = 1152.0 if tl.float16 == DTYPE else 0.0
    offset: tl.constexpr = 16.0 if KIND == "int4" else of_bytes
    return _number_pair(-(zero.to(tl.float32) + offset), DTYPE)


@triton.jit
def _stored_scale(scale_ptr, row, group, mask, groups, KIND: tl.constexpr):
    """The scale of a group as it is stored; two in an int16 for nv4."""
    if KIND == "nv4":
        pairs = scale_ptr.to(tl.pointer_type(tl.int16))
        return tl.load(pairs + row * (groups // 2) + group // 2, mask, other=0)
    elif KIND == "fp8":
        return tl.load(scale_ptr + row // 128 * groups + group, mask, other=0.0)
    else:
        return tl.load(scale_ptr + row * groups + group, mask, other=0)


@triton.jit
def _scale_pair(stored, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Scales as pairs of DTYPE; a last dimension of two for nv4."""
    if KIND == "nv4":
        both = stored.to(tl.int32)
        low = _number_pair(_e4m3(both & 0xFF), DTYPE)
        return tl.join(low, _number_pair(_e4m3(both >> 8 & 0xFF), DTYPE))
    elif KIND == "mx4":
        exponent = stored.to(tl.int32)
        if tl.bfloat16 == DTYPE:
            return _twice(tl.where(exponent == 0, 0x40, exponent << 7))
        else:
            return _number_pair(_e8m0(exponent), DTYPE)
    else:
        return _number_pair(stored, DTYPE)


@triton.jit
def _numbers(pairs, DTYPE: tl.constexpr):
    """int32 pairs as DTYPE, with a last dimension of two."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _finished(pairs, zero, factor, KIND: tl.constexpr, DTYPE: tl.constexpr):
    pairs = _less(pairs, zero, KIND, DTYPE)
    if factor is not None:
        pairs = _scaled(pairs, factor, tl.float16 == DTYPE)
    return _numbers(pairs, DTYPE)


@triton.jit
def _decoded(w, zero, factor, table, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Words of codes as numbers: two more dimensions of two of a word's pairs, one of its halves."""
    HALF: tl.constexpr = tl.float16 == DTYPE
    if KIND == "table4":
        p0, q0 = _looked_up(w, table)
        p1, q1 = _looked_up(w >> 16, table)
    else:
        p0 = _pairs(w, 0, KIND, HALF)
        p1 = _pairs(w, 8, KIND, HALF)
    low = tl.join(
        _finished(p0, zero, factor, KIND, DTYPE), _finished(p1, zero, factor, KIND, DTYPE)
    )
    if KIND == "int8" or KIND == "fp8":
        return low
    else:
        if KIND != "table4":
            q0 = _pairs(w, 4, KIND, HALF)
            q1 = _pairs(w, 12, KIND, HALF)
        high = tl.join(
            _finished(q0, zero, factor, KIND, DTYPE), _finished(q1, zero, factor, KIND, DTYPE)
        )
        return tl.join(low, high)
