"""What one step of a decoder works on: a flat batch of tokens, and the pages they attend to.

The tokens of all sequences lie one after the other, T in all. Decode is a chunk of one token,
prefill a longer one, and both may share a step. Every tensor keeps its address from step to step,
so that a step can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. T tokens of S sequences; rows beyond cu_seqlens_q[S] are padding.

    positions [T] int64: place of each token in its sequence.
    slots, one [T] int64 per cache group: page · page_size + offset where each token's keys and
    values go; negative writes nowhere.
    cu_seqlens_q [S+1] int32: where each sequence's tokens start.
    seq_lens [S] int32: tokens of each sequence in the cache, those of this step included.
    page_tables, one [S, max_pages] int32 per cache group.
    logit_rows [R] int64: the rows whose logits are wanted; None: all. The caller picks them from
    the hidden states before `Decoder.logits`.
    adapter_ids [T] int32: reserved for adapters; None.
    max_q: upper bound of the tokens of one sequence in this step, rounded up to a bucket.
    """

    positions: Tensor
    slots: tuple[Tensor, ...]
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    page_tables: tuple[Tensor, ...]
    max_q: int
    logit_rows: Tensor | None = None
    adapter_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PagedKV:
    """What one layer keeps of every token. Layers with equal specs share one page table.

    A dtype of 8 bits, float8_e4m3fn or int8, stands for codes: numbers divided by a scale of their head.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    window: int = 0
    page_size: int = 16

    def page_bytes(self) -> int:
        """Bytes of one page of one layer, keys and values together."""
        return self.kv_heads * self.page_size * (self.k_dim + self.v_dim) * self.dtype.itemsize


def group_specs(specs: Sequence[PagedKV]) -> tuple[list[PagedKV], list[int]]:
    """The distinct specs in order of appearance, and for every layer the index of its group."""
    groups = list(dict.fromkeys(specs))
    return groups, [groups.index(spec) for spec in specs]


Scales = tuple[Tensor, Tensor]
"""What the codes of a layer's keys and of its values are multiplied by: float32 [Hk] each."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The pages of one layer: k [P, Hk, page_size, Dk], v [P, Hk, page_size, Dv], and its group.

    k_scale and v_scale, float32 [Hk], belong to codes of 8 bits; None: the pages hold numbers.
    """

    k: Tensor
    v: Tensor
    group: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVCache:
    """The pages of every layer of a decoder, in order of layers."""

    layers: tuple[LayerKV, ...]

    @classmethod
    def allocate(
        cls,
        specs: Sequence[PagedKV],
        num_pages: Sequence[int],
        device: torch.device | str,
        scales: Sequence[Scales | None] | None = None,
    ) -> "KVCache":
        """Uninitialized pools for layers of `specs`, with `num_pages[g]` pages for group g.

        `scales`: of every layer, as `Decoder.cache_scales` gives them; None where it holds numbers.
        """
        groups, of_layer = group_specs(specs)
        if len(num_pages) != len(groups):
            raise ValueError(
                f"num_pages must name pages for {len(groups)} groups, got {len(num_pages)} numbers"
            )
        layers = []
        scales = scales or [None] * len(specs)
        for spec, group, scale in zip(specs, of_layer, scales, strict=True):
            shape = (num_pages[group], spec.kv_heads, spec.page_size)
            with torch.inference_mode(False):  # its tensors could not be written outside of it
                k = torch.empty(*shape, spec.k_dim, dtype=spec.dtype, device=device)
                v = torch.empty(*shape, spec.v_dim, dtype=spec.dtype, device=device)
                k_scale, v_scale = (x.to(device) for x in scale) if scale else (None, None)
            layers.append(LayerKV(k, v, group, k_scale, v_scale))
        return cls(tuple(layers))
