"""Scales of 4-bit floats by least squared error, where rounding amax into the top octave is a guess.

A group's scale can only be one of few: a power of two (MXFP4) or an E4M3 number (NVFP4). So the
neighbours of the guess are tried, and each group takes the one of least Σ importance · (w − q)². A
smaller scale clips the largest weight and rounds the others finer.
"""

import torch
from torch import Tensor

from tlk.quant.codes import grouped
from tlk.quant.fp4 import MXFP4, NVFP4, e2m1_codes, e2m1_values, e8m0

EXPONENTS = (0, -1, 1)
NEIGHBOURS = (0, -1, 1, -2, 2, -3, 3)
LARGEST_CODE = 0x7E  # 448; 0x7F is NaN


def mx_scales(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Exponents uint8 [N, K/32] for `weight` [N, K]: the guess, one less or one more.

    importance [K]: the mean of x², by which errors count; None: all the same.
    """
    guess = MXFP4().scales(weight)
    options = [(guess.int() + d).clamp(0, 254).to(torch.uint8) for d in EXPONENTS]
    return _least(weight, options, [e8m0(o) for o in options], importance)


def nv_scales(
    weight: Tensor, importance: Tensor | None = None, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale E4M3 [N, K/16], up to three codes from the guess, and global_scale [N, 1] of `weight`.

    importance: as of `mx_scales`. global_scale: as of `NVFP4.scales`.
    """
    guess, each = NVFP4().scales(weight, global_scale)
    codes = guess.view(torch.uint8).int()
    options = [
        (codes + d).clamp(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn)
        for d in NEIGHBOURS
    ]
    return _least(weight, options, [o.float() * each for o in options], importance), each


def _least(
    weight: Tensor, options: list[Tensor], units: list[Tensor], importance: Tensor | None
) -> Tensor:
    """For every group the one of `options` [N, g] whose scale, float32 `units`, errs least."""
    groups = grouped(weight.float(), options[0].shape[1])
    counts = 1.0 if importance is None else grouped(importance.float()[None], groups.shape[1])
    chosen = options[0].view(torch.uint8)
    least = torch.full(chosen.shape, float("inf"), device=weight.device)
    for option, unit in zip(options, units, strict=True):
        values = e2m1_values(e2m1_codes(groups / unit[..., None])) * unit[..., None]
        error = ((values - groups).square() * counts).sum(-1)
        chosen = torch.where(error < least, option.view(torch.uint8), chosen)
        least = torch.minimum(error, least)
    return chosen.view(options[0].dtype)
