"""Drawing a token: from a lane, from a row, and from a row in two stages with refusals.

Without top-k no threshold is sought. A lane holds the columns equal modulo their number, and with

    lane = argmax over lanes of  log(mass) + g,    token = argmax over its columns of  x / temperature + g

with fresh Gumbel noise in either draws from the softmax of the row (the maximum of shifted Gumbel
variables, https://arxiv.org/abs/1411.0030), at the price of one exponential per column. The token is accepted if
what lies above it is less than top-p of the mass, and min-p keeps it; else it and all at or below it
are out, and the masses above it, which the check has summed, are drawn from next. What is kept is
drawn with its probability whatever has been refused before (rejection), most often at once: the
first token is accepted with probability top-p or more.
"""

from itertools import count

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels._philox import (
    gumbel,
    numbered_gumbel,
    numbered_gumbel_reference,
    philox,
)
from tlk.kernels._threshold import LOWEST, key_of, load_row, value_of


def lanes_of(n_cols: int) -> int:
    """The lanes of a row, on which its draws depend."""
    return min(next_power_of_2(n_cols), 2048)


def draw_reference(
    x: Tensor, threshold: Tensor, floor: Tensor, inverse: Tensor, seeds: Tensor, offsets: Tensor
) -> Tensor:
    """A token of each row of `x` [S, V] at or above `threshold` [S]; 0 where there is none.

    floor: the part of the threshold that is known without sorting, [S]; inverse: 1 / temperature, [S].
    """
    rows, columns = x.shape
    lanes = lanes_of(columns)
    steps = cdiv(columns, lanes)
    rest = (0, steps * lanes - columns)
    score = (x - x.amax(-1, keepdim=True).clamp(min=LOWEST.value)) * inverse[:, None]
    weight = F.pad(score.exp().double(), rest)
    column = torch.arange(columns, device=x.device)
    lane_numbers = torch.arange(lanes, device=x.device).expand(rows, -1)
    tokens = torch.zeros(rows, dtype=torch.int64, device=x.device)
    candidates = x > -torch.inf
    searching = candidates.any(-1)
    for round in count():
        if not searching.any():
            break
        mass = (weight * F.pad(candidates, rest)).view(rows, steps, lanes).sum(1)
        noise = numbered_gumbel_reference(seeds, offsets, lane_numbers, 2 * round + 1)
        lane = (mass.log().float() + noise).argmax(-1, keepdim=True)
        here = candidates & (column % lanes == lane)
        noise = numbered_gumbel_reference(seeds, offsets, column.expand(rows, -1), 2 * round + 2)
        drawn = torch.where(here, score + noise, -torch.inf).argmax(-1)
        tokens = torch.where(searching, drawn, tokens)
        value = x.gather(-1, tokens[:, None])
        searching = searching & (value[:, 0] < threshold)
        candidates = (x > value) & (x >= floor[:, None])
    return tokens


@triton.jit
def in_bounds(temperature):
    return tl.minimum(tl.maximum(temperature, 1e-30), 1e30)


