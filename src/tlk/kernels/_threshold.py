"""Which logits of a row are kept: top-k, top-p and min-p as one threshold, found without sorting.

Temperature does not change the order of logits, so every filter keeps the logits at or above a value:
top-k the k-th largest; top-p the largest value at or above which lies the fraction p of the mass
exp(x / temperature) that top-k left; min-p the maximum + temperature · log(min_p). Logits equal to the
threshold are all kept.

A value is found by bisecting integers that order as the floats do. That is cheap on the four largest
values of each lane (columns equal modulo BLOCK), which one pass keeps in registers: they hold all
there is at or above a threshold that no lane's fourth value reaches. Else a pass over the row measures
three pivots at once, until the registers hold the last bracket.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # below: masked tokens, never kept


def cleaned(logits: Tensor) -> Tensor:
    """`logits` in float32; NaN counts as -inf and +inf as the largest number."""
    return logits.float().nan_to_num(-torch.inf, -LOWEST.value, -torch.inf)


def threshold_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The smallest logit kept in each row, [S] float32; temperatures must be positive."""
    n_cols = logits.shape[-1]
    x = cleaned(logits)
    temperature = temperature[:, None].clamp(1e-30, 1e30)
    top, inverse = x.amax(-1, keepdim=True), 1 / temperature
    ordered = x.sort(-1, descending=True).values
    k = torch.where(top_k > 0, top_k, n_cols).clamp(max=n_cols).long()
    kth = ordered.gather(-1, k[:, None] - 1).clamp(min=LOWEST.value)
    weight = torch.where(ordered >= kth, ((ordered - top) * inverse).exp(), 0.0).double()
    mass = weight.cumsum(-1)
    # a token is in the smallest set if what comes before it has not reached p
    n = (mass - weight < top_p[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
    pth = torch.where(top_p[:, None] < 1, ordered.gather(-1, n - 1), LOWEST.value)
    mth = floor_reference(x, temperature[:, 0], min_p)
    return torch.maximum(torch.maximum(kth, pth)[:, 0], mth)


def floor_reference(x: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit of `x` [S, V] that min-p keeps, [S] float32."""
    floor = x.amax(-1) + temperature.clamp(1e-30, 1e30) * min_p.clamp(1e-37, 1).log()
    return torch.where(min_p > 0, floor, LOWEST.value).clamp(min=LOWEST.value)


@triton.jit
def load_row(row_ptr, cols, n_cols):
    x = tl.load(row_ptr + cols, (cols >= 0) & (cols < n_cols), other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), -LOWEST)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """An integer that orders as float32 `x` does, without the SHIFT low bits its dtype never uses."""
    i = x.to(tl.int32, bitcast=True)
    return (tl.where(i < 0, i ^ 0x7FFFFFFF, i) >> SHIFT).to(tl.int64)


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The smallest float32 whose key is `key`."""
    i = (key << SHIFT).to(tl.int32)
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.float32, bitcast=True)


@triton.jit
def lane_top(row_ptr, n_cols, below, after, BLOCK: tl.constexpr):
    """The four largest values of each lane and their columns, of what follows (`below`, `after`).

    Order is by value, largest first, then by column; [BLOCK] each, -inf where a lane has fewer.
    """
    v0 = tl.full([BLOCK], float("-inf"), tl.float32)
    v1, v2, v3 = v0, v0, v0
    c0 = tl.zeros([BLOCK], tl.int32)
    c1, c2, c3 = c0, c0, c0
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = load_row(row_ptr, cols, n_cols)
        x = tl.where((x < below) | ((x == below) & (cols > after)), x, float("-inf"))
        over0, over1, over2, over3 = x > v0, x > v1, x > v2, x > v3
        v3, c3 = (
            tl.where(over2, v2, tl.where(over3, x, v3)),
            tl.where(over2, c2, tl.where(over3, cols, c3)),
        )
        v2, c2 = (
            tl.where(over1, v1, tl.where(over2, x, v2)),
            tl.where(over1, c1, tl.where(over2, cols, c2)),
        )
        v1, c1 = (
            tl.where(over0, v0, tl.where(over1, x, v1)),
            tl.where(over0, c0, tl.where(over1, cols, c1)),
        )
        v0, c0 = tl.where(over0, x, v0), tl.where(over0, cols, c0)
    return v0, v1, v2, v3, c0, c1, c2, c3


@triton.jit
def _measured(x, threshold, top, inv_t, MASS: tl.constexpr):
    """What each of `x` at or above `threshold` counts for: its unnormalized probability, or 1."""
    if MASS:
        return tl.where(x >= threshold, tl.exp((x - top) * inv_t), 0.0)
    else:
        return tl.where(x >= threshold, 1.0, 0.0)


@triton.jit
def lane_sum(v0, v1, v2, v3, threshold, top, inv_t, MASS: tl.constexpr):
    low = _measured(v2, threshold, top, inv_t, MASS) + _measured(v3, threshold, top, inv_t, MASS)
    high = _measured(v0, threshold, top, inv_t, MASS) + _measured(v1, threshold, top, inv_t, MASS)
    return tl.sum(high + low, 0)


@triton.jit
def lane_search(v0, v1, v2, v3, lo, hi, target, top, inv_t, MASS: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """The largest key in (lo, hi) at or above which the lanes measure `target`, else lo."""
    while hi - lo > 1:
        mid = (lo + hi) >> 1
        if lane_sum(v0, v1, v2, v3, value_of(mid, SHIFT), top, inv_t, MASS) >= target:
            lo = mid
        else:
            hi = mid
    return lo


@triton.jit
def _row_sum(row_ptr, n_cols, a, b, c, top, inv_t, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The measure of the row at or above three thresholds."""
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b, sum_c = sum_a, sum_a
    for start in range(0, n_cols, BLOCK):
        x = load_row(row_ptr, start + tl.arange(0, BLOCK), n_cols)
        measure = _measured(x, a, top, inv_t, MASS)
        sum_a += measure
        sum_b += tl.where(x >= b, measure, 0.0)
        sum_c += tl.where(x >= c, measure, 0.0)
    return tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)


@triton.jit
def row_mass(row_ptr, n_cols, threshold, top, inv_t, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        x = load_row(row_ptr, start + tl.arange(0, BLOCK), n_cols)
        total += _measured(x, threshold, top, inv_t, True)
    return tl.sum(total, 0)


@triton.jit
def _pivot(lo, hi, part, by_value, SHIFT: tl.constexpr):
    """A key strictly between `lo` and `hi`, `part` quarters of the way, by value or by key."""
    start, weight = value_of(lo, SHIFT), part * 0.25
    value = start * (1.0 - weight) + value_of(hi, SHIFT) * weight
    by_value = by_value & (start > LOWEST)
    key = tl.where(by_value, key_of(value, SHIFT), lo + (((hi - lo) * part) >> 2))
    return tl.minimum(tl.maximum(key, lo + 1), hi - 1)


@triton.jit
def row_search(
    row_ptr, n_cols, lo, hi, target, top, inv_t,
    MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key in (lo, hi) at or above which the row measures `target`, else lo.

    Brackets shrink evenly in value at first, which suits smooth distributions, and then in key,
    which ends after 16 passes whatever the row. Five passes leave 1/1024 of the first bracket.
    """
    above = 0.0
    passes = 0
    while hi - lo > 1:
        a = _pivot(lo, hi, 1, passes < 8, SHIFT)
        b = _pivot(lo, hi, 2, passes < 8, SHIFT)
        c = _pivot(lo, hi, 3, passes < 8, SHIFT)
        at_a, at_b, at_c = _row_sum(
            row_ptr,
            n_cols,
            value_of(a, SHIFT),
            value_of(b, SHIFT),
            value_of(c, SHIFT),
            top,
            inv_t,
            MASS,
            BLOCK,
        )
        if at_c >= target:
            lo = c
        elif at_b >= target:
            lo, hi, above = b, c, at_c
        elif at_a >= target:
            lo, hi, above = a, b, at_b
        else:
            hi, above = a, at_a
        passes += 1
        if (passes >= 5) & (hi - lo > 1):
            v0, v1, v2, v3, _, _, _, _ = lane_top(
                row_ptr, n_cols, value_of(hi, SHIFT), n_cols, BLOCK
            )
            lo = lane_search(v0, v1, v2, v3, lo, hi, target - above, top, inv_t, MASS, SHIFT)
            if tl.max(v3, 0) < value_of(lo, SHIFT):
                hi = lo + 1
    return lo
