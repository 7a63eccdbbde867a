"""AWQ: scale up the inputs that matter before rounding, and clip what costs more than it is worth.

    s = x̄^r / w̄^(1−r)      r in 0, 1/20, … 19/20      x̄_j = mean |x_j|,  w̄_j = mean |w_j| / group's amax

W · s is rounded, 1 / s goes into what comes before: a norm's weight, or the rows of a linear layer. The
ratio r is found by trying: the one whose rounded layer changes the output of its block least.
Then the largest weights of each row and group are clipped to the fraction, 1 to 0.55 of their amax,
that changes the output of that row and group least.

Lin et al., "AWQ: Activation-aware Weight Quantization", https://arxiv.org/abs/2306.00978.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tlk.quant.codes import grouped
from tlk.quant.format import Format
from tlk.quant.scaling import Candidate

RATIOS = 20
SHRINKS = 10
ROWS = 4096  # of a weight whose clipping is searched at once


def weight_mean(weight: Tensor, group_size: int | None) -> Tensor:
    """How large the weights of each input are, [K], on average over the rows of `weight` [N, K].

    Each relative to the largest of its row and group of `group_size` inputs; None: of its row.
    """
    k = weight.shape[1]
    size = grouped(weight.float().abs(), k // (group_size or k))
    return (size / (size.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def candidates(x_mean: Tensor, w_mean: Tensor) -> Iterator[Candidate]:
    """The identity, then a scale [K] for each ratio, with a geometric mean of largest and smallest of 1.

    x_mean [K] is the mean of |x|; w_mean [K] as `weight_mean` gives it.
    """
    yield None, torch.ones_like(x_mean)
    for i in range(RATIOS):
        ratio = i / RATIOS
        scale = (x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        yield ratio, torch.where(scale.isfinite(), scale, 1.0)


def clipped(weight: Tensor, x: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """`weight` float32 [N, K] with the outliers of each row and group clipped where that helps.

    x [T, K]: some inputs. `format` quantizes for a model in `dtype`; its groups are found in the scales
    that it makes. Returns float32 [N, K].
    """
    groups = format.quantize(weight[:1], dtype)["scale"].shape[1]
    of_group = grouped(x.float(), groups).transpose(0, 1)  # [g, T, G]
    gram = of_group.mT @ of_group
    return torch.cat([_clipped(rows, gram, format, dtype) for rows in weight.float().split(ROWS)])


def _clipped(w: Tensor, gram: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """The rows `w` [R, K], for groups whose inputs have the products `gram` [g, G, G]."""
    groups = grouped(w, len(gram))
    amax = groups.abs().amax(-1, keepdim=True)
    least, bound = torch.full_like(amax[..., 0], float("inf")), amax
    for i in range(SHRINKS):
        limit = amax * (1 - i / (2 * SHRINKS))
        values = groups.clamp(-limit, limit).flatten(1)
        off = grouped(format.dequantize(format.quantize(values, dtype)), len(gram)) - groups
        off = off.transpose(0, 1)
        error = ((off @ gram) * off).sum(-1).T  # [R, g]
        better = error < least
        least = torch.where(better, error, least)
        bound = torch.where(better[..., None], limit, bound)
    return groups.clamp(-bound, bound).flatten(1)
