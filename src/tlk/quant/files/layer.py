"""One linear layer out of a checkpoint: its tensors, checked, and the packed form made of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.codes import pack_nibbles
from tlk.quant.format import Format, Packed
from tlk.quant.int4 import GROUP_SIZES, MIDDLE, Int4
from tlk.quant.int8 import Int8Weight

SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """How a layer's weight is stored, and the tensors that store it."""

    format: Format
    packed: Packed


class Scheme(Protocol):
    """How one checkpoint stores its quantized layers, from its quantization config."""

    @property
    def method(self) -> str:
        """What the checkpoint calls it."""
        ...

    def listed(self, module: str) -> bool | None:
        """Whether the config says that the linear layer `module` is quantized; None: it does not say."""
        ...

    def named(self) -> Collection[str]:
        """Modules that the config names one by one as quantized: the model must have them."""
        ...

    def holds(self, suffixes: Collection[str]) -> bool:
        """Whether a layer with tensors of these names (after the module's) is quantized."""
        ...

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        """The layer `module` of `shape` [outputs, inputs] from its tensors, without its bias.

        Raises CheckpointError or UnsupportedError naming module and tensor.
        """
        ...


@dataclass
class Tensors:
    """The tensors of one module by suffix, each to be taken once."""

    module: str
    tensors: Mapping[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def take(
        self, suffix: str, dtypes: torch.dtype | Collection[torch.dtype], *shape: int | None
    ) -> Tensor:
        """The tensor, of one of `dtypes` and of `shape`, in which None stands for any size.

        CheckpointError says what is wrong with it. Shapes of one element are all the same.
        """
        if suffix not in self.tensors:
            raise CheckpointError(
                f"{self.module} lacks its tensor {suffix}; it has {', '.join(sorted(self.tensors))}"
            )
        self.taken.add(suffix)
        tensor = self.tensors[suffix]
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if tensor.dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise CheckpointError(f"{self.name(suffix)} must be {names}, got {tensor.dtype}")
        if all(size == 1 for size in shape) and tensor.numel() == 1:
            return tensor.reshape(tuple(1 for _ in shape))
        fits = len(shape) == tensor.dim() and all(
            want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{self.name(suffix)} must have shape [{wanted}], got {list(tensor.shape)}"
            )
        return tensor

    def scale(
        self, suffix: str, *shape: int | None, dtypes: Collection[torch.dtype] = SCALES
    ) -> Tensor:
        """`take`, and CheckpointError for a scale that is zero, infinite or no number."""
        scale = self.take(suffix, dtypes, *shape)
        numbers = scale.float()
        bad = ~numbers.isfinite() | (numbers == 0)
        if bad.any():
            raise CheckpointError(
                f"{self.name(suffix)} holds {int(bad.sum())} scales that are zero or not finite"
            )
        return scale

    def has(self, suffix: str) -> bool:
        return suffix in self.tensors

    def ignore(self, *suffixes: str) -> None:
        """Let these be left over."""
        self.taken.update(suffixes)

    def done(self) -> None:
        """CheckpointError unless every tensor was taken."""
        if extra := sorted(set(self.tensors) - self.taken):
            raise CheckpointError(
                f"{self.module} has tensors that are not of its format: {', '.join(extra)}"
            )

    def name(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


def integers(
    module: str,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    perm: Tensor | None = None,
) -> Layer:
    """A layer of unsigned `bits`-bit codes uint8 [N, K], whose groups are as many as scale's columns.

    w = (q - zero) · scale; scale [N, g], zero uint8 [N, g], None for the middle code. Codes of 2 and
    3 bits widen to 4, those of 5 to 7 to 8. perm int32 [1, K]: the inputs that the codes stand for.
    """
    scale, zero = finer_groups(module, codes.shape[1], scale, zero)
    k, groups = codes.shape[1], scale.shape[1]
    group_size = k // groups if k // groups in GROUP_SIZES else None
    packed: Packed = {"scale": scale.contiguous()}
    symmetric = zero is None
    format: Format
    if bits <= 4:
        format = Int4(group_size, symmetric)
        if symmetric:
            codes = codes + (MIDDLE - 2 ** (bits - 1))
        packed["weight"] = pack_nibbles(codes, group_size or k)
        if zero is not None:
            packed["zero"] = zero.to(torch.uint8).contiguous()
    else:
        format = Int8Weight(None if groups == 1 else group_size, symmetric)
        packed["weight"] = signed(codes, 2 ** (bits - 1))
        if zero is not None:
            packed["zero"] = signed(zero, 2 ** (bits - 1)).contiguous()
    if perm is not None:
        packed["perm"] = perm
    return Layer(format, packed)


def group_count(module: str, k: int, size: int | None) -> int:
    """How many groups of `size` of `k` inputs share a scale; None: all are one group.

    UnsupportedError if the last group would be smaller: what is even is all that kernels know.
    """
    if size is None:
        return 1
    if k % size:
        raise UnsupportedError(f"{module} has {k} inputs, which groups of {size} do not divide")
    return k // size


def signed(codes: Tensor, middle: int) -> Tensor:
    """Codes 0..255 less `middle`, as int8."""
    return (codes.to(torch.int16) - middle).to(torch.int8)


def finer_groups(
    module: str, k: int, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`scale` and `zero` [N, g] repeated where groups are larger than the kernels', which changes nothing.

    UnsupportedError for groups that are smaller, or of other sizes.
    """
    groups = scale.shape[1]
    if groups == 1:
        return scale, zero
    size = k // groups
    fitting = next((s for s in (128, 64, 32) if size % s == 0), None)
    if k % groups or fitting is None:
        raise UnsupportedError(
            f"{module} has groups of {k / groups:g} inputs; tlk runs groups of 32, 64, 128 and multiples"
        )
    times = size // fitting
    if times == 1:
        return scale, zero
    repeat = [None if t is None else t.repeat_interleave(times, 1) for t in (scale, zero)]
    assert repeat[0] is not None
    return repeat[0], repeat[1]
