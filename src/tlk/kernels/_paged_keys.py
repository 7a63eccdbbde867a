"""The loop of paged attention over tiles of keys: online softmax, masks, and codes of 8 bits.

8-bit caches are read as pairs of neighbours in 16 bits, which tensor cores' operands can be loaded as: the
first of all pairs and the second make a product each, the scores are their sum, and the result comes in
halves that alternate.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from tlk.kernels._kv_codes import decode, unpair

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    if EXACT:
        return libdevice.tanh(x)
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)  # absolute error 1e-7


@triton.jit
def _pages(table_ptr, tile, first, last, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each key of a tile, [BLOCK_N, 1] or one for all; 0 outside [first, last)."""
    if PAGE % BLOCK_N == 0:
        seen = tile * BLOCK_N < last  # and never left of `first`, where no tile begins
        page = tl.load(table_ptr + tile * BLOCK_N // PAGE, mask=seen, other=0)
    else:
        n = tl.arange(0, BLOCK_N)
        key = tile * BLOCK_N + n
        entry = key // PAGE
        if BLOCK_N % PAGE == 0:  # the same, but without a division in the loop
            entry = tile * (BLOCK_N // PAGE) + n // PAGE
        seen = (key >= first) & (key < last)
        page = tl.load(table_ptr + entry, mask=seen, other=0)[:, None]
    return page


@triton.jit
def rows_for_codes(q, scale, PAIRS: tl.constexpr):
    """Rows [BLOCK_M, D] for products with codes: halves of alternate columns, and a scale a row.

    bfloat16 becomes float16, in which codes are exact and cheap to make; powers of 2 bring each row
    into its range, of at most 2⁶³: below 2⁻⁶³ scores are 0, and a smaller scale, times that of the
    codes, would be flushed to 0 and make NaN of a mask's infinity. Without PAIRS all stays as it is.
    """
    odd = q
    if PAIRS is not None:
        if q.dtype == tl.bfloat16:
            top = tl.max(tl.abs(q.to(tl.float32)), 1)
            exponent = tl.minimum(tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 64), 253)
            shrink = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
            q = (q.to(tl.float32) * shrink[:, None]).to(tl.float16)
            scale *= (exponent << 23).to(tl.float32, bitcast=True)
        q, odd = tl.split(tl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    return q, odd, scale


@triton.jit
def attend_tiles(
    acc, odd_acc, total, top, q, odd_q, position, first, last, begin, full_begin, full_end, end,
    table_ptr, k_ptr, v_ptr, k_page, v_page, scale, cap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr, BRANCH: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    TWINS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [begin, end); `top` is the row maximum in base 2.

    Keys outside [first, last) are not read; tiles [full_begin, full_end) need no other mask. `scale`
    [BLOCK_M] multiplies the scores. With PAIRS, the kind of codes, D and DV count pairs.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, q.shape[1])
    dv = tl.arange(0, acc.shape[1])
    # Read a tile ahead: loads behind a page id of the same iteration get half the pipeline's depth.
    next_page = _pages(table_ptr, begin, first, last, PAGE, BLOCK_N)
    # No tl.range(num_stages=): it takes the page ids into the pipeline of keys, whose loads then start half
    # as early (H100, one sequence of 131,072: 318 and not 190 µs).
    for tile in range(begin, end):
        page = next_page
        next_page = _pages(table_ptr, tile + 1, first, last, PAGE, BLOCK_N)
        key = tile * BLOCK_N + n
        slot = n % PAGE if BLOCK_N % PAGE == 0 else key % PAGE
        seen = (key >= first) & (key < last)
        tile_at = page.to(tl.int64) * k_page + (slot[:, None] * D + d[None, :])
        k = tl.load(
            k_ptr + tile_at, mask=seen[:, None] & (d < D)[None, :], other=0.0
        )  # [BLOCK_N, D]
        if PAIRS is not None:
            k, odd_k = unpair(k, q.dtype, PAIRS)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.dot(odd_q, tl.trans(odd_k), s, input_precision="ieee")
        elif DOT:
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            s = tl.sum(q[:, None, :] * decode(k)[None, :, :], 2)
        unit = scale
        if SOFTCAP:
            s = _tanh(s * scale[:, None], q.dtype == tl.float32) * cap
            unit = tl.full(scale.shape, 1.0, tl.float32)
        masked = True
        if BRANCH:
            masked = (tile < full_begin) | (tile >= full_end)
        if masked:
            visible = key[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (position[:, None] - key[None, :] < WINDOW)
            s = tl.where(visible, s, float("-inf"))  # [BLOCK_M, BLOCK_N]
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit[:, None] - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        if not TWINS:
            tile_at = page.to(tl.int64) * v_page + (slot[:, None] * DV + dv[None, :])
        v = tl.load(v_ptr + tile_at, mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        if PAIRS is not None:
            v, odd_v = unpair(v, q.dtype, PAIRS)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
            odd_acc = odd_acc * decay[:, None]
            odd_acc = tl.dot(p.to(v.dtype), odd_v, odd_acc, input_precision="ieee")
        elif DOT:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        else:
            acc += tl.sum(p[:, :, None] * decode(v)[None, :, :], 1)
        top = new_top
    return acc, odd_acc, total, top