@triton.jit
def draw_lane(
    best, token, v, c, n_cols, threshold, top, inv_t, seed, offset, QUARTER: tl.constexpr
):
    """The better of (`best`, `token`) and the best of columns `c` with logits `v`."""
    if tl.max(v, 0) >= threshold:
        group, place = c // QUARTER, c % QUARTER
        r0, r1, r2, r3 = philox(group // 4 * QUARTER + place, seed, offset)
        word = group % 4
        bits = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
        score = tl.fma(v - top, inv_t, gumbel(bits))
        score = tl.where(v >= threshold, score, float("-inf"))
        score_max = tl.max(score, 0)
        column = tl.min(tl.where(score == score_max, c, n_cols), 0)
        if (score_max > best) | ((score_max == best) & (column < token)):
            best, token = score_max, column
    return best, token


@triton.jit
def _better(best, token, row_ptr, cols, bits, n_cols, threshold, top, inv_t):
    x = load_row(row_ptr, cols, n_cols)
    score = tl.where(x >= threshold, tl.fma(x - top, inv_t, gumbel(bits)), float("-inf"))
    return tl.where(score > best, score, best), tl.where(score > best, cols, token)


@triton.jit
def draw_row(
    token, row_ptr, n_cols, threshold, top, inv_t, seed, offset,
    QUARTER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The token drawn from all of the row, or `token` if nothing reaches the threshold."""
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    tokens = tl.zeros([WIDTH], tl.int32) + token
    for base in range(0, n_cols, 4 * QUARTER):
        for start in range(0, tl.minimum(QUARTER, n_cols - base), WIDTH):
            place = start + tl.arange(0, WIDTH)
            r0, r1, r2, r3 = philox(base // 4 + place, seed, offset)
            cols = base + place
            best, tokens = _better(best, tokens, row_ptr, cols, r0, n_cols, threshold, top, inv_t)
            cols += QUARTER
            best, tokens = _better(best, tokens, row_ptr, cols, r1, n_cols, threshold, top, inv_t)
            cols += QUARTER
            best, tokens = _better(best, tokens, row_ptr, cols, r2, n_cols, threshold, top, inv_t)
            cols += QUARTER
            best, tokens = _better(best, tokens, row_ptr, cols, r3, n_cols, threshold, top, inv_t)
    return tl.min(tl.where(best == tl.max(best, 0), tokens, n_cols), 0)


@triton.jit
def _above(x, SHIFT: tl.constexpr):
    """The next larger value of the logits' dtype."""
    return value_of(key_of(tl.where(x == 0, 0.0, x), SHIFT) + 1, SHIFT)


@triton.jit
def _mass_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, masses_ptr, parts_ptr, stride, n_cols,
    LANES: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The masses of WIDTH lanes of a row without top-k; of all of them the largest logit and Σ exp."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lanes = part * WIDTH + tl.arange(0, WIDTH)
    wait_for_previous(PDL)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    if (temperature > 0) & ((top_k <= 0) | (top_k >= n_cols)):
        row_ptr = logits_ptr + row * stride
        inv_t = tl.div_rn(1.0, in_bounds(temperature))
        tops = tl.full([WIDTH], LOWEST, tl.float32)
        for start in range(0, n_cols, LANES):
            tops = tl.maximum(tops, load_row(row_ptr, start + lanes, n_cols))
        top = tl.max(tops, 0)
        mass = tl.zeros([WIDTH], tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        for start in range(0, n_cols, LANES):
            x = load_row(row_ptr, start + lanes, n_cols) - top
            mass += tl.exp(x * inv_t)
            if inv_t != 1.0:
                total += tl.exp(x)
        tl.store(masses_ptr + row * LANES + lanes, mass)
        at = parts_ptr + 2 * (row * tl.num_programs(1) + part)
        tl.store(at, top)
        tl.store(at + 1, tl.sum(total if inv_t != 1.0 else mass, 0))


@triton.jit
def _from_lane(
    mass, row_ptr, n_cols, round, threshold, top, inv_t, seed, offset,
    LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The token drawn from logits at or above `threshold`, whose masses by lane are `mass`."""
    lanes = tl.arange(0, LANES)
    score = tl.log(mass) + numbered_gumbel(lanes, 2 * round + 1, seed, offset)
    score = tl.where(mass > 0, score, float("-inf"))
    lane = tl.min(tl.where(score == tl.max(score, 0), lanes, LANES - 1), 0)
    columns = lane + LANES * tl.arange(0, STEPS)
    x = load_row(row_ptr, columns, n_cols)
    noise = numbered_gumbel(columns, 2 * round + 2, seed, offset)
    score = tl.where(x >= threshold, tl.fma(x - top, inv_t, noise), float("-inf"))
    token = tl.min(tl.where(score == tl.max(score, 0), columns, n_cols - 1), 0)
    return tl.where(tl.max(score, 0) > float("-inf"), token, 0)


@triton.jit
def accepted(
    row_ptr, masses_ptr, parts_ptr, n_cols, temperature, top_p, min_p, seed, offset,
    SHIFT: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The token of a row without top-k, its largest logit and the sum of exp(x - largest)."""
    lanes, part = tl.arange(0, LANES), tl.arange(0, PARTS)
    tops, totals = tl.load(parts_ptr + 2 * part), tl.load(parts_ptr + 2 * part + 1)
    temperature = in_bounds(temperature)
    inv_t = tl.div_rn(1.0, temperature)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    width: tl.constexpr = LANES // PARTS
    own = tl.load(masses_ptr + part[:, None] * width + tl.arange(0, width)[None, :])
    mass = tl.reshape(own * tl.exp((tops - top) * inv_t)[:, None], (LANES,))
    enough = top_p * tl.sum(mass, 0)
    floor = top + temperature * tl.log(tl.minimum(tl.maximum(min_p, 1e-37), 1.0))
    floor = tl.where(min_p > 0, tl.maximum(floor, LOWEST), LOWEST)
    token = _from_lane(mass, row_ptr, n_cols, 0, LOWEST, top, inv_t, seed, offset, LANES, STEPS)
    x = load_row(row_ptr, token, n_cols)
    searching = (x < top) & (x > float("-inf")) & ((top_p < 1) | (x < floor))
    round = 1
    while searching:
        above = _above(x, SHIFT)
        threshold = tl.maximum(above, floor)
        mass = tl.zeros([LANES], tl.float32)
        for start in range(0, n_cols, LANES):
            y = load_row(row_ptr, start + lanes, n_cols)
            mass += tl.where(y >= threshold, tl.exp((y - top) * inv_t), 0.0)
        if (x >= floor) & ((top_p >= 1) | (tl.sum(mass, 0) < enough)):
            searching = False
        else:
            token = _from_lane(
                mass, row_ptr, n_cols, round, threshold, top, inv_t, seed, offset, LANES, STEPS
            )
            x = load_row(row_ptr, token, n_cols)
            round += 1
            searching = (x < top) & ((top_p < 1) | (x < floor))
    return token, top, total
