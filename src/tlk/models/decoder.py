"""The decoder of every family: what differs between them is in `DecoderConfig`.

A layer is six kernels: norm + qkv, rotation + cache write, attention, output + residual, norm + gate ·
up, down + residual. Layer norms, which a matmul cannot absorb, are kernels of their own.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tlk.errors import UncalibratedWarning, UnsupportedError
from tlk.models.attention import Attention
from tlk.models.batch import Batch, KVCache, LayerKV, PagedKV, Scales
from tlk.models.config import (
    AttentionConfig,
    DecoderConfig,
    GatedMLPConfig,
    LayerConfig,
    MLPConfig,
    RopeConfig,
)
from tlk.models.layers import Embedding, Linear, norm
from tlk.models.mlp import MLP, GatedMLP
from tlk.models.rope import RotaryEmbedding
from tlk.quant.format import DENSE, Dense, Format

KvScales = Mapping[int, tuple[Tensor | float, Tensor | float]]
"""Layer to the scales of its keys and of its values: a number, or one for each kv head."""

ATTENTIONS = {AttentionConfig: Attention}
MLPS: dict[type, Callable[..., GatedMLP | MLP]] = {GatedMLPConfig: GatedMLP, MLPConfig: MLP}


class DecoderLayer(nn.Module):
    """Attention, then an MLP, each on the normalized residual stream and added to it."""

    def __init__(
        self,
        config: LayerConfig,
        hidden_size: int,
        rope: RotaryEmbedding | None,
        format: Format = DENSE,
    ) -> None:
        super().__init__()
        self.input_norm = norm(config.input_norm, hidden_size)
        self.attention = ATTENTIONS[type(config.attention)](
            config.attention, hidden_size, rope, format
        )
        self.post_norm = norm(config.post_norm, hidden_size)
        self.mlp = MLPS[type(config.mlp)](config.mlp, hidden_size, format)

    def forward(self, x: Tensor, batch: Batch, kv: LayerKV, in_place: bool = False) -> Tensor:
        """The residual stream `x` [T, hidden] after this layer; `in_place`: it may be written over `x`."""
        x = self.attention(x, self.input_norm, batch, kv, in_place)
        return self.mlp(x, self.post_norm, in_place=True)


class Decoder(nn.Module):
    """Token ids in, logits out, over a paged cache.

    Tied embeddings are one parameter, `embedding.weight`; then there is no `lm_head`. Build it under
    `torch.device("meta")` to fill the parameters later. Call `prepare` before a forward.
    `format` None is the dense one; `deterministic`: no row of the logits depends on the other sequences
    of the batch, bit for bit. A format that is given says so itself.
    """

    def __init__(
        self, config: DecoderConfig, format: Format | None = None, *, deterministic: bool = False
    ) -> None:
        super().__init__()
        format = format or Dense(deterministic)
        if deterministic and not format.deterministic:
            raise ValueError(f"format must be deterministic as the decoder is to be, got {format}")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, format)
        ropes: dict[RopeConfig | None, RotaryEmbedding] = {
            c: RotaryEmbedding(c) for c in _ropes(config)
        }
        self.ropes = nn.ModuleList(ropes.values())
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config.hidden_size, ropes.get(layer.attention.rope), format)
            for layer in config.layers
        )
        self.final_norm = norm(config.final_norm, config.hidden_size)
        tied = config.tie_embeddings
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, format=format)
        )

    def prepare(self, length: int) -> None:
        """Cover positions below `length`, the longest sequence of the coming forward.

        Not for a captured graph: models with dynamic or longrope positions may switch tables here.
        """
        for rope in cast(Iterable[RotaryEmbedding], self.ropes):
            rope.prepare(length, self.embedding.weight.device)

    def cache_specs(self, dtype: torch.dtype, page_size: int = 16) -> list[PagedKV]:
        """What each layer keeps of every token, in order of layers."""
        layers = cast(Iterable[DecoderLayer], self.layers)
        return [layer.attention.cache_spec(dtype, page_size) for layer in layers]

    def cache_scales(self, dtype: torch.dtype) -> list[Scales | None]:
        """What the codes of each layer's cache of `dtype` are multiplied by; None: it holds numbers.

        Where `set_kv_scales` left none they are 1, with a warning: numbers beyond ±448 of float8_e4m3fn or
        ±127 of int8 are then clamped, and int8 has no step finer than 1.
        """
        every = attentions(self)
        if dtype.itemsize > 1:
            return [None for _ in every]
        missing = [i for i, attention in enumerate(every) if attention.kv_scales is None]
        if missing:
            warnings.warn(
                f"the scales of the {str(dtype).removeprefix('torch.')} cache are not calibrated in "
                f"{len(missing)} of {len(every)} layers, from layer {missing[0]} on: they are 1",
                UncalibratedWarning,
                stacklevel=2,
            )
        ones = [torch.ones(a.kv_heads, device="cpu") for a in every]
        return [a.kv_scales_for(dtype) or (one, one) for a, one in zip(every, ones, strict=True)]

    def forward(
        self, ids: Tensor | None, batch: Batch, cache: KVCache, embeds: Tensor | None = None
    ) -> Tensor:
        """The residual stream [T, hidden] before the final norm; writes the step into `cache`.

        `ids` [T] int64, or `embeds` [T, hidden] in their place.
        """
        if (ids is None) == (embeds is None):
            raise ValueError("give either ids or embeds, and not both")
        x = self.embedding(ids) if embeds is None else embeds
        for i, (layer, kv) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x = layer(x, batch, kv, in_place=i > 0 or embeds is None)  # embeds are the caller's
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocab] of rows `hidden` [R, hidden] of the residual stream."""
        if self.lm_head is None:
            return self.embedding.logits(hidden, self.final_norm)
        return self.lm_head(hidden, self.final_norm)


