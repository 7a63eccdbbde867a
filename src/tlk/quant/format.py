"""What every weight format is: how one linear layer's weight is stored and multiplied.

One layout rule carries the package: in every stored tensor dim 0 runs over output features and
dim 1 over input features (size 1 where it does not vary). So fusing q, k and v is `cat` on dim 0
and tensor parallelism is `chunk` on either, for values, scales and zero points alike. The order
is shard, then fuse: a rank holds its own heads of q, of k and of v, one after the other.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tlk.kernels.gated_linear import gated_linear
from tlk.kernels.matmul import matmul
from tlk.kernels.norm_linear import norm_linear

Packed = dict[str, Tensor]


class Norm(NamedTuple):
    """An RMSNorm that a linear layer applies to its input: x / rms(x) · (weight + offset)."""

    weight: Tensor
    eps: float
    weight_offset: float


class Format(Protocol):
    """Implemented by small frozen dataclasses; holds options, never tensors."""

    @property
    def act(self) -> torch.dtype | None:
        """The dtype the kernel wants its activations in; None: the model's own."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether no row of a result depends on the others or on their number, bit for bit."""
        ...

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        """Uninitialized storage for an [n, k] weight of a model in `dtype`; None: torch's default."""
        ...

    def quantize(self, weight: Tensor) -> Packed:
        """Round `weight` [n, k] to nearest. Calibrators call it on the weights they adjusted."""
        ...

    def dequantize(self, packed: Packed) -> Tensor:
        """The [n, k] weight the kernel multiplies by; the oracle of its tests."""
        ...

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
        """act(norm(x) [..., k] · weightᵀ + bias [n]) + residual [..., n], in as few kernels as it takes."""
        ...

    def gated_linear(
        self,
        x: Tensor,
        packed: Packed,
        *,
        activation: str,
        norm: Norm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """act(h · gateᵀ) · (h · upᵀ) [..., n / 2] of h = norm(x) and the halves [gate; up] of the weight."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """The weight as it is, in the model's own dtype.

    `deterministic` costs speed: the kernels are then the same for one row and for thousands.
    """

    deterministic: bool = False

    @property
    def act(self) -> torch.dtype | None:
        return None

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        return {"weight": torch.empty(n, k, device=device, dtype=dtype)}

    def quantize(self, weight: Tensor) -> Packed:
        return {"weight": weight}

    def dequantize(self, packed: Packed) -> Tensor:
        return packed["weight"]

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
        weight, backend = packed["weight"], self._backend
        if norm is None:
            return matmul(
                x, weight, bias, activation=activation, residual=residual, backend=backend
            )  # fmt: skip
        y = norm_linear(
            x,
            norm.weight,
            weight,
            bias,
            eps=norm.eps,
            weight_offset=norm.weight_offset,
            activation=activation,
            backend=backend,
        )
        return y if residual is None else y + residual

    def gated_linear(
        self,
        x: Tensor,
        packed: Packed,
        *,
        activation: str,
        norm: Norm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        weight, eps, weight_offset = norm or (None, 0.0, 0.0)
        return gated_linear(
            x,
            packed["weight"],
            bias,
            activation=activation,
            norm_weight=weight,
            eps=eps,
            weight_offset=weight_offset,
            backend=self._backend,
        )

    @property
    def _backend(self) -> str | None:
        return "invariant" if self.deterministic else None


DENSE = Dense()


def shard(packed: Packed, dim: int, rank: int, world: int) -> Packed:
    """The part of rank `rank` of `world` along `dim`; what does not vary along it is shared.

    Raises ValueError for a tensor that does not divide evenly.
    """
    return {name: _shard(name, t, dim, rank, world) for name, t in packed.items()}


def _shard(name: str, tensor: Tensor, dim: int, rank: int, world: int) -> Tensor:
    size = tensor.shape[dim]
    if size == 1:
        return tensor
    if size % world:
        raise ValueError(f"{name} has {size} entries in dim {dim}, not divisible by {world} ranks")
    return tensor.chunk(world, dim)[rank].contiguous()


def fuse(parts: list[Packed]) -> Packed:
    """Stack layers that read the same input, such as q, k and v, along their outputs.

    Per-input tensors [1, K] beside a taller weight serve all parts; ValueError if they differ.
    """
    rows = [max(t.shape[0] for t in part.values()) for part in parts]
    return {
        name: _same(name, [p[name] for p in parts])
        if all(p[name].shape[0] == 1 < n for p, n in zip(parts, rows, strict=True))
        else torch.cat([p[name] for p in parts])
        for name in parts[0]
    }


def _same(name: str, tensors: list[Tensor]) -> Tensor:
    if not all(torch.equal(tensors[0], t) for t in tensors[1:]):
        raise ValueError(f"{name} varies over inputs only and must be equal in all fused layers")
    return tensors[0]
