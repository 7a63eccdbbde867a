"""8-bit integers: the weight alone, or the weight and the activations.

    w ≈ (q - zero) · scale          Int8Weight: 16-bit activations, a scale per row or group of inputs
    y ≈ (x₈ · qᵀ) · scale · xscale   Int8: a scale per row of the weight and per row of x

Xiao et al., "SmoothQuant", https://arxiv.org/abs/2211.10438. Weight scales are amax / 127.5 as in
compressed-tensors; activations are rounded with amax / 127 by kernels/act_quant.py.

Storage: 8 bits a weight, and a scale per row (or 16 bits per group).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tlk.quant._eight_bit import EightBit
from tlk.quant._weight_only import WeightOnly
from tlk.quant.codes import grouped, positive
from tlk.quant.format import Packed, check_fits


@dataclass(frozen=True, slots=True)
class Int8Weight(WeightOnly):
    """weight int8 [n, k], scale [n, 1] or [n, k/G], zero int8 like scale if not symmetric.

    group_size: inputs that share a scale; None: a whole row.
    """

    kind: ClassVar[str] = "int8"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in (None, 32, 64, 128):
            raise ValueError(f"group_size must be None, 32, 64 or 128, got {self.group_size}")

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None."""
        unit = self.group_size or 1
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
            "weight": torch.empty(n, k, dtype=torch.int8, device=device),
            "scale": torch.empty(n, groups, dtype=dtype, device=device),
        }
        if not self.symmetric:
            packed["zero"] = torch.empty(n, groups, dtype=torch.int8, device=device)
        return packed

    def scales(
        self, weight: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale [n, k/G] in `dtype` and zero int8 [n, k/G] (None if symmetric) of `weight` [n, k].

        dtype: None is the weight's own.
        """
        check_fits(self, *weight.shape)
        groups = grouped(weight.float(), weight.shape[1] // (self.group_size or weight.shape[1]))
        dtype = dtype or weight.dtype
        if self.symmetric:
            return positive((groups.abs().amax(-1) / 127.5).to(dtype)), None
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = positive(((high - low) / 255).to(dtype))
        zero = (-128 - low / scale.float()).round().clamp(-128, 127)
        return scale, zero.to(torch.int8)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Packed:
        """`weight` [n, k] in the nearest codes of a given `scale` and `zero`, as `scales` returns them."""
        groups = grouped(weight.float(), scale.shape[1])
        offset = 0 if zero is None else zero.float()[..., None]
        codes = ((groups / scale.float()[..., None]).round() + offset).clamp(-128, 127)
        packed = {"weight": codes.flatten(1).to(torch.int8), "scale": scale}
        return packed if zero is None else packed | {"zero": zero}

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        return self.encode(weight, *self.scales(weight, dtype))


@dataclass(frozen=True, slots=True)
class Int8(EightBit):
    """weight int8 [n, k], scale float32 [n, 1]; static: input_scale float32 [1, 1] of the activations.

    Not static: every row of the activations gets a scale of its own when it comes. Static: who
    calibrated adds `input_scale` to what `quantize` and `encode` return.
    """

    kind: ClassVar[str] = "int8"
    storage: ClassVar[torch.dtype] = torch.int8
    static: bool = False

    def scales(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Scale float32 [n, 1] of `weight` [n, k], one that `dtype` (None: the weight's) holds exactly."""
        amax = weight.float().abs().amax(1, keepdim=True)
        return positive((amax / 127.5).to(dtype or weight.dtype)).float()

    def encode(self, weight: Tensor, scale: Tensor) -> Packed:
        """`weight` [n, k] in the nearest codes of a given `scale` float32 [n, 1]."""
        codes = (weight.float() / scale).round().clamp(-128, 127)
        return {"weight": codes.to(torch.int8), "scale": scale}
