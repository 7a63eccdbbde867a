"""The layers every model is built from. Parameters take the device and dtype of construction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlk import parallel
from tlk.kernels.norm import layer_norm, rms_norm
from tlk.models.config import NormConfig
from tlk.parallel import Split
from tlk.quant.format import DENSE, Dense, Format, Norm, Packed


def parameter(tensor: Tensor) -> nn.Parameter:
    """A weight: tlk runs models, it does not train them."""
    return nn.Parameter(tensor, requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) · (weight + weight_offset) over the last dimension, of `size` features."""

    def __init__(self, size: int, eps: float, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., size]."""
        return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)

    def before_linear(self, x: Tensor) -> tuple[Tensor, Norm | None]:
        """`x` as it is, and the norm that the matmul applies while it reads it."""
        return x, Norm(self.weight, self.eps, self.weight_offset)


class LayerNorm(nn.Module):
    """(x - mean) / std · (weight + weight_offset) + bias over the last dimension."""

    bias: nn.Parameter | None

    def __init__(
        self, size: int, eps: float, weight_offset: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = parameter(torch.empty(size))
        self.register_parameter("bias", parameter(torch.empty(size)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., size]."""
        return layer_norm(x, self.weight, self.bias, self.eps, weight_offset=self.weight_offset)

    def before_linear(self, x: Tensor) -> tuple[Tensor, Norm | None]:
        """The normalized `x`: a mean cannot be divided out after the matmul, as an rms can."""
        return self(x), None


def norm(config: NormConfig, size: int) -> RMSNorm | LayerNorm:
    """The norm that `config` describes, over `size` features."""
    if config.kind == "rms":
        return RMSNorm(size, config.eps, config.weight_offset)
    return LayerNorm(size, config.eps, config.weight_offset, config.bias)


class Linear(nn.Module):
    """y = act(norm(x) · Wᵀ + bias) + residual, with W stored however `format` stores it.

    `split` divides the weight among the ranks of tlk.parallel: "out" its outputs, so that x is whole
    and y a part; "in" its inputs, so that x is a part and y, after a sum over ranks, whole.
    """

    bias: nn.Parameter | None
    format: Format

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        format: Format = DENSE,
        split: Split | None = None,
    ) -> None:
        super().__init__()
        if split == "in":
            in_features = parallel.per_rank("in_features", in_features)
        elif split == "out":
            out_features = parallel.per_rank("out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.split = split
        self.sums_ranks = split == "in" and parallel.world() > 1
        self.packed_names: tuple[str, ...] = ()
        self.store(format, format.empty(out_features, in_features))
        self.register_parameter("bias", parameter(torch.empty(out_features)) if bias else None)

    def store(self, format: Format, packed: Packed) -> None:
        """Keep the weight as `packed` in `format` from now on; what held it before is let go.

        `packed` may lie on the meta device, to be filled later.
        """
        for name in self.packed_names:
            delattr(self, name)
        self.format, self.packed_names = format, tuple(packed)
        for name, tensor in packed.items():
            self.register_parameter(name, parameter(tensor))

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm | LayerNorm | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        in_place: bool = False,
        gate: str | None = None,
    ) -> Tensor:
        """Multiply `x` [..., in_features]; `residual` [..., out_features] is added last.

        in_place: nobody reads `residual` again, so the result may be written over it. gate: an
        activation; `x` [..., 2 · in_features] is [gate, up] then, and gate(gate) · up is multiplied.
        """
        x, prologue = _before_linear(x, norm)
        if self.sums_ranks:
            y = parallel.all_reduce(self.format.linear(x, self.packed(), norm=prologue, gate=gate))
            return self._finish(y, activation, residual)
        return self.format.linear(
            x,
            self.packed(),
            norm=prologue,
            gate=gate,
            bias=self.bias,
            activation=activation,
            residual=residual,
            in_place=in_place,
        )

    def rounds(self, x: Tensor) -> bool:
        """Whether rows like `x` are rounded to 8 bit before they are multiplied, and nothing else is done."""
        return self.format.rounds(x, self.packed())

    def gated(self, x: Tensor, norm: RMSNorm | LayerNorm | None, activation: str) -> Tensor:
        """act(gate(x)) · up(x) [..., out_features / 2], where the first half of the outputs is gate's."""
        if self.sums_ranks:
            raise ValueError("a gated product needs whole outputs: split='in' sums them over ranks")
        x, prologue = _before_linear(x, norm)
        return self.format.gated_linear(
            x, self.packed(), activation=activation, norm=prologue, bias=self.bias
        )

    def packed(self) -> Packed:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def _finish(self, y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        if activation is not None:
            raise ValueError(f"activation must be None where ranks are summed, got {activation!r}")
        for term in (self.bias, residual):
            if term is not None:
                y = y.add_(term)
        return y

    def extra_repr(self) -> str:
        split = f", split={self.split!r}" if self.split else ""
        return f"{self.in_features}, {self.out_features}, format={self.format}{split}"


def _before_linear(x: Tensor, norm: RMSNorm | LayerNorm | None) -> tuple[Tensor, Norm | None]:
    return (x, None) if norm is None else norm.before_linear(x)


class Embedding(nn.Module):
    """One row of `weight` [count, size] per token id; also the output head where it is tied.

    The table is stored as it is. `format` says how logits are computed where it is dense itself;
    a head that shares its weight with the table is not quantized.
    """

    def __init__(self, count: int, size: int, format: Format = DENSE) -> None:
        super().__init__()
        self.format = format if isinstance(format, Dense) else DENSE
        self.weight = parameter(torch.empty(count, size))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of `ids` [T] as [T, size]."""
        return F.embedding(ids, self.weight)

    def logits(self, x: Tensor, norm: RMSNorm | LayerNorm) -> Tensor:
        """norm(x) [R, size] times the transposed table: [R, count]."""
        x, prologue = norm.before_linear(x)
        return self.format.linear(x, {"weight": self.weight}, norm=prologue)
