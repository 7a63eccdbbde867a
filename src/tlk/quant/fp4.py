"""4-bit floats E2M1 in small blocks: MXFP4 with powers of two as scales, NVFP4 with E4M3 ones.

    MXFP4: w ≈ e2m1[q] · 2^(s - 127)             s uint8, one per 32 inputs
    NVFP4: w ≈ e2m1[q] · scale · global_scale    scale E4M3, one per 16 inputs; global_scale per tensor

OCP Microscaling Formats 1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
MXFP4's rounding to nearest takes the power of two by amax rounded to E2M1's own precision, which
beats both floor and ceiling (relative error 0.112 on normal weights against 0.114 and 0.119).

Storage: 4.25 bits a weight (MXFP4), 4.5 (NVFP4).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from tlk.quant._weight_only import WeightOnly
from tlk.quant.codes import grouped, pack_nibbles, unpack_nibbles
from tlk.quant.format import Packed, check_fits

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of codes 0 to 7; 8 to 15 are the same with the sign set."""
LARGEST = 6.0
LARGEST_SCALE, SMALLEST_SCALE = 448.0, 2.0**-9


def e2m1_codes(values: Tensor) -> Tensor:
    """The nearest codes, uint8, of `values` of any shape; ties go to the even code, -0 keeps its sign."""
    size = values.abs().float()
    code = torch.zeros_like(size, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        code += (size > middle if i % 2 == 0 else size >= middle).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """The values, float32, of `codes` of any shape."""
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
    return table[codes.int()]


def e8m0(exponents: Tensor) -> Tensor:
    """2^(e - 127), float32, of `exponents` uint8 of any shape; 255 is NaN in that format, infinite here."""
    bits = exponents.int() << 23
    return torch.where(exponents == 0, 1 << 22, bits).int().view(torch.float32)


class _FP4(WeightOnly):
    """What the two have in common: the group, and codes in halves of bytes."""

    __slots__ = ()
    group_size: ClassVar[int]

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None."""
        fits = k % self.group_size == 0
        return None if fits else f"{k} inputs are not divisible by {self.group_size}"

    def _values(self, packed: Packed) -> Tensor:
        codes = unpack_nibbles(packed["weight"], self.group_size)
        return grouped(e2m1_values(codes), codes.shape[1] // self.group_size)


@dataclass(frozen=True, slots=True)
class MXFP4(_FP4):
    """weight uint8 [n, k/2] as codes.py packs it, scale uint8 [n, k/32], exponents of two plus 127."""

    kind: ClassVar[str] = "mx4"
    group_size: ClassVar[int] = 32

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        check_fits(self, n, k)
        return {
            "weight": torch.empty(n, k // 2, dtype=torch.uint8, device=device),
            "scale": torch.empty(n, k // self.group_size, dtype=torch.uint8, device=device),
        }

    def scales(self, weight: Tensor) -> Tensor:
        """The exponents, uint8 [n, k/32], of `weight` [n, k]: amax lands in E2M1's top octave, 4 to 7."""
        check_fits(self, *weight.shape)
        amax = grouped(weight.float(), weight.shape[1] // self.group_size).abs().amax(-1)
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, mantissa in [0.5, 1)
        exponent = exponent - 1 + (mantissa >= 1.75 / 2).int() - 2
        return torch.where(amax == 0, 127, exponent + 127).clamp(0, 254).to(torch.uint8)

    def encode(self, weight: Tensor, scale: Tensor) -> Packed:
        """`weight` [n, k] in the nearest codes of given exponents uint8 [n, k/32]."""
        groups = grouped(weight.float(), scale.shape[1])
        codes = e2m1_codes(groups * e8m0(254 - scale)[..., None]).flatten(1)
        return {"weight": pack_nibbles(codes, self.group_size), "scale": scale}

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Round to nearest; `dtype` changes nothing, scales are powers of two."""
        return self.encode(weight, self.scales(weight))


@dataclass(frozen=True, slots=True)
class NVFP4(_FP4):
    """weight uint8 [n, k/2] as codes.py packs it, scale float8_e4m3fn [n, k/16], global_scale float32 [n, 1]."""

    kind: ClassVar[str] = "nv4"
    group_size: ClassVar[int] = 16

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        check_fits(self, n, k)
        return {
            "weight": torch.empty(n, k // 2, dtype=torch.uint8, device=device),
            "scale": torch.empty(n, k // 16, dtype=torch.float8_e4m3fn, device=device),
            "global_scale": torch.empty(n, 1, dtype=torch.float32, device=device),
        }

    def global_scale(self, amax: Tensor) -> Tensor:
        """The global scale, float32 [], of weights of at most `amax`: those of one fused layer share it.

        It is the reciprocal of what compressed-tensors stores, which is the reciprocal of this.
        """
        stored = (
            LARGEST * LARGEST_SCALE / torch.where(amax == 0, LARGEST * LARGEST_SCALE, amax).float()
        )
        return 1 / stored

    def scales(self, weight: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale E4M3 [n, k/16] and global_scale [n, 1] of `weight` [n, k].

        global_scale: float32 [], for layers that share one; None: that of this weight.
        """
        check_fits(self, *weight.shape)
        size = grouped(weight.float(), weight.shape[1] // self.group_size).abs().amax(-1)
        if global_scale is None:
            global_scale = self.global_scale(size.amax())
        scale = (size / LARGEST / global_scale).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        each = global_scale.expand(len(weight), 1).contiguous()
        return scale.to(torch.float8_e4m3fn), each

    def encode(self, weight: Tensor, scale: Tensor, global_scale: Tensor) -> Packed:
        """`weight` [n, k] in the nearest codes of given scales, as `scales` returns them."""
        groups = grouped(weight.float(), scale.shape[1])
        codes = e2m1_codes(groups / (scale.float() * global_scale)[..., None]).flatten(1)
        packed = pack_nibbles(codes, self.group_size)
        return {"weight": packed, "scale": scale, "global_scale": global_scale}

    def quantize(
        self,
        weight: Tensor,
        dtype: torch.dtype | None = None,
        global_scale: Tensor | None = None,
    ) -> Packed:
        """Round to nearest; `dtype` changes nothing. global_scale: as of `scales`."""
        return self.encode(weight, *self.scales(weight, global_scale))
