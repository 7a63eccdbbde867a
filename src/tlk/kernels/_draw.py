"""Drawing a token: from a row in two stages with refusals, and from the logits that top-k left.

Without top-k no threshold is sought. Spans are neighbouring columns (`_spans.py`), and with

    span = argmax over spans of  log(mass) + g,    token = argmax over its columns of  x / temperature + g

with fresh Gumbel noise in either draws from the softmax of the row (the maximum of shifted Gumbel
variables, https://arxiv.org/abs/1411.0030), at the price of one exponential per column. The token is accepted if
what lies above it is less than top-p of the mass, and min-p keeps it; else it and all at or below it
are out, and the masses above it, which the check has summed, are drawn from next. What is kept is
drawn with its probability whatever has been refused before (rejection), most often at once: the
first token is accepted with probability top-p or more. The check reads spans with a logit above the
token, and none where the mass of all of these is little enough.

With top-k the candidates are few, and one Gumbel variable for each draws in one stage.
"""

from itertools import count

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._ints import cdiv
from tlk.kernels._philox import gumbel, numbered_gumbel, numbered_gumbel_reference, philox
from tlk.kernels._spans import (
    bound_key,
    collect,
    list_spans,
    listed,
    span_columns,
    span_width,
)
from tlk.kernels._threshold import (
    LOWEST,
    in_bounds,
    key_of,
    load_row,
    min_p_floor,
    next_above,
    row_mass,
    row_search,
    search,
    value_of,
)


