"""Where the memory goes: the ledger of an engine, and how many pages fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlk.errors import CapacityError
from tlk.models.batch import PagedKV, group_specs

GIB = 2**30
CPU_CACHE_BYTES = GIB


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes by what they are for. `free` is what the device has left after the start."""

    weights: int
    graphs: int
    activations: int
    kv_cache: int
    free: int

    def to_dict(self) -> dict[str, int]:
        """The same as a plain dictionary, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        parts = (f"{k.replace('_', ' ')} {v / GIB:.2f}" for k, v in self.to_dict().items())
        return f"memory in GiB: {', '.join(parts)}"


def group_page_bytes(specs: Sequence[PagedKV]) -> list[int]:
    """Bytes that one page of each cache group takes, over all layers of the group."""
    groups, of_layer = group_specs(specs)
    sizes = [0] * len(groups)
    for spec, group in zip(specs, of_layer, strict=True):
        sizes[group] += spec.page_bytes()
    return sizes


def pages_for(
    memory: int, specs: Sequence[PagedKV], max_model_len: int, max_num_seqs: int, chunk: int
) -> list[int]:
    """Pages of each group that fit `memory` bytes together, none beyond what could ever be used.

    Groups hold equally many tokens, except that one with a sliding window never needs more than its
    window and a step's chunk (of at most `chunk` tokens) for each sequence.
    """
    groups, _ = group_specs(specs)
    sizes = group_page_bytes(specs)
    most = [_most_pages(g, max_model_len, max_num_seqs, chunk) for g in groups]
    counts, left, open_groups = [0] * len(groups), memory, set(range(len(groups)))
    while open_groups:  # what a capped group leaves goes to the others
        share = left // sum(sizes[g] for g in open_groups)
        capped = {g for g in open_groups if most[g] <= share}
        if not capped:
            return [share if g in open_groups else counts[g] for g in range(len(groups))]
        for g in capped:
            counts[g] = most[g]
            left -= most[g] * sizes[g]
        open_groups -= capped
    return counts


def _most_pages(spec: PagedKV, max_model_len: int, max_num_seqs: int, chunk: int) -> int:
    tokens = max_model_len
    if spec.window:
        tokens = min(tokens, spec.window + min(chunk, max_model_len) + 2 * spec.page_size)
    return max_num_seqs * -(-tokens // spec.page_size)


def fit_model_len(
    wanted: int, pages: Sequence[int], specs: Sequence[PagedKV], memory: int
) -> tuple[int, str | None]:
    """The longest sequence up to `wanted` that the pools hold, and a notice if it is shorter.

    Raises CapacityError if not even one page fits.
    """
    groups, _ = group_specs(specs)
    sizes = group_page_bytes(specs)
    if min(pages) < 1:
        raise CapacityError(
            f"the KV cache has {memory:,} bytes, but one page of {groups[0].page_size} tokens takes "
            f"{sum(sizes):,}: raise kv_cache_memory or gpu_memory_utilization"
        )
    full = [n * g.page_size for n, g in zip(pages, groups, strict=True) if not g.window]
    capacity = min(full) if full else wanted
    if capacity >= wanted:
        return wanted, None
    notice = (
        f"max_model_len is {capacity} and not {wanted}: "
        f"the KV cache of {memory / GIB:.2f} GiB holds no longer sequence"
    )
    return capacity, notice


def used_bytes(device: torch.device) -> int:
    """Bytes of the GPU that are taken, by whomever; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def free_bytes(device: torch.device) -> int:
    """Bytes of the GPU that are free; 0 on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
