"""The families tlk knows, by transformers' model_type, and where their weights come from."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
from tlk.quant.format import fuse


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


@torch.no_grad()
def load_weights(
    decoder: Decoder, sources: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> None:
    """Copy a checkpoint's `tensors` into the `decoder`: this rank's shards, fused.

    Strict: CheckpointError lists tensors that are missing or left over. A left-over lm_head.weight
    is accepted where the decoder ties its embeddings.
    """
    wanted = {name for names in sources.values() for name in names}
    tied = {"lm_head.weight"} if decoder.lm_head is None else set()
    missing, left_over = wanted - set(tensors), set(tensors) - wanted - tied
    if missing or left_over:
        raise CheckpointError(f"missing: {sorted(missing)}, left over: {sorted(left_over)}")
    splits = parameter_splits(decoder)
    for name, parameter in decoder.named_parameters():
        parts = [parallel.shard({name: tensors[s]}, splits[name]) for s in sources[name]]
        value = fuse(parts)[name]
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
            raise CheckpointError(f"{' + '.join(sources[name])} has shape {shapes}")
        parameter.copy_(value)


def parameter_splits(decoder: nn.Module) -> dict[str, Split | None]:
    """For every parameter whether ranks divide its outputs, its inputs, or share it whole."""
    splits: dict[str, Split | None] = {name: None for name, _ in decoder.named_parameters()}
    for prefix, module in decoder.named_modules():
        if isinstance(module, Linear):
            splits |= {f"{prefix}.{name}": module.split for name, _ in module.named_parameters()}
        elif isinstance(module, Attention) and module.sinks is not None:
            splits[f"{prefix}.sinks"] = "out"
    return splits
