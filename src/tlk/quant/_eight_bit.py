"""What the formats share that multiply 8-bit activations by 8-bit weights.

    y = act((x₈ · q₈ᵀ) · x_scale · scale + bias) + residual

x is rounded to 8 bit after its norm, or after the gate of an MLP, in one kernel with it. Few rows, and
all rows on a GPU whose tensor cores do not know the 8-bit dtype, are not rounded: they meet the
dequantized weight.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from tlk.kernels._device import sm
from tlk.kernels.act_quant import gated_quant, quantize_act, rms_norm_quant
from tlk.kernels.dequantize import dequantize
from tlk.kernels.scaled_mm import scaled_mm
from tlk.quant._weight_only import multiply, operands
from tlk.quant.format import Norm, Packed, act_and_mul, check_fits, prepare_input

FIRST_SM = {torch.float8_e4m3fn: 89, torch.int8: 80}
"""The first GPUs whose tensor cores multiply that dtype."""
WEIGHT_ONLY_ROWS = 8
"""Up to so many rows the weight's bytes decide the time, and rounding x would be one more kernel.

On an H100 the four linears of a Llama-3.1-8B layer take 86 µs in float8 for one row of 16-bit x, and 80
of 8-bit x without the rounding; for 16 rows, two columns of tiles of them, 108 and 82.
"""


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
        """The weight [n, k], computed in float32 and rounded once to `dtype`."""
        return dequantize(**operands(self.kind, packed, self.block), dtype=dtype)

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
        if gate is not None and not self.rounds(x, packed):
            x, gate = act_and_mul(x, gate), None
        x, norm = prepare_input(x, packed, norm)
        how: Any = {"bias": bias, "activation": activation, "residual": residual}
        if self.keeps_activations(x):
            return multiply(self.kind, x, packed, norm, self.block, **how)
        q, scale = self._rounded(x, packed, norm, gate)
        return scaled_mm(q, scale, packed["weight"], packed["scale"], out_dtype=x.dtype, **how)

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
        if self.keeps_activations(x):
            how: Any = {"bias": bias, "activation": activation, "gated": True}
            return multiply(self.kind, x, packed, norm, self.block, **how)
        q, scale = self._rounded(x, packed, norm)
        both = scaled_mm(q, scale, packed["weight"], packed["scale"], bias=bias, out_dtype=x.dtype)
        return act_and_mul(both, activation)

    def rounds(self, x: Tensor, packed: Packed) -> bool:
        """Whether `x` [..., k] is rounded as it is: neither kept, nor scaled or permuted before."""
        return not (self.keeps_activations(x) or "pre_scale" in packed or "perm" in packed)

    def keeps_activations(self, x: Tensor) -> bool:
        """Whether `x` is multiplied in its own dtype: it has few rows, or the GPU no such matmul."""
        few = x.numel() // max(x.shape[-1], 1) <= WEIGHT_ONLY_ROWS
        return self.act is None or few or (x.is_cuda and sm(x.device) < FIRST_SM[self.storage])

    def _rounded(
        self, x: Tensor, packed: Packed, norm: Norm | None, gate: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """norm(x), or the gated half of it, in 8 bit, and its scales."""
        how: Any = {
            "group_size": self.block,
            "scale": packed["input_scale"] if self.static else None,
        }
        if gate is not None:
            return gated_quant(x, self.storage, gate, **how)
        if norm is None:
            return quantize_act(x, self.storage, **how)
        return rms_norm_quant(
            x, norm.weight, self.storage, norm.eps, weight_offset=norm.weight_offset, **how
        )


def spread(scale: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """The scale of every weight of a `shape` [n, k], from one a block; the last ones may be partial."""
    n, k = shape
    rows = scale.repeat_interleave(block, 0)[:n]
    return rows.repeat_interleave(block, 1)[:, :k]
