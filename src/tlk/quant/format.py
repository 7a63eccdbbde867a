"""What every weight format is: how one linear layer's weight is stored and multiplied.

One layout rule carries the package: in every stored tensor dim 0 runs over output features and
dim 1 over input features (size 1 where it does not vary). So fusing q, k and v is `cat` on dim 0
and tensor parallelism is `chunk` on either, for values, scales and zero points alike. The order
is shard, then fuse: a rank holds its own heads of q, of k and of v, one after the other.

The names in `Packed` mean the same in every format: weight, scale, zero, global_scale, table and
nested_… are of the weight; of the input x are

    pre_scale [1, K]    x is multiplied by it (AWQ's and SmoothQuant's scales where nothing absorbed them)
    perm [1, K]         int32, x is read in that order (GPTQ's act-order: groups of inputs lie apart)
    input_scale [1, 1]  float32, x is rounded to 8 bit with it
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.kernels.activation import gelu_and_mul, silu_and_mul
from tlk.kernels.gated_linear import gated_linear
from tlk.kernels.matmul import matmul, matmul_add_
from tlk.kernels.norm import rms_norm
from tlk.kernels.norm_linear import norm_linear

Packed = dict[str, Tensor]

BLOCK = 128
"""Outputs, and inputs, that share one scale where scales come in blocks."""
OF_OUTPUTS = ("weight", "scale", "zero")
"""Tensors that each of several fused layers has for itself, whatever their shapes."""
OF_CODES = ("table", "nested_map", "nested_absmax")
"""Tensors whose dim 1 does not run over inputs."""


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

    def rounds(self, x: Tensor, packed: Packed) -> bool:
        """Whether `linear` rounds `x` [..., k] to `act` with nothing but a norm before that."""
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

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None if it can."""
        ...

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Round `weight` [n, k] to nearest, for a model in `dtype`; None: the weight's own.

        Calibrators call it on the weights they adjusted, which may be float32.
        """
        ...

    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [n, k] weight the kernel multiplies by, rounded once to `dtype`; the oracle of its tests."""
        ...

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
        """act(norm(x) [..., k] · weightᵀ + bias [n]) + residual [..., n], in as few kernels as it takes.

        gate: an activation; then `x` [..., 2k] is [gate, up], what is multiplied is gate(gate) · up,
        and there is no norm. in_place: nobody reads `residual` again, so the result may be written over it.
        """
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

    def rounds(self, x: Tensor, packed: Packed) -> bool:
        return False

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        return {"weight": torch.empty(n, k, device=device, dtype=dtype)}

    def refusal(self, n: int, k: int) -> str | None:
        return None

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        return {"weight": weight.to(dtype or weight.dtype)}

    def dequantize(self, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
        return packed["weight"].to(dtype or packed["weight"].dtype)

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
        weight, backend = packed["weight"], self._backend
        x = x if gate is None else act_and_mul(x, gate)
        if norm is None and residual is not None and in_place:
            return matmul_add_(residual, x, weight, bias, activation=activation, backend=backend)
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


def check_fits(format: Format, n: int, k: int) -> None:
    """Raise ValueError if `format` cannot store an [n, k] weight."""
    if reason := format.refusal(n, k):
        raise ValueError(f"{format} cannot store a weight [{n}, {k}]: {reason}")


def act_and_mul(both: Tensor, activation: str) -> Tensor:
    """act(gate) · up [..., I] of `both` [..., 2I] = [gate, up]."""
    if activation == "silu":
        return silu_and_mul(both)
    return gelu_and_mul(both, "tanh" if activation == "gelu_tanh" else "none")


def prepare_input(x: Tensor, packed: Packed, norm: Norm | None) -> tuple[Tensor, Norm | None]:
    """`x` [..., K] as the weight wants it, and the norm that is left to the kernel."""
    pre_scale, perm = packed.get("pre_scale"), packed.get("perm")
    if pre_scale is None and perm is None:
        return x, norm
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, weight_offset=norm.weight_offset)
    if pre_scale is not None:
        x = x * pre_scale[0].to(x.dtype)
    return x if perm is None else x.index_select(-1, perm[0]), None


def shard(packed: Packed, dim: int, rank: int, world: int) -> Packed:
    """The part of rank `rank` of `world` along `dim`; what does not vary along it is shared.

    Raises ValueError for a tensor that does not divide evenly, and where a group or block of inputs
    or outputs that share a scale would be divided; UnsupportedError for inputs in act-order.
    """
    if world > 1:
        _check_divisible(packed, dim, world)
    whole = OF_CODES if dim == 1 else ()
    part = {
        name: t if name in whole else _shard(name, t, dim, rank, world)
        for name, t in packed.items()
    }
    if dim == 1 and "nested_start" in packed:
        part["nested_start"] = packed["nested_start"] + rank * part["scale"].shape[-1]
    return part


