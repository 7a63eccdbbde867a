"""4-bit codes in bytes, and where in a table of values a number belongs.

The one layout of 4-bit codes that kernels see: uint8 [N, K/2], where byte j of a group of G inputs
holds code j in its low half and code j + G/2 in its high half. So the low halves of a run of bytes
are a run of inputs, and so are the high halves: no kernel interleaves registers.
"""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, group_size: int) -> Tensor:
    """Codes 0..15 [N, K] of any integer dtype as uint8 [N, K/2]; `group_size` is even and divides K."""
    low, high = codes.to(torch.uint8).contiguous().unflatten(1, (-1, 2, group_size // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(packed: Tensor, group_size: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 [N, K/2] to uint8 codes [N, K]."""
    halves = packed.unflatten(1, (-1, group_size // 2))
    return torch.stack([halves & 15, halves >> 4], 2).flatten(1)


def grouped(values: Tensor, groups: int) -> Tensor:
    """A view [N, groups, K / groups] of `values` [N, K]."""
    return values.unflatten(1, (groups, values.shape[1] // groups))


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the entry of `table` nearest to each of `values`, as int64.

    `table` is sorted and float32, `values` any shape. A tie goes to the smaller entry.
    """
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)


def positive(scale: Tensor) -> Tensor:
    """`scale` with its zeros, of groups that hold only zeros, replaced by the dtype's epsilon."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
