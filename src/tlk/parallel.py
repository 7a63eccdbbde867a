"""Ranks and collectives: the only user of torch.distributed.

One process per GPU, started by torchrun or by the caller. Without `init` there is one rank, and
nothing here communicates.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tlk.quant.format import Packed
from tlk.quant.format import shard as shard_dim

Split = Literal["out", "in"]


def init(
    device: torch.device,
    *,
    rank: int | None = None,
    world: int | None = None,
    address: str | None = None,
) -> None:
    """Join the other processes: NCCL for a CUDA `device`, gloo for a CPU.

    `address` is where they meet ("tcp://127.0.0.1:29500", "file:///path"); without it, `rank` and
    `world` come from torchrun.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=address,
        rank=-1 if rank is None else rank,
        world_size=-1 if world is None else world,
    )


def shutdown() -> None:
    """Leave the group that `init` joined."""
    dist.destroy_process_group()


def rank() -> int:
    """This process's place among the others; 0 without `init`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the model; 1 without `init`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor, dim: int = -1) -> Tensor:
    """The `x` of all ranks, concatenated along `dim` in the order of ranks."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def per_rank(name: str, size: int) -> int:
    """`size` divided among the ranks; ValueError naming `name` if it does not divide."""
    if size % world():
        raise ValueError(f"{name} is {size}, not divisible by {world()} ranks")
    return size // world()


def shard(packed: Packed, split: Split | None) -> Packed:
    """This rank's part of a linear layer's tensors: its outputs, its inputs, or all of them.

    One-dimensional tensors (a bias) run over outputs: "in" leaves them whole, since they are added
    once, after the sum over ranks.
    """
    if split is None or world() == 1:
        return packed
    dim = 0 if split == "out" else 1
    whole = {name: t for name, t in packed.items() if split == "in" and t.dim() == 1}
    divided = {name: t for name, t in packed.items() if name not in whole}
    return shard_dim(divided, dim, rank(), world()) | whole
