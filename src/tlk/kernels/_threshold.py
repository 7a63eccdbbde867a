"""Which logits of a row are kept: top-k, top-p and min-p as one threshold, found without sorting.

Temperature does not change the order of logits, so every filter keeps the logits at or above a value:
top-k the k-th largest; top-p the largest value at or above which lies the fraction p of the mass
exp(x / temperature) that top-k left; min-p the maximum + temperature · log(min_p). Logits equal to the
threshold are all kept.

A value is found by bisecting integers that order as the floats do, among logits in registers if all
that matter fit there; else a pass over the row measures three pivots at once.
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
def in_bounds(temperature):
    return tl.minimum(tl.maximum(temperature, 1e-30), 1e30)


@triton.jit
def min_p_floor(top, temperature, min_p):
    """The smallest logit that min-p keeps in a row whose largest is `top`."""
    floor = top + temperature * tl.log(tl.minimum(tl.maximum(min_p, 1e-37), 1.0))
    return tl.where(min_p > 0, tl.maximum(floor, LOWEST), LOWEST)


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
def next_above(x, SHIFT: tl.constexpr):
    """The next larger value of the logits' dtype."""
    return value_of(key_of(tl.where(x == 0, 0.0, x), SHIFT) + 1, SHIFT)


@triton.jit
def search(x, weight, lo, hi, target, SHIFT: tl.constexpr):
    """The largest key in (lo, hi) at or above which the weights of `x` sum to `target`, else lo."""
    while hi - lo > 1:
        mid = (lo + hi) >> 1
        if tl.sum(tl.where(x >= value_of(mid, SHIFT), weight, 0.0), 0) >= target:
            lo = mid
        else:
            hi = mid
    return lo


@triton.jit
def row_search(
    row_ptr, n_cols, lo, hi, target, least, top, scale, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The same in a row, whose logits at or above `least` weigh exp((x - top) · scale)."""
    while hi - lo > 1:
        a = tl.maximum(lo + ((hi - lo) >> 2), lo + 1)
        b = lo + ((hi - lo + 1) >> 1)
        c = hi - tl.maximum((hi - lo) >> 2, 1)
        at_a, at_b, at_c = value_of(a, SHIFT), value_of(b, SHIFT), value_of(c, SHIFT)
        sum_a = tl.zeros([BLOCK], tl.float32)
        sum_b, sum_c = sum_a, sum_a
        for start in range(0, n_cols, BLOCK):
            x = load_row(row_ptr, start + tl.arange(0, BLOCK), n_cols)
            under = tl.maximum(x - top, LOWEST)  # not -inf, for scale may be 0
            weight = tl.where(x >= least, tl.exp(under * scale), 0.0)
            sum_a += tl.where(x >= at_a, weight, 0.0)
            sum_b += tl.where(x >= at_b, weight, 0.0)
            sum_c += tl.where(x >= at_c, weight, 0.0)
        if tl.sum(sum_c, 0) >= target:
            lo = c
        elif tl.sum(sum_b, 0) >= target:
            lo, hi = b, c
        elif tl.sum(sum_a, 0) >= target:
            lo, hi = a, b
        else:
            hi = a
    return lo


@triton.jit
def row_mass(row_ptr, n_cols, threshold, top, scale, BLOCK: tl.constexpr):
    """The sum of exp((x - top) · scale) over the row's logits at or above `threshold`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        x = load_row(row_ptr, start + tl.arange(0, BLOCK), n_cols)
        total += tl.where(x >= threshold, tl.exp((x - top) * scale), 0.0)
    return tl.sum(total, 0)
