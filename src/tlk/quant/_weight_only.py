"""What all formats share whose activations stay in 16 bit: one kernel that dequantizes as it reads."""

from typing import ClassVar

import torch
from torch import Tensor

from tlk.quant.format import DENSE, Norm, Packed, prepare_input


class WeightOnly:
    """A format of `kind`, as kernels.dequant_mm names it, on the packed tensors of that kind."""

    __slots__ = ()
    kind: ClassVar[str]

    @property
    def act(self) -> torch.dtype | None:
        """None: activations stay in the model's dtype."""
        return None

    @property
    def deterministic(self) -> bool:
        """False: few rows and many rows are multiplied by different kernels."""
        return False

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k], computed in float32 and rounded once to `dtype`."""
        raise NotImplementedError

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
