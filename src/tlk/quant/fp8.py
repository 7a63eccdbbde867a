"""8-bit floats, E4M3 without infinities: weight and activations, or the weight where a GPU has no FP8.

    w ≈ q · scale        |q| <= 448; one scale per tensor, per output, or per block of 128 × 128

Micikevicius et al., "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433; blocks as in
DeepSeek-V3, https://arxiv.org/abs/2412.19437. A scale per tensor is stored once for every output.
Activations take a scale per row, or per row and 128 inputs with blocks: amax / 448.

Storage: 8 bits a weight; 32 bits an output, or 0.002 bits a weight in blocks.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tlk.quant._eight_bit import EightBit, spread
from tlk.quant.codes import positive
from tlk.quant.format import BLOCK, Packed, check_fits

Granularity = Literal["tensor", "channel", "block"]
LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8(EightBit):
    """weight float8_e4m3fn [n, k], scale float32 [n, 1], or [n/128, k/128] rounded up in blocks.

    static: `input_scale` float32 [1, 1] of the activations, which who calibrated adds to what
    `quantize` and `encode` return. weight_only: activations stay in the model's dtype.
    """

    kind: ClassVar[str] = "fp8"
    storage: ClassVar[torch.dtype] = torch.float8_e4m3fn
    granularity: Granularity = "channel"
    static: bool = False
    weight_only: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "block"):
            raise ValueError(
                f"granularity must be tensor, channel or block, got {self.granularity!r}"
            )
        if self.static and self.granularity == "block":
            raise ValueError("static must be False with blocks: their activations are dynamic")

    @property
    def act(self) -> torch.dtype | None:
        """The dtype that the kernel wants its activations in; None: the model's own."""
        return None if self.weight_only else self.storage

    @property
    def block(self) -> int | None:
        """Outputs, and inputs, that share a scale; None: a scale per output."""
        return BLOCK if self.granularity == "block" else None

    def scales(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The scale of `weight` [n, k], float32, one that `dtype` (None: the weight's) holds exactly."""
        check_fits(self, *weight.shape)
        n, k = weight.shape
        size = weight.float().abs()
        if self.granularity == "tensor":
            amax = size.amax().expand(n, 1).contiguous()
        elif self.granularity == "channel":
            amax = size.amax(1, keepdim=True)
        else:
            padded = torch.nn.functional.pad(size, (0, -k % BLOCK, 0, -n % BLOCK))
            amax = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
        return positive((amax / LARGEST).to(dtype or weight.dtype)).float()

    def encode(self, weight: Tensor, scale: Tensor) -> Packed:
        """`weight` [n, k] in the nearest codes of a given `scale`, as `scales` returns it."""
        each = spread(scale, weight.shape, BLOCK) if self.block else scale
        codes = (weight.float() / each).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"weight": codes, "scale": scale}