def linears(decoder: Decoder) -> dict[str, Linear]:
    """Every linear layer of `decoder` by its name, in order."""
    return {name: m for name, m in decoder.named_modules() if isinstance(m, Linear)}


def attentions(decoder: Decoder) -> list[Attention]:
    """The attention of every layer, in order."""
    return [layer.attention for layer in cast(Iterable[DecoderLayer], decoder.layers)]


def set_kv_scales(decoder: Decoder, scales: KvScales, dtype: torch.dtype | None = None) -> None:
    """Set what an 8-bit cache of `decoder` divides by: layer → (k_scale, v_scale).

    A scale is one number, or float32 with one for each kv head; used = stored · scale. dtype: that of
    the cache they were found for; another 8-bit cache then gets scales of the same range. None: they
    are used as they are. Set them before an engine or a cache is made; layers that are not named keep
    theirs. Raises ValueError for a layer that is not there, and as `Attention.set_kv_scales` does.
    """
    every = attentions(decoder)
    for index, (k_scale, v_scale) in scales.items():
        if not 0 <= index < len(every):
            raise ValueError(f"scales must name layers below {len(every)}, got {index}")
        every[index].set_kv_scales(k_scale, v_scale, dtype)


def kv_scales_of(decoder: Decoder) -> dict[int, Scales]:
    """What `set_kv_scales` left in each layer, on this rank; layers without are left out."""
    every = enumerate(attentions(decoder))
    return {i: attention.kv_scales for i, attention in every if attention.kv_scales is not None}


def twin(decoder: Decoder, *, deterministic: bool = False) -> Decoder:
    """A decoder on the same weights with rotary tables of its own, in eval mode.

    Raises UnsupportedError if it is to be `deterministic` and a weight's format is not.
    """
    with torch.device("meta"):
        other = Decoder(decoder.config, deterministic=deterministic)
    for (name, mine), theirs in zip(linears(decoder).items(), linears(other).values(), strict=True):
        if not isinstance(mine.format, Dense):
            if deterministic and not mine.format.deterministic:
                raise UnsupportedError(
                    f"{name} is stored as {mine.format}, which is not deterministic"
                )
            theirs.store(mine.format, mine.packed())
    other.load_state_dict(decoder.state_dict(), strict=True, assign=True)
    for layer, its in zip(attentions(decoder), attentions(other), strict=True):
        its.kv_scales, its.kv_dtype = layer.kv_scales, layer.kv_dtype
    return other.eval()


def _ropes(config: DecoderConfig) -> list[RopeConfig]:
    """The distinct rope configs in order of appearance."""
    ropes = (layer.attention.rope for layer in config.layers)
    return list(dict.fromkeys(rope for rope in ropes if rope is not None))
