"""SmoothQuant: let weights carry what makes activations hard to round to 8 bit.

    s_j = max |x_j|^α / max |w_j|^(1−α)        α in 0.5, 0.6, … 0.9

x / s has fewer outliers than x, W · s has more than W; 1 / s goes into the norm before. Which α is best
differs between models and layers, so it is searched: for the least error of the product of rounded
weights with rounded activations.

Xiao et al., https://arxiv.org/abs/2211.10438.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tlk.quant.scaling import Candidate

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST = 1e-5


def smooth_scale(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """The scale float32 [K] that `x` is divided by; 1 for inputs that were always 0.

    x_amax, w_amax [K]: the largest |x| and |w| of each input, over tokens and over outputs.
    """
    x, w = x_amax.float().clamp(min=SMALLEST), w_amax.float().clamp(min=SMALLEST)
    scale = (x**alpha / w ** (1 - alpha)).clamp(min=SMALLEST)
    return torch.where(x_amax > 0, scale, 1.0)


def candidates(x_amax: Tensor, w_amax: Tensor) -> Iterator[Candidate]:
    """The identity, then the scale of each α of `ALPHAS`."""
    yield None, torch.ones_like(x_amax, dtype=torch.float32)
    for alpha in ALPHAS:
        yield alpha, smooth_scale(x_amax, w_amax, alpha)
