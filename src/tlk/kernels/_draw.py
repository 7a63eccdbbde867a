"""Drawing a token: from a lane, from a row, and from a row in pieces by rejection.

`_draw_kernel` draws from each piece of a row and sums its mass; `accepted` takes the best piece's token
if it is among what top-p and min-p keep, else the best of the tokens above it, and so on. The winner
among all tokens wins among the kept ones if it is one of them; if not, nothing at or below it is kept.
"""

import triton
import triton.language as tl

from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels._philox import gumbel, philox
from tlk.kernels._threshold import LOWEST, key_of, load_row, row_mass, value_of


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
def _draw_quarter(
    best, noise, token, mass, total, x, cols, bits, top, inv_t, noise_ptr, n_cols,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Add columns `cols` with logits `x` to a piece: its best score by lane, and its masses."""
    g = gumbel(bits)
    if KEEP:
        tl.store(noise_ptr + cols, g, cols < n_cols)
    score = tl.fma(x - top, inv_t, g)
    better = score > best
    mass += tl.exp((x - top) * inv_t)
    total += tl.exp(x - top)
    return (
        tl.where(better, score, best), tl.where(better, g, noise), tl.where(better, cols, token),
        mass, total,
    )  # fmt: skip


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, seeds_ptr, offsets_ptr, pieces_ptr, tokens_ptr,
    noise_ptr, stride, n_cols,
    QUARTER: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Draw from a piece of a row without top-k: (largest logit, masses, noise) and the token."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // PARTS
    place = tl.program_id(1) % PARTS * WIDTH + tl.arange(0, WIDTH)
    wait_for_previous(PDL)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    if (temperature > 0) & ((top_k <= 0) | (top_k >= n_cols)):
        row_ptr = logits_ptr + row * stride
        noise_ptr += row * n_cols
        c0 = group * 4 * QUARTER + place
        c1, c2, c3 = c0 + QUARTER, c0 + 2 * QUARTER, c0 + 3 * QUARTER
        x0, x1 = load_row(row_ptr, c0, n_cols), load_row(row_ptr, c1, n_cols)
        x2, x3 = load_row(row_ptr, c2, n_cols), load_row(row_ptr, c3, n_cols)
        top = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 0)
        top = tl.maximum(top, LOWEST)
        inv_t = tl.div_rn(1.0, in_bounds(temperature))
        seed, offset = tl.load(seeds_ptr + row), tl.load(offsets_ptr + row)
        r0, r1, r2, r3 = philox(group * QUARTER + place, seed, offset)
        best = tl.full([WIDTH], float("-inf"), tl.float32)
        noise, mass, total = tl.zeros_like(best), tl.zeros_like(best), tl.zeros_like(best)
        token = tl.zeros([WIDTH], tl.int32)
        best, noise, token, mass, total = _draw_quarter(
            best, noise, token, mass, total, x0, c0, r0, top, inv_t, noise_ptr, n_cols, KEEP
        )
        best, noise, token, mass, total = _draw_quarter(
            best, noise, token, mass, total, x1, c1, r1, top, inv_t, noise_ptr, n_cols, KEEP
        )
        best, noise, token, mass, total = _draw_quarter(
            best, noise, token, mass, total, x2, c2, r2, top, inv_t, noise_ptr, n_cols, KEEP
        )
        best, noise, token, mass, total = _draw_quarter(
            best, noise, token, mass, total, x3, c3, r3, top, inv_t, noise_ptr, n_cols, KEEP
        )
        winner = tl.min(tl.where(best == tl.max(best, 0), token, n_cols), 0)
        at = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(tokens_ptr + at, winner)
        tl.store(pieces_ptr + 4 * at, top)
        tl.store(pieces_ptr + 4 * at + 1, tl.sum(mass, 0))
        tl.store(pieces_ptr + 4 * at + 2, tl.sum(total, 0))
        tl.store(pieces_ptr + 4 * at + 3, tl.max(tl.where(token == winner, noise, LOWEST), 0))


@triton.jit
def _draw_kept(
    token, row_ptr, noise_ptr, n_cols, threshold, top, inv_t, BLOCK: tl.constexpr
):  # fmt: skip
    """The token drawn from logits at or above `threshold`, with the noise that was kept."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32) + token
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = load_row(row_ptr, cols, n_cols)
        g = tl.load(noise_ptr + cols, cols < n_cols, other=0.0)
        score = tl.where(x >= threshold, tl.fma(x - top, inv_t, g), float("-inf"))
        better = score > best
        best, tokens = tl.where(better, score, best), tl.where(better, cols, tokens)
    return tl.min(tl.where(best == tl.max(best, 0), tokens, n_cols), 0)


@triton.jit
def _above(x, SHIFT: tl.constexpr):
    """The next larger value of the logits' dtype."""
    return value_of(key_of(tl.where(x == 0, 0.0, x), SHIFT) + 1, SHIFT)


@triton.jit
def accepted(
    row_ptr, pieces_ptr, tokens_ptr, noise_ptr, n_cols, n_pieces, temperature, top_p, min_p, seed,
    offset, SHIFT: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The token of a row without top-k, its largest logit and the sum of exp(x - largest)."""
    piece = tl.arange(0, PIECES)
    inside = piece < n_pieces
    tops = tl.load(pieces_ptr + 4 * piece, inside, other=float("-inf"))
    masses = tl.load(pieces_ptr + 4 * piece + 1, inside, other=0.0)
    totals = tl.load(pieces_ptr + 4 * piece + 2, inside, other=0.0)
    noise = tl.load(pieces_ptr + 4 * piece + 3, inside, other=0.0)
    tokens = tl.load(tokens_ptr + piece, inside, other=0)
    temperature = in_bounds(temperature)
    inv_t = tl.div_rn(1.0, temperature)
    top = tl.max(tops, 0)
    mass = tl.sum(masses * tl.exp((tops - top) * inv_t), 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    score = tl.fma(load_row(row_ptr, tokens, n_cols) - top, inv_t, noise)
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, tokens, n_cols), 0)
    x = load_row(row_ptr, token, n_cols)
    floor = top + temperature * tl.log(tl.minimum(tl.maximum(min_p, 1e-37), 1.0))
    floor = tl.where(min_p > 0, tl.maximum(floor, LOWEST), LOWEST)
    searching = (best > float("-inf")) & (x < top)
    while searching:
        threshold = _above(x, SHIFT)
        kept = x >= floor
        if kept & (top_p < 1):
            kept = row_mass(row_ptr, n_cols, threshold, top, inv_t, BLOCK) < top_p * mass
        if kept:
            searching = False
        else:
            threshold = tl.maximum(threshold, floor)
            if KEEP:
                token = _draw_kept(token, row_ptr, noise_ptr, n_cols, threshold, top, inv_t, BLOCK)
            else:
                token = draw_row(
                    token, row_ptr, n_cols, threshold, top, inv_t, seed, offset,
                    QUARTER, BLOCK if BLOCK < QUARTER else QUARTER,
                )  # fmt: skip
            x = load_row(row_ptr, token, n_cols)
            searching = x < top
    return token, top, total
