"""What the formats share that multiply 8-bit activations by 8-bit weights.

    y = act((x₈ · q₈ᵀ) · x_scale · scale + bias) + residual

x is rounded to 8 bit after its norm, in one kernel with it. A GPU whose tensor cores do not know
the 8-bit dtype multiplies 16-bit activations by the dequantized weight.
"""

from typing import ClassVar

import torch
from torch import Tensor

from tlk.quant.format import DENSE, Norm, Packed, check_fits, prepare_input


class EightBit:
    """weight [n, k] in `storage`, scale float32 [n, 1] or, in blocks, [n/128, k/128] rounded up."""

    __slots__ = ()
    kind: ClassVar[str]
    storage: ClassVar[torch.dtype]
    static: bool

    @property
    def act(self) -> torch.dtype | None:
        """The dtype that the kernel wants its activations in."""
        return self.storage

    @property
    def deterministic(self) -> bool:
        """False: few rows and many rows are multiplied by different kernels."""
        return False

    @property
    def block(self) -> int | None:
        """Outputs, and inputs, that share a scale; None: a scale per output."""
        return None

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None."""
        return None

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        check_fits(self, n, k)
        shape = (-(-n // self.block), -(-k // self.block)) if self.block else (n, 1)
        packed = {
            "weight": torch.empty(n, k, dtype=self.storage, device=device),
            "scale": torch.empty(shape, dtype=torch.float32, device=device),
        }
        if self.static:
            packed["input_scale"] = torch.empty(1, 1, dtype=torch.float32, device=device)
        return packed

    def scales(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The scale of `weight` [n, k], float32, one that `dtype` (None: the weight's) holds exactly."""
        raise NotImplementedError

    def encode(self, weight: Tensor, scale: Tensor) -> Packed:
        """`weight` [n, k] in the nearest codes of a given `scale`, as `scales` returns it."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        return self.encode(weight, self.scales(weight, dtype))

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        scale = packed["scale"]
        if self.block:
            scale = spread(scale, packed["weight"].shape, self.block)
        return (packed["weight"].float() * scale).to(dtype)

    def linear(
        self,
        x: Tensor,
        packed: Packed,
        *,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """act(norm(x) [..., k] · weightᵀ + bias) + residual [..., n]."""
        x, norm = prepare_input(x, packed, norm)
        weight = {"weight": self.dequantize(packed, x.dtype)}
        return DENSE.linear(
            x, weight, norm=norm, bias=bias, activation=activation, residual=residual
        )  # fmt: skip

    def gated_linear(
        self,
        x: Tensor,
        packed: Packed,
        *,
        activation: str,
        norm: Norm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """act(h · gateᵀ) · (h · upᵀ) [..., n / 2] of h = norm(x)."""
        x, norm = prepare_input(x, packed, norm)
        weight = {"weight": self.dequantize(packed, x.dtype)}
        return DENSE.gated_linear(x, weight, activation=activation, norm=norm, bias=bias)


def spread(scale: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """The scale of every weight of a `shape` [n, k], from one a block; the last ones may be partial."""
    n, k = shape
    rows = scale.repeat_interleave(block, 0)[:n]
    return rows.repeat_interleave(block, 1)[:, :k]
