"""Codes of a table of 16 numbers, two at a time: a byte is an index of the 256 pairs of them.

The pairs lie in shared memory, 32 times: a lane reads its own copy, all of which lies in one bank, so that no
two lanes of a warp ever want the same bank. Pair p of lane l is at 128 · p + 4 · l, which one `dp4a` makes
of a byte in its place and l's address: Σ byteᵢ · factorᵢ with one factor 128 and three zeros. Eight codes
take four of these, which run where multiply-adds do, and four loads; byte permutes that look up four codes
among eight entries take 23 instructions in the pipe of integer operations, half as wide as an SM issues.

The array is declared in assembly, 32 KiB beside what Triton allocates: no operation of Triton 3.6 to 3.9
reads shared memory at an address that a lane computes.
"""

import triton
import triton.language as tl

from tlk.kernels._dequant_pairs import _numbers, _scaled


@triton.jit
def _shared_tables():
    """The address of 32 KiB of shared memory for pairs, and 1 KiB for 256 numbers."""
    return tl.inline_asm_elementwise(
        "{ .shared .align 128 .b8 tables[33792]; mov.u32 $0, tables; }", "=r", [],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _store_four(address, value):
    """Write the 32 bits of `value` four times from `address` on."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;", "=r,r,r", [address, value],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _store(address, value):
    """Write 32 bits."""
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, value],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_shared(address):
    """32 bits at `address`, which no one writes any more."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _written(address):
    """`address`, not before all threads have written; an assembly that is not pure stays behind a barrier."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _lane():
    """The place of a thread in its warp."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _byte_times_128(w, BYTE: tl.constexpr, plus):
    """128 · (byte BYTE of w) + plus."""
    factors: tl.constexpr = 0x80 << (8 * BYTE) if BYTE < 3 else -0x80000000
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r",
        [w, tl.full(w.shape, factors, tl.int32), tl.zeros(w.shape, tl.int32) + plus],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _tables(table_ptr, map_ptr, DTYPE: tl.constexpr):
    """Write the pairs of the 16 float32 at `table_ptr`, rounded to DTYPE, and 256 float32 if `map_ptr` is given.

    Returns the address of a lane's copy of the pairs, and that of the 256. The number of a byte's low half
    is the low half of its pair.
    """
    pairs = _shared_tables()
    pair = tl.arange(0, 256)[None, :]
    # `&` and not `%`: nothing the compiler would load in vectors, in a layout of its own
    low = tl.load(table_ptr + (pair & 15)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    high = tl.load(table_ptr + (pair >> 4)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    # eight times the copies of four lanes; threads that store at once store to different banks
    lanes = (tl.arange(0, 8)[:, None] + pair) % 8
    _store_four(pairs + (pair * 128 + lanes * 16), low & 0xFFFF | high << 16)
    if map_ptr is not None:
        # a row of them: the compiler gives loads of equal shape one layout, and there are others of 256
        i = tl.arange(0, 256)[None, :]
        _store(pairs + (32768 + i * 4), tl.load(map_ptr + i).to(tl.int32, bitcast=True))
    pairs = _written(pairs)
    return pairs + _lane() * 4, pairs + 32768


@triton.jit
def _nested_scale(code, absmax, offset, values):
    """Scales of nested codes, whose 256 values lie in shared memory at `values`."""
    inner = _load_shared(values + code.to(tl.int32) * 4)
    return inner.to(tl.float32, bitcast=True) * absmax + offset


@triton.jit
def _found(w, BYTE: tl.constexpr, factor, pairs, DTYPE: tl.constexpr):
    found = _load_shared(_byte_times_128(w, BYTE, pairs))
    if factor is not None:
        found = _scaled(found, factor, tl.float16 == DTYPE)
    return _numbers(found, DTYPE)


@triton.jit
def _looked_up_bytes(w, factor, pairs, DTYPE: tl.constexpr):
    """Words of codes as numbers: three more dimensions of two, a byte's halves and a word's bytes."""
    low = tl.join(_found(w, 0, factor, pairs, DTYPE), _found(w, 1, factor, pairs, DTYPE))
    high = tl.join(_found(w, 2, factor, pairs, DTYPE), _found(w, 3, factor, pairs, DTYPE))
    return tl.join(low, high)
