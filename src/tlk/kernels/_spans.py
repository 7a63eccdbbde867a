"""Rows of logits by spans of neighbouring columns: sums of each, and a list of the largest logits.

A row has up to 2048 spans of equal width. One launch measures them: the largest logit, and the sum of
exp(x - largest), of each; a row is read once, by as many programs as it has tiles, all at bandwidth.
What follows reads few spans again:

- k spans have a largest logit at or above the k-th largest of these, so k logits are at or above it,
  and all of the k largest lie in spans that reach it: some k spans of 2048, unless logits are equal.
- A token is drawn by drawing a span first (`_draw.py`).
"""

import triton
import triton.language as tl

from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels._threshold import LOWEST, in_bounds, key_of, load_row, search

COLUMNS = 4096  # of a tile: four 16-byte loads of 16-bit logits in each thread of 4 warps


def span_width(n_cols: int) -> int:
    """Columns of a span of a row of `n_cols`, on which its draws depend."""
    return max(next_power_of_2(cdiv(n_cols, 2048)), 16)


def tile_spans(n_cols: int) -> int:
    """Spans of a tile."""
    return max(min(COLUMNS, next_power_of_2(n_cols)) // span_width(n_cols), 16)


def span_count(n_cols: int) -> int:
    """Spans of a row, in whole tiles."""
    tile = tile_spans(n_cols)
    return cdiv(n_cols, span_width(n_cols) * tile) * tile


@triton.jit
def span_columns(spans, WIDTH: tl.constexpr):
    """The columns of `spans` [T], [T, WIDTH]."""
    return spans[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _spans_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, sums_ptr, stride, n_cols, n_spans,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Largest logit and Σ exp(x - largest) of TILE spans; of rows without top-k, also at temperature.

    `sums` [S, 4, n_spans] has one after the other for all spans of a row; the last is left to others.
    """
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    spans = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums_ptr += row * 4 * n_spans + spans
    wait_for_previous(PDL)
    x = load_row(logits_ptr + row * stride, span_columns(spans, WIDTH), n_cols)
    top = tl.max(x, 1)
    tl.store(sums_ptr, top)
    x -= tl.maximum(top, LOWEST)[:, None]
    total = tl.sum(tl.exp(x), 1)
    tl.store(sums_ptr + n_spans, total)
    if temperature_ptr is not None:
        temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
        if (temperature > 0) & ((top_k <= 0) | (top_k >= n_cols)):
            inv_t = tl.div_rn(1.0, in_bounds(temperature))
            if inv_t != 1.0:
                total = tl.sum(tl.exp(x * inv_t), 1)
            tl.store(sums_ptr + 2 * n_spans, total)


@triton.jit
def row_of_spans(sums_ptr, n_spans, SPANS: tl.constexpr):
    """The largest logit of each span, [SPANS], that of the row, and Σ exp(x - that) of the row."""
    spans = tl.arange(0, SPANS)
    inside = spans < n_spans
    tops = tl.load(sums_ptr + spans, inside, other=float("-inf"))
    totals = tl.load(sums_ptr + n_spans + spans, inside, other=0.0)
    top = tl.maximum(tl.max(tops, 0), LOWEST)
    return tops, top, tl.sum(totals * tl.exp(tops - top), 0)


@triton.jit
def bound_key(tops, top, k, SHIFT: tl.constexpr):
    """The key of a value that k logits reach: the k-th largest of `tops`, or the lowest."""
    some = tops > float("-inf")
    least = tl.maximum(tl.min(tl.where(some, tops, top), 0), LOWEST)
    key = key_of(tl.minimum(least, LOWEST), SHIFT)
    if tl.sum(some.to(tl.int32), 0) >= k:
        key = search(tops, 1.0, key_of(least, SHIFT), key_of(top, SHIFT) + 1, k * 1.0, SHIFT)
    return key


@triton.jit
def list_spans(list_ptr, over, SPANS: tl.constexpr):
    """Write which spans are `over` [SPANS] to `list_ptr` and return their number; a barrier must follow."""
    place = tl.cumsum(over.to(tl.int32), 0) - 1
    tl.store(list_ptr + place, tl.arange(0, SPANS), over)
    return tl.sum(over.to(tl.int32), 0)


@triton.jit
def collect(
    row_ptr, list_ptr, tops, bound, n_cols,
    WIDTH: tl.constexpr, SPANS: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Write the columns of logits at or above `bound` to `list_ptr` and return their number.

    More than MOST: the list is incomplete. `list_ptr` has room for SPANS after those.
    """
    n_over = list_spans(list_ptr + MOST, tops >= bound, SPANS)
    tl.debug_barrier()
    start, count = 0, 0
    while (start < n_over) & (count <= MOST):
        place = start + tl.arange(0, TILE)
        own = tl.load(list_ptr + MOST + place, place < n_over, other=SPANS)
        cols = span_columns(own, WIDTH)
        hit = load_row(row_ptr, cols, n_cols) >= bound
        each = tl.sum(hit.to(tl.int32), 1)
        at = (count + tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
        tl.store(list_ptr + at, cols, hit & (at < MOST))
        start += TILE
        count += tl.sum(each, 0)
    tl.debug_barrier()
    return count


@triton.jit
def listed(row_ptr, list_ptr, count, n_cols, MOST: tl.constexpr):
    """The logits and columns that `collect` listed, [MOST]; -inf and `n_cols` after the last."""
    place = tl.arange(0, MOST)
    columns = tl.load(list_ptr + place, place < count, other=n_cols)
    return load_row(row_ptr, columns, n_cols), columns
