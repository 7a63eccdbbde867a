"""Scales of activations and of a cache of keys and values, from the ranges that calibration saw.

    scale = amax / largest        largest: 448 of E4M3, 127 of int8

One scale for all that will come clips what is larger than anything seen, and rounds small rows as
coarsely as large ones; a scale per row, found as it comes, does neither. What is gained is the pass
that finds it.
"""

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def scale_of(amax: Tensor, storage: torch.dtype) -> Tensor:
    """The float32 scale with which values up to `amax`, of any shape, fill `storage`; 1 where it is 0."""
    return torch.where(amax > 0, amax.float() / LARGEST[storage], 1.0)


def input_scale(amax: Tensor, storage: torch.dtype, dtype: torch.dtype) -> Tensor:
    """One scale [1, 1] for activations whose features reach `amax` [K], one that `dtype` holds exactly."""
    return scale_of(amax.amax().view(1, 1), storage).to(dtype).float()


def rounded(x: Tensor, storage: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """`x` [..., K] float32 as activations in `storage` hold it.

    scale: float32, of one element; None: one a row, as large as the row needs.
    """
    largest = LARGEST[storage]
    each = scale_of(x.abs().amax(-1, keepdim=True), storage) if scale is None else scale.view(1)
    units = (x / each).clamp(-largest, largest)
    codes = units.round() if storage == torch.int8 else units.to(storage).float()
    return codes * each