def draw_reference(
    x: Tensor, threshold: Tensor, floor: Tensor, inverse: Tensor, seeds: Tensor, offsets: Tensor
) -> Tensor:
    """A token of each row of `x` [S, V] at or above `threshold` [S]; 0 where there is none.

    floor: the part of the threshold that is known without sorting, [S]; inverse: 1 / temperature, [S].
    """
    rows, columns = x.shape
    width = span_width(columns)
    spans = cdiv(columns, width)
    rest = (0, spans * width - columns)
    score = (x - x.amax(-1, keepdim=True).clamp(min=LOWEST.value)) * inverse[:, None]
    weight = F.pad(score.exp().double(), rest)
    column = torch.arange(columns, device=x.device)
    span_numbers = torch.arange(spans, device=x.device).expand(rows, -1)
    tokens = torch.zeros(rows, dtype=torch.int64, device=x.device)
    candidates = x > -torch.inf
    searching = candidates.any(-1)
    for round in count():
        if not searching.any():
            break
        mass = (weight * F.pad(candidates, rest)).view(rows, spans, width).sum(2)
        noise = numbered_gumbel_reference(seeds, offsets, span_numbers, 2 * round + 1)
        span = (mass.log().float() + noise).argmax(-1, keepdim=True)
        here = candidates & (column // width == span)
        noise = numbered_gumbel_reference(seeds, offsets, column.expand(rows, -1), 2 * round + 2)
        drawn = torch.where(here, score + noise, -torch.inf).argmax(-1)
        tokens = torch.where(searching, drawn, tokens)
        value = x.gather(-1, tokens[:, None])
        searching = searching & (value[:, 0] < threshold)
        candidates = (x > value) & (x >= floor[:, None])
    return tokens


@triton.jit
def _from_span(
    mass, row_ptr, n_cols, round, threshold, top, inv_t, seed, offset,
    WIDTH: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """The token drawn from logits at or above `threshold`, whose masses by span are `mass`."""
    spans = tl.arange(0, SPANS)
    score = tl.log(mass) + numbered_gumbel(spans, 2 * round + 1, seed, offset)
    score = tl.where(mass > 0, score, float("-inf"))
    span = tl.min(tl.where(score == tl.max(score, 0), spans, SPANS - 1), 0)
    columns = span * WIDTH + tl.arange(0, WIDTH)
    x = load_row(row_ptr, columns, n_cols)
    noise = numbered_gumbel(columns, 2 * round + 2, seed, offset)
    score = tl.where(x >= threshold, tl.fma(x - top, inv_t, noise), float("-inf"))
    token = tl.min(tl.where(score == tl.max(score, 0), columns, n_cols - 1), 0)
    return tl.where(tl.max(score, 0) > float("-inf"), token, 0)


@triton.jit
def _tile(row_ptr, list_ptr, start, n_over, n_cols, WIDTH: tl.constexpr, SPANS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Spans from a list, and their logits [TILE, WIDTH] as they are stored."""
    place = start + tl.arange(0, TILE)
    spans = tl.load(list_ptr + place, place < n_over, other=SPANS)
    columns = span_columns(spans, WIDTH)
    return spans, tl.load(row_ptr + columns, columns < n_cols, other=float("-inf"))


@triton.jit
def _masses_above(
    row_ptr, sums_ptr, list_ptr, mass, over, most, enough, n_cols, n_spans, threshold, top, inv_t,
    WIDTH: tl.constexpr, SPANS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Correct `most`, a bound of the mass at or above `threshold`, until it is exact or under `enough`.

    `over`: the spans [SPANS] that reach the threshold, `mass`: a bound for each; those that have been
    read leave their mass in `sums`. The next tile is asked for before the last one is summed.
    """
    masses_ptr, bounds_ptr = sums_ptr + 2 * n_spans, sums_ptr + 3 * n_spans
    n_over = list_spans(list_ptr, over, SPANS)
    tl.store(bounds_ptr + tl.arange(0, SPANS), mass, tl.arange(0, SPANS) < n_spans)
    tl.debug_barrier()
    spans, x = _tile(row_ptr, list_ptr, 0, n_over, n_cols, WIDTH, SPANS, TILE)
    start = 0
    while (start < n_over) & (most >= enough):
        start += TILE
        later, y = _tile(row_ptr, list_ptr, start, n_over, n_cols, WIDTH, SPANS, TILE)
        x = x.to(tl.float32)
        exact = tl.sum(tl.where(x >= threshold, tl.exp((x - top) * inv_t), 0.0), 1)  # NaN: nothing
        bound = tl.load(bounds_ptr + spans, spans < n_spans, other=0.0)
        tl.store(masses_ptr + spans, exact, spans < n_spans)
        most -= tl.sum(bound - exact, 0)
        spans, x = later, y
    return most


@triton.jit
def draw_by_refusals(
    row_ptr, sums_ptr, list_ptr, tops, top, n_cols, n_spans, temperature, top_p, min_p, seed,
    offset, SHIFT: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of a row without top-k."""
    spans = tl.arange(0, SPANS)
    temperature = in_bounds(temperature)
    inv_t = tl.div_rn(1.0, temperature)
    mass = tl.load(sums_ptr + 2 * n_spans + spans, spans < n_spans, other=0.0)
    mass *= tl.exp((tops - top) * inv_t)
    enough = top_p * tl.sum(mass, 0)
    floor = min_p_floor(top, temperature, min_p)
    threshold = tl.minimum(top, LOWEST)
    token, round = 0, 0
    searching = tl.max(tops, 0) > float("-inf")
    while searching:
        token = _from_span(
            mass, row_ptr, n_cols, round, threshold, top, inv_t, seed, offset, WIDTH, SPANS
        )
        x = load_row(row_ptr, token, n_cols)
        threshold = tl.maximum(next_above(x, SHIFT), floor)
        over = tops >= threshold
        most = tl.sum(tl.where(over, mass, 0.0), 0)
        # what is refused by min-p needs all masses above; if that alone is on, so is what is kept
        enough_here = tl.where(x < floor, -1.0, tl.where(top_p < 1, enough, float("inf")))
        searching = (x < top) & (most >= enough_here)
        if searching:
            most = _masses_above(
                row_ptr, sums_ptr, list_ptr, mass, over, most, enough_here, n_cols, n_spans,
                threshold, top, inv_t, WIDTH, SPANS, TILE,
            )  # fmt: skip
            searching = most >= enough_here
            if searching:
                tl.debug_barrier()
                mass = tl.load(sums_ptr + 2 * n_spans + spans, over, other=0.0)
                round += 1
    return token


@triton.jit
def _best(x, columns, n_cols, threshold, top, inv_t, seed, offset, QUARTER: tl.constexpr):
    """The best score of `columns` whose logits `x` reach the threshold, and its column."""
    group, place = columns // QUARTER, columns % QUARTER
    r0, r1, r2, r3 = philox(group // 4 * QUARTER + place, seed, offset)
    word = group % 4
    bits = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    score = tl.fma(x - top, inv_t, gumbel(bits))
    score = tl.where(x >= threshold, score, float("-inf"))
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, columns, n_cols), 0)


@triton.jit
def _draw_from_row(
    row_ptr, n_cols, lo, hi, top, inv_t, top_k, top_p, floor, seed, offset,
    SHIFT: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row of which top-k leaves more than a list holds: k logits reach the key `lo`."""
    least, target, scale = value_of(lo, SHIFT), top_k * 1.0, inv_t * 0
    by_k = True
    searching = True
    while searching:  # by top-k, then by top-p
        lo = row_search(row_ptr, n_cols, lo, hi, target, least, top, scale, SHIFT, BLOCK)
        searching = by_k & (top_p < 1)
        if searching:
            by_k = False
            least, scale = value_of(lo, SHIFT), inv_t
            target = top_p * row_mass(row_ptr, n_cols, least, top, inv_t, BLOCK)
    threshold = tl.maximum(value_of(lo, SHIFT), floor)
    best, token = float("-inf"), 0
    FEW: tl.constexpr = BLOCK // 8  # for a draw is long
    for start in range(0, n_cols, FEW):
        columns = start + tl.arange(0, FEW)
        x = load_row(row_ptr, columns, n_cols)
        if tl.max(x, 0) >= threshold:
            score, column = _best(x, columns, n_cols, threshold, top, inv_t, seed, offset, QUARTER)
            if score > best:
                best, token = score, column
    return token


@triton.jit
def draw_of_top_k(
    row_ptr, list_ptr, tops, top, n_cols, temperature, top_k, top_p, min_p, seed, offset,
    SHIFT: tl.constexpr, QUARTER: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
    TILE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row with top-k."""
    temperature = in_bounds(temperature)
    inv_t = tl.div_rn(1.0, temperature)
    floor = min_p_floor(top, temperature, min_p)
    lo, hi = bound_key(tops, top, top_k, SHIFT), key_of(top, SHIFT) + 1
    count = collect(row_ptr, list_ptr, tops, value_of(lo, SHIFT), n_cols, WIDTH, SPANS, TILE, MOST)
    if count <= MOST:
        x, columns = listed(row_ptr, list_ptr, count, n_cols, MOST)
        lo = search(x, 1.0, lo, hi, top_k * 1.0, SHIFT)
        if top_p < 1:
            mass = tl.where(x >= value_of(lo, SHIFT), tl.exp((x - top) * inv_t), 0.0)
            lo = search(x, mass, lo, hi, top_p * tl.sum(mass, 0), SHIFT)
        threshold = tl.maximum(value_of(lo, SHIFT), floor)
        _, token = _best(x, columns, n_cols, threshold, top, inv_t, seed, offset, QUARTER)
        token = tl.where(token < n_cols, token, 0)  # no logit above -inf: nothing is listed
    else:
        token = _draw_from_row(
            row_ptr, n_cols, lo, hi, top, inv_t, top_k, top_p, floor, seed, offset,
            SHIFT, QUARTER, BLOCK,
        )  # fmt: skip
    return token
