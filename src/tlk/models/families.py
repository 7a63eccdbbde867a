"""The families tlk knows, by transformers' model_type, and where their weights come from."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlk import parallel
from tlk.errors import CheckpointError
from tlk.models import llama, mistral, nemotron, qwen
from tlk.models.attention import Attention
from tlk.models.config import DecoderConfig
from tlk.models.decoder import Decoder
from tlk.models.layers import Linear
from tlk.parallel import Split


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's config becomes a decoder, and its module names the decoder's."""

    config: Callable[[Mapping[str, Any]], DecoderConfig]
    names: Mapping[str, str]


FAMILIES = {
    "llama": Family(llama.config, llama.NAMES),
    "mistral": Family(mistral.config, mistral.NAMES),
    "qwen2": Family(qwen.config, qwen.NAMES),
    "qwen3": Family(qwen.config, qwen.NAMES),
    "nemotron": Family(nemotron.config, nemotron.NAMES),
}


def weight_sources(family: Family, config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """For every parameter of `Decoder(config)` the checkpoint's tensors it is fused from, in order.

    {"layers.0.attention.qkv.weight": ("model.layers.0.self_attn.q_proj.weight", …k…, …v…)}; fused
    means concatenated along dim 0. A decoder with tied embeddings has no lm_head: the checkpoint's
    lm_head.weight, if it has one, is then the same as its embedding and is not read.
    """
    ours = {target: source for source, target in family.names.items()}
    with torch.device("meta"):
        decoder = Decoder(config)
    sources = {}
    for name, _ in decoder.named_parameters():
        module, _, tensor = name.rpartition(".")
        layer = re.search(r"\d+", module)
        index = layer.group() if layer else ""
        pattern = ours[module.replace(index, "*", 1) if index else module]
        sources[name] = tuple(
            f"{part}.{tensor}" for part in _expand(pattern.replace("*", index, 1))
        )
    return sources


def _expand(pattern: str) -> list[str]:
    """ "a.{b,c}_d" -> ["a.b_d", "a.c_d"]"""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [head + choice + tail for choice in choices.split(",")]


class Stored(Protocol):
    """A checkpoint's tensor, in memory (a torch tensor is one) or still in its file."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's tensor goes: rows `row` to `row + rows` of `parameter`, on this rank."""

    parameter: str
    row: int
    rows: int
    split: Split | None
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint


def check_weights(
    decoder: Decoder, sources: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Stored]
) -> dict[str, Place]:
    """The place of every tensor of a checkpoint in `decoder`, whose parameters may be on "meta".

    Strict: CheckpointError lists what is missing, left over or misshapen. A left-over lm_head.weight
    is accepted where the decoder ties its embeddings; it has no place.
    """
    places = _places(decoder, sources)
    tied = {"lm_head.weight"} if decoder.lm_head is None else set()
    missing, left_over = set(places) - set(tensors), set(tensors) - set(places) - tied
    if missing or left_over:
        raise CheckpointError(f"missing: {sorted(missing)}, left over: {sorted(left_over)}")
    misshapen = [
        f"{key} has shape {tuple(tensors[key].shape)}, not {place.shape}"
        for key, place in places.items()
        if tuple(tensors[key].shape) != place.shape
    ]
    if misshapen:
        raise CheckpointError("; ".join(misshapen))
    return places


@torch.no_grad()
def load_weights(
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, Stored],
    copied: Callable[[int], object] = lambda size: None,
) -> None:
    """Copy a checkpoint's `tensors` into the `decoder`: this rank's shards, fused.

    Tensors are taken one at a time in the order of the mapping, and of each only this rank's part;
    `copied` is told the bytes of each. Strict, as `check_weights` is, before anything is read.
    """
    places = check_weights(decoder, sources, tensors)
    parameters = dict(decoder.named_parameters())
    for key, tensor in tensors.items():
        if (place := places.get(key)) is not None:
            rows = parameters[place.parameter][place.row : place.row + place.rows]
            rows.copy_(tensor[_part(place)])
            copied(rows.numel() * rows.element_size())


def _places(decoder: Decoder, sources: Mapping[str, tuple[str, ...]]) -> dict[str, Place]:
    splits, parameters = parameter_splits(decoder), dict(decoder.named_parameters())
    places = {}
    for name, keys in sources.items():
        split, rest = splits[name], parameters[name].shape[1:]
        own = part_heights(decoder, name.rpartition(".")[0], len(keys))
        row = 0
        for key, height in zip(keys, own, strict=True):
            out, inner = (parallel.world() if split == way else 1 for way in ("out", "in"))
            shape = (height * out, *(size * inner for size in rest))
            places[key] = Place(name, row, height, split, shape)
            row += height
    return places


def part_heights(decoder: Decoder, name: str, parts: int) -> tuple[int, ...]:
    """The rows on this rank of each of the `parts` that the module `name` is fused from."""
    module = decoder.get_submodule(name)
    attention = decoder.get_submodule(name.rpartition(".")[0])
    if isinstance(attention, Attention) and module is attention.qkv:
        c = attention.config
        return (
            attention.heads * c.head_dim,
            attention.kv_heads * c.head_dim,
            attention.kv_heads * c.v_head_dim,
        )
    if isinstance(module, Linear):  # its weight may not be there yet
        return (module.out_features // parts,) * parts
    return (next(module.parameters()).shape[0] // parts,) * parts


def _part(place: Place) -> tuple[slice, ...]:
    """What of the checkpoint's tensor this rank reads, by the rule of `parallel.shard`."""
    part = []
    for dim, size in enumerate(place.shape):
        shape = [1] * len(place.shape)
        shape[dim] = size
        indices = torch.arange(size, device="cpu").view(shape)
        own = parallel.shard({place.parameter: indices}, place.split)[place.parameter].flatten()
        part.append(slice(int(own[0]), int(own[-1]) + 1))
    return tuple(part)


def parameter_splits(decoder: nn.Module) -> dict[str, Split | None]:
    """For every parameter whether ranks divide its outputs, its inputs, or share it whole."""
    splits: dict[str, Split | None] = {name: None for name, _ in decoder.named_parameters()}
    for prefix, module in decoder.named_modules():
        if isinstance(module, Linear):
            splits |= {f"{prefix}.{name}": module.split for name, _ in module.named_parameters()}
        elif isinstance(module, Attention) and module.sinks is not None:
            splits[f"{prefix}.sinks"] = "out"
    return splits
