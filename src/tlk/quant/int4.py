"""4-bit integers with one scale, and perhaps one zero point, per group of inputs (GPTQ, AWQ).

    w ≈ (q - zero) · scale        q in 0..15; zero is 8 for all groups if symmetric

GPTQ: https://arxiv.org/abs/2210.17323, AWQ: https://arxiv.org/abs/2306.00978. Rounding to nearest
takes the scales of compressed-tensors: amax / 7.5 if symmetric, so that all sixteen codes serve;
else the range of the group, widened to hold 0, over 15.

Storage: 4 bits a weight, and 16 more a group (24 with its zero point): 4.125 (4.1875) at 128.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tlk.quant._weight_only import WeightOnly
from tlk.quant.codes import grouped, pack_nibbles, positive
from tlk.quant.format import Packed, check_fits

GROUP_SIZES = (32, 64, 128)
MIDDLE = 8
"""The code of zero where there are no zero points."""


@dataclass(frozen=True, slots=True)
class Int4(WeightOnly):
    """weight uint8 [n, k/2] as codes.py packs it, scale [n, k/G], zero uint8 [n, k/G] if not symmetric.

    group_size: inputs that share a scale, 32, 64 or 128; None: a whole row.
    """

    kind: ClassVar[str] = "int4"
    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(
                f"group_size must be None or one of {GROUP_SIZES}, got {self.group_size}"
            )

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None."""
        unit = self.group_size or 2
        return None if k % unit == 0 else f"{k} inputs are not divisible by {unit}"

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        check_fits(self, n, k)
        groups = k // (self.group_size or k)
        packed = {
            "weight": torch.empty(n, k // 2, dtype=torch.uint8, device=device),
            "scale": torch.empty(n, groups, dtype=dtype, device=device),
        }
        if not self.symmetric:
            packed["zero"] = torch.empty(n, groups, dtype=torch.uint8, device=device)
        return packed

    def scales(
        self, weight: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale [n, k/G] in `dtype` and zero uint8 [n, k/G] (None if symmetric) of `weight` [n, k].

        dtype: None is the weight's own.
        """
        check_fits(self, *weight.shape)
        groups = grouped(weight.float(), weight.shape[1] // (self.group_size or weight.shape[1]))
        dtype = dtype or weight.dtype
        if self.symmetric:
            return positive((groups.abs().amax(-1) / 7.5).to(dtype)), None
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = positive(((high - low) / 15).to(dtype))
        zero = (-low / scale.float()).round().clamp(0, 15)
        return scale, zero.to(torch.uint8)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Packed:
        """`weight` [n, k] in the nearest codes of a given `scale` and `zero`, as `scales` returns them."""
        groups = grouped(weight.float(), scale.shape[1])
        offset = MIDDLE if zero is None else zero.float()[..., None]
        codes = ((groups / scale.float()[..., None]).round() + offset).clamp(0, 15).flatten(1)
        packed = {"weight": pack_nibbles(codes, groups.shape[-1]), "scale": scale}
        return packed if zero is None else packed | {"zero": zero}

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        return self.encode(weight, *self.scales(weight, dtype))
