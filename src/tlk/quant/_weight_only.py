"""What all formats share whose activations stay in 16 bit: one kernel that dequantizes as it reads."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from tlk.kernels.dequant_mm import dequant_mm
from tlk.kernels.dequantize import dequantize
from tlk.quant.format import Norm, Packed, act_and_mul, prepare_input


class WeightOnly:
    """A format of `kind`, as kernels.dequant_mm names it, on the packed tensors of that kind."""

    __slots__ = ()
    kind: ClassVar[str]

    @property
    def act(self) -> torch.dtype | None:
        """None: activations stay in the model's dtype."""
        return None

    def rounds(self, x: Tensor, packed: Packed) -> bool:
        """False: activations stay in the model's dtype."""
        return False

    @property
    def deterministic(self) -> bool:
        """False: few rows and many rows are multiplied by different kernels."""
        return False

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k], computed in float32 and rounded once to `dtype`."""
        return dequantize(**operands(self.kind, packed), dtype=dtype)

    def linear(
        self,
        x: Tensor,
        packed: Packed,
        *,
        norm: Norm | None = None,
        gate: str | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """act(norm(x) [..., k] · weightᵀ + bias) + residual [..., n]; gate: of `x` [..., 2k] = [gate, up]."""
        x = x if gate is None else act_and_mul(x, gate)
        x, norm = prepare_input(x, packed, norm)
        return multiply(self.kind, x, packed, norm, bias=bias, activation=activation,
                        residual=residual)  # fmt: skip

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
        return multiply(self.kind, x, packed, norm, bias=bias, activation=activation, gated=True)


def multiply(
    kind: str, x: Tensor, packed: Packed, norm: Norm | None, block: int | None = None, **how: Any
) -> Tensor:
    """`dequant_mm` of `x`, as `prepare_input` left it, and the `packed` tensors of `kind`."""
    norm_weight, eps, weight_offset = norm or (None, 0.0, 0.0)
    return dequant_mm(
        x,
        **operands(kind, packed, block),
        norm_weight=norm_weight,
        eps=eps,
        weight_offset=weight_offset,
        **how,
    )


def operands(kind: str, packed: Packed, block: int | None = None) -> dict[str, Any]:
    """The arguments that say to `dequant_mm` and `dequantize` what the weight is.

    block: inputs and outputs that share a scale; None: the groups are as many as the scale's columns.
    """
    weight, scale = packed["weight"], packed["scale"]
    inputs = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    nested = ("nested_absmax", "nested_start", "nested_map", "nested_offset")
    return {
        "weight": weight,
        "scale": scale,
        "kind": kind,
        "group_size": block or inputs // scale.shape[1],
        "zero": packed.get("zero"),
        "table": packed.get("table"),
        "global_scale": packed.get("global_scale"),
        "nested": tuple(packed[name] for name in nested) if nested[0] in packed else None,
    }