def _check_divisible(packed: Packed, dim: int, world: int) -> None:
    if dim == 1 and "perm" in packed:
        raise UnsupportedError(
            "inputs in act-order (perm) cannot be divided among ranks: each needs inputs of others"
        )
    if "weight" not in packed or "scale" not in packed:
        return
    weight, scale = packed["weight"], packed["scale"]
    (n, k), (rows, groups) = weight.shape[-2:], scale.shape[-2:]
    in_blocks = rows not in (1, n) or (rows == 1 < n and groups > 1)
    size, unit = (n, BLOCK) if dim == 0 else (k, BLOCK)
    if in_blocks and size % (unit * world) and (dim == 1 or rows > 1):
        raise ValueError(
            f"weight has {size} entries in dim {dim}, not divisible by {world} ranks in blocks of {unit}"
        )
    if dim == 1 and weight.dtype == torch.uint8 and groups % world:
        raise ValueError(f"scale has {groups} entries in dim 1, not divisible by {world} ranks")


def _shard(name: str, tensor: Tensor, dim: int, rank: int, world: int) -> Tensor:
    axis = dim + max(tensor.dim() - 2, 0)  # behind experts, if they are stacked
    size = tensor.shape[axis]
    if size == 1:
        return tensor
    if size % world:
        raise ValueError(f"{name} has {size} entries in dim {dim}, not divisible by {world} ranks")
    return tensor.chunk(world, axis)[rank].contiguous()


def fuse(parts: list[Packed]) -> Packed:
    """Stack layers that read the same input, such as q, k and v, along their outputs.

    Per-input tensors [1, K] beside a taller weight serve all parts; ValueError if they differ, if
    the parts do not have the same tensors, or if a block of outputs would hold rows of two parts. Of
    their input_scale the largest serves all, since it cuts off no activation of any.
    """
    _check_alike(parts)
    for part in parts[:-1]:
        _check_whole_blocks(part)
    rows = [max(t.shape[0] for t in part.values()) for part in parts]
    return {name: _fused(name, [p[name] for p in parts], rows) for name in parts[0]}


def _fused(name: str, tensors: list[Tensor], rows: list[int]) -> Tensor:
    if name == "input_scale":
        return torch.stack(tensors).amax(0)
    per_input = all(t.shape[0] == 1 < n for t, n in zip(tensors, rows, strict=True))
    if per_input and name not in OF_OUTPUTS:
        return _same(name, tensors)
    return torch.cat(tensors)


def stack(experts: list[Packed]) -> Packed:
    """Layers of one shape, such as the experts of a layer, along a new dim 0: [E, N, K]."""
    _check_alike(experts)
    return {name: torch.stack([e[name] for e in experts]) for name in experts[0]}


def _check_alike(parts: list[Packed]) -> None:
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            raise ValueError(
                f"parts must have the same tensors, got {sorted(parts[0])} and {sorted(part)}"
            )


def _check_whole_blocks(part: Packed) -> None:
    if "scale" not in part:
        return
    n, rows = part["weight"].shape[0], part["scale"].shape[0]
    if rows != n and n % BLOCK:
        raise ValueError(
            f"a layer of {n} outputs, with scales for blocks of {BLOCK}, cannot be fused with the next"
        )


def _same(name: str, tensors: list[Tensor]) -> Tensor:
    if not all(torch.equal(tensors[0], t) for t in tensors[1:]):
        raise ValueError(f"{name} varies over inputs only and must be equal in all fused layers")
    return tensors[0]


def rows(packed: Packed, start: int, stop: int) -> Packed:
    """Views of the outputs `start` to `stop`: one of the layers that `fuse` has stacked.

    Raises ValueError where a block of outputs that share a scale would be divided.
    """
    n = packed["weight"].shape[0]
    views = {}
    for name, tensor in packed.items():
        height = tensor.shape[0]
        if height == n:
            views[name] = tensor[start:stop]
        elif height == 1 and name not in OF_OUTPUTS:
            views[name] = tensor
        elif start % BLOCK or (stop % BLOCK and stop != n):
            raise ValueError(f"outputs {start} to {stop} divide a block of {BLOCK} of {name}")
        else:
            views[name] = tensor[start // BLOCK : -(-stop // BLOCK)]
    return views
