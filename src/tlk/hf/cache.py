"""transformers' `Cache` over pages: what tlk's forward writes and transformers' own forward can read.

Every sequence owns a run of consecutive pages, so its tokens lie at `sequence · capacity + position`
and the page table never changes between growths. Only attended tokens are stored: padding takes no
slot, and a mask remembers where transformers believes it to be.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tlk.kernels._kv_codes import as_bytes, decode_reference
from tlk.kernels.kv_cache import write_kv_
from tlk.models.batch import KVCache, PagedKV, Scales, group_specs


class PagedCache(Cache):
    """The keys and values of a batch of sequences, in the pages that `paged_attention` reads.

    Growing copies the pages; `reserve` ahead avoids that. Beam reordering, cropping, batch
    selection and deep copies work as for `transformers.DynamicCache`. `scales` are those of codes of
    8 bits, as `Decoder.cache_scales` gives them; transformers sees them as numbers of `dtype`, which is
    the cache's own unless it holds codes.
    """

    def __init__(
        self,
        specs: Sequence[PagedKV],
        device: torch.device,
        scales: Sequence[Scales | None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # the base class keeps a list of layers; here `layers` is a view made when asked for
        self.layer_class_to_replicate = None
        self.offloading = False
        self.specs, self.scales = tuple(specs), scales
        self.dtype = dtype or specs[0].dtype
        self.device = device
        self.groups = len(group_specs(specs)[0])
        self.page_size = specs[0].page_size
        self.length = 0  # tokens per sequence as transformers counts them, padding included
        self.capacity = 0  # tokens a sequence can store
        self.max_position = -1  # the highest rotary position stored
        self.mask: Tensor | None = None  # [B, length], False where padding; None: no padding
        self.trusted = False  # inputs come from our own generate, whose later masks are all ones
        self.kv: KVCache | None = None
        self.seq_lens = torch.zeros(0, dtype=torch.int32, device=device)  # [B] stored tokens
        self.page_table = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._expected: Tensor | None = None
        self._slots: Tensor | None = None

    # ---- storage

    def begin(self, batch_size: int, new_tokens: int) -> None:
        """Make room for `new_tokens` more tokens of each of `batch_size` sequences."""
        if self.kv is None:
            self.seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        elif batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values holds {self.batch_size} sequences, the input has {batch_size}"
            )
        self.reserve(self.length + new_tokens)

    def reserve(self, tokens: int) -> None:
        """Grow to `tokens` per sequence, at least by half, so that growing is rare."""
        if self.kv is not None and tokens <= self.capacity:
            return
        if self.kv is not None:
            tokens = max(tokens, self.capacity * 3 // 2)
        pages = -(-tokens // self.page_size)
        batch = len(self.seq_lens)
        old, old_pages = self.kv, self.capacity // self.page_size
        self.kv = KVCache.allocate(
            self.specs, [batch * pages] * self.groups, self.device, self.scales
        )
        if old is not None:
            for layer, was in zip(self.kv.layers, old.layers, strict=True):
                for new, from_ in ((layer.k, was.k), (layer.v, was.v)):
                    kept = from_.unflatten(0, (batch, old_pages))
                    new.unflatten(0, (batch, pages))[:, :old_pages] = kept
        self.capacity = pages * self.page_size
        table = torch.arange(batch * pages, dtype=torch.int32, device=self.device)
        self.page_table = table.view(batch, pages)

    def slots_of(self, new: Tensor | None, count: int) -> Tensor:
        """Where the next `count` tokens of each sequence go: [B, count] int64, −1 for padding.

        `new` [B, count] is False where a token is padding; None: nowhere.
        """
        first = torch.arange(len(self.seq_lens), device=self.device) * self.capacity + self.seq_lens
        if new is None:
            return first[:, None] + torch.arange(count, device=self.device)
        return torch.where(new, first[:, None] + new.cumsum(1) - 1, -1)

    def advance(self, new: Tensor | None, count: int) -> None:
        """Record that `count` tokens per sequence were written, as `slots_of` placed them."""
        if new is not None or self.mask is not None:
            whole = self._ones(count) if new is None else new
            past = self._ones(self.length) if self.mask is None else self.mask
            self.mask = torch.cat([past, whole], 1)
        stored = count if new is None else new.sum(1, dtype=torch.int32)
        self.seq_lens = self.seq_lens + stored
        self.length += count

    def _ones(self, count: int) -> Tensor:
        return torch.ones(len(self.seq_lens), count, dtype=torch.bool, device=self.device)

    # ---- what transformers' own forward uses

    def expect(self, new: Tensor | None) -> None:
        """Announce which of the next tokens are padding, before transformers' forward runs."""
        self._expected = new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, Hk, q, D] of one layer and return all of them, padding as 0."""
        batch, _, count, _ = key_states.shape
        if layer_idx == 0:
            self.begin(batch, count)
            self._slots = self.slots_of(self._expected, count)
            self.advance(self._expected, count)
            self.max_position = max(self.max_position, self.length - 1)
            self._expected = None
        assert self.kv is not None and self._slots is not None
        layer = self.kv.layers[layer_idx]
        write_kv_(
            key_states.transpose(1, 2).flatten(0, 1),
            value_states.transpose(1, 2).flatten(0, 1),
            layer.k, layer.v, self._slots.flatten(), layer.k_scale, layer.v_scale,
        )  # fmt: skip
        return self.dense(layer.k, layer.k_scale), self.dense(layer.v, layer.v_scale)

    def dense(self, pool: Tensor, scale: Tensor | None = None) -> Tensor:
        """[B, Hk, length, D]: the pages of one pool as transformers lays them out."""
        batch = len(self.seq_lens)
        pool = decode_reference(pool, scale).to(self.dtype)
        tokens = pool.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        if self.mask is None:
            return tokens[:, :, : self.length].contiguous()
        where = (self.mask.cumsum(1) - 1).clamp(min=0)[:, None, :, None]
        found = tokens.gather(2, where.expand(-1, tokens.shape[1], -1, tokens.shape[3]))
        return found.masked_fill(~self.mask[:, None, :, None], 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored per sequence, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, first key) of the mask that transformers makes for the next call."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """−1: it grows (the name before transformers 5.20)."""
        return -1

    # ---- batch surgery

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what was sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if self.kv is None:
            return
        batch, indices = len(self.seq_lens), indices.to(self.device)
        self.seq_lens = self.seq_lens[indices]
        self.mask = None if self.mask is None else self.mask[indices]

        def chosen(pool: Tensor) -> Tensor:
            pages = as_bytes(pool).unflatten(0, (batch, -1))[indices].flatten(0, 1)
            return pages.view(pool.dtype)

        layers = (replace(x, k=chosen(x.k), v=chosen(x.v)) for x in self.kv.layers)
        self.kv = KVCache(tuple(layers))
        pages = self.capacity // self.page_size
        table = torch.arange(len(indices) * pages, dtype=torch.int32, device=self.device)
        self.page_table = table.view(len(indices), pages)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, copies next to each other."""
        every = torch.arange(len(self.seq_lens), device=self.device)
        self.batch_select_indices(every.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −n tokens of each sequence for n < 0; keep the first n for n > 0."""
        n = tokens_to_remove
        keep = min(self.length + n if n <= 0 else n, self.length)
        removed = self.length - keep
        if removed == 0:
            return
        if self.mask is None:
            self.seq_lens = self.seq_lens - removed
        else:
            self.mask = self.mask[:, :keep]
            self.seq_lens = self.mask.sum(1, dtype=torch.int32)
        self.length = keep
        self.max_position -= removed

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        self.seq_lens = torch.zeros_like(self.seq_lens)
        self.length, self.max_position, self.mask = 0, -1, None

    # ---- what transformers asks of a cache

    @property
    def layers(self) -> list[CacheLayerMixin]:  # type: ignore[override]
        """A view per layer, made anew each time, so that cache and layers form no cycle."""
        return [PagedLayer(self, i) for i in range(len(self.specs))]

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        return f"PagedCache({len(self.seq_lens)} sequences, {self.length} tokens, {len(self.specs)} layers)"

    @property
    def batch_size(self) -> int:
        return -1 if self.kv is None else len(self.seq_lens)

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """False everywhere: sliding layers keep all their tokens, and the window is in the mask."""
        return [False] * len(self.specs)


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`, for code that looks at `cache.layers[i].keys`."""

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.is_initialized = cache.is_initialized

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[B, Hk, length, Dk], a copy."""
        if self.cache.kv is None:
            return None
        layer = self.cache.kv.layers[self.index]
        return self.cache.dense(layer.k, layer.k_scale)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """[B, Hk, length, Dv], a copy."""
        if self.cache.kv is None:
            return None
        layer = self.cache.kv.layers[self.index]
        return self.cache.dense(layer.v, layer.v_scale)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache allocates all layers at once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `PagedCache.update`."""
        return self.cache.update(key_states, value_states, self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, self.index)

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1
