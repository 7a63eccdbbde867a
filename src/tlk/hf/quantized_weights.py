"""The quantized layers of a checkpoint, streamed into a decoder.

Before anything is read, every key of the files gets its place: a quantized layer's tensors, a dense
parameter, a scale of the cache. Whether a layer is quantized is decided by the tensors it has; what
the config says of it must agree. Then the layers come one fused layer at a time: its parts' tensors are
moved to the device, undone to tlk's layout there, divided among ranks and stacked. Beyond the
parameters that costs the codes of one layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tlk import parallel
from tlk.errors import CheckpointError, UnsupportedError
from tlk.models.attention import Attention
from tlk.models.decoder import Decoder, linears
from tlk.models.families import part_heights
from tlk.models.layers import Linear
from tlk.quant.files.layer import Layer, Scheme
from tlk.quant.format import DENSE, fuse

BIAS = "bias"
CACHE = (
    ("k_scale", "v_scale"),  # compressed-tensors
    ("k_proj.k_scale", "v_proj.v_scale"),  # ModelOpt
    ("k_proj.output_scale", "v_proj.output_scale"),  # AutoFP8
    ("kv_scale", "kv_scale"),
)
"""What the scales of keys and of values are called, after the name of the attention module."""
HALF = torch.finfo(torch.float16).max
UNUSED = ("q_scale", "prob_scale")


class InFile(Protocol):
    """A tensor in a file, of known shape, read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bytes(self) -> int: ...
    def read(self) -> Tensor: ...


class KVScales(NamedTuple):
    """What stored keys and values of a layer are multiplied by, float32 [kv_heads] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the keys of a checkpoint go.

    sources: the dense parameters and the keys each is fused from. dense: all of these keys. layers:
    for each quantized linear layer of the decoder its parts in order, as modules of the checkpoint,
    with the suffixes of their tensors. cache: for each layer the keys of the scales of keys and values.
    """

    scheme: Scheme | None
    sources: Mapping[str, tuple[str, ...]]
    dense: frozenset[str]
    layers: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    cache: tuple[tuple[str, str] | None, ...] = ()


def plan(
    folder: Path,
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    keys: Mapping[str, object],
    scheme: Scheme | None,
) -> Plan:
    """Give each of the `keys` its place in `decoder`, which lets go of the weights that are quantized.

    sources: what `weight_sources` says of the dense decoder. Keys without a place are called dense, for
    `check_weights` to refuse. Raises CheckpointError where config and tensors disagree about a layer.
    """
    cache, theirs = _cache_keys(decoder, sources, keys)
    if scheme is None:
        return Plan(None, sources, frozenset(keys) - theirs, cache=cache)
    layers, dense = {}, dict(sources)
    _check_named(folder, scheme, decoder, sources)
    for name, linear in linears(decoder).items():
        parts = [key.removesuffix(".weight") for key in sources[f"{name}.weight"]]
        found = {part: suffixes_of(part, keys) for part in parts}
        if _is_quantized(folder, scheme, found):
            layers[name] = found
            del dense[f"{name}.weight"]
            linear.store(DENSE, {})
    if not layers and not theirs:
        raise CheckpointError(
            f"{folder} says that it is quantized with {scheme.method}, but no layer of it is"
        )
    placed = {
        f"{part}.{suffix}"
        for found in layers.values()
        for part, suffixes in found.items()
        for suffix in suffixes
    }
    return Plan(scheme, dense, frozenset(keys) - placed - theirs, layers, cache)


def _check_named(
    folder: Path, scheme: Scheme, decoder: Decoder, sources: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise CheckpointError for a module that the config says is quantized, and the model does not have."""
    theirs = {
        key.removesuffix(".weight") for n in linears(decoder) for key in sources[f"{n}.weight"]
    }
    if strangers := sorted(set(scheme.named()) - theirs):
        raise CheckpointError(
            f"{folder}: its {scheme.method} config quantizes modules that the model does not have: "
            f"{', '.join(strangers)}"
        )


def suffixes_of(module: str, keys: Mapping[str, object]) -> list[str]:
    """What of `module` is in the files, beside its bias and scales of the cache."""
    prefix = f"{module}."
    others = {BIAS, "k_scale", "v_scale", "output_scale"}
    suffixes = (key.removeprefix(prefix) for key in keys if key.startswith(prefix))
    return [suffix for suffix in suffixes if suffix not in others]


def _is_quantized(folder: Path, scheme: Scheme, parts: Mapping[str, Sequence[str]]) -> bool:
    """Whether the layer fused from `parts` is; CheckpointError if config and files disagree."""
    quantized = {part: scheme.holds(suffixes) for part, suffixes in parts.items()}
    for part, suffixes in parts.items():
        check_listed(folder, scheme, part, suffixes)
    if len(set(quantized.values())) > 1:
        some = ", ".join(part for part, found in quantized.items() if not found)
        raise UnsupportedError(
            f"{folder}: of {', '.join(parts)}, which tlk multiplies in one, only {some} stay in 16 bit"
        )
    return all(quantized.values())


def check_listed(folder: Path, scheme: Scheme, module: str, suffixes: Sequence[str]) -> None:
    """CheckpointError if the config says that `module` is quantized and its tensors do not, or the reverse."""
    listed = scheme.listed(module)
    if listed is not None and listed != scheme.holds(suffixes) and suffixes:
        says = "is to be quantized" if listed else "stays in 16 bit"
        raise CheckpointError(
            f"{folder}: its {scheme.method} config says that {module} {says}, "
            f"but the files hold {', '.join(sorted(suffixes))}"
        )


@torch.no_grad()
def load_quantized_layers(
    decoder: Decoder,
    plan: Plan,
    tensors: Mapping[str, InFile],
    device: torch.device,
    read: Callable[[int], object] = lambda size: None,
) -> None:
    """Store the quantized layers of `plan` in `decoder`, this rank's part of each; `read` is told bytes."""
    modules = linears(decoder)
    for name, parts in plan.layers.items():
        heights = part_heights(decoder, name, len(parts))
        layers = [
            _read_part(plan, part, suffixes, tensors, _shape(modules[name], height), device, read)
            for (part, suffixes), height in zip(parts.items(), heights, strict=True)
        ]
        if decoder.embedding.weight.dtype == torch.float16:
            for part, layer in zip(parts, layers, strict=True):
                _check_half(part, layer)
        whole = _one(list(parts), layers, modules[name])
        modules[name].store(*whole)


def _check_half(module: str, layer: Layer) -> None:
    """CheckpointError for scales beyond float16, in which the model is to run: its weights would be infinite."""
    scale = layer.packed["scale"]
    if scale.is_floating_point() and bool((scale.float().abs() > HALF).any()):
        raise CheckpointError(
            f"{module}: its scales reach {float(scale.float().abs().max()):.3g}, more than float16 holds: "
            "load it in bfloat16"
        )


def _shape(linear: Linear, height: int) -> tuple[int, int]:
    """The shape in the checkpoint, whole, of a part that has `height` rows on this rank."""
    outputs, inputs = (parallel.world() if linear.split == way else 1 for way in ("out", "in"))
    return height * outputs, linear.in_features * inputs


def _read_part(
    plan: Plan,
    module: str,
    suffixes: Sequence[str],
    tensors: Mapping[str, InFile],
    shape: tuple[int, int],
    device: torch.device,
    read: Callable[[int], object],
) -> Layer:
    assert plan.scheme is not None
    found = {}
    for suffix in suffixes:
        stored = tensors[f"{module}.{suffix}"]
        found[suffix] = stored.read().to(device)
        read(stored.bytes)
    return plan.scheme.read(module, found, shape)


def _one(names: list[str], layers: list[Layer], linear: Linear) -> Layer:
    """The parts, this rank's share of each, as one layer."""
    formats = {layer.format for layer in layers}
    if len(formats) > 1:
        raise UnsupportedError(
            f"{', '.join(names)} are stored as {', '.join(str(layer.format) for layer in layers)}: "
            "tlk multiplies them in one and needs one format"
        )
    try:
        own = [parallel.shard(layer.packed, linear.split) for layer in layers]
        return Layer(layers[0].format, fuse(own))
    except ValueError as error:
        raise UnsupportedError(f"{', '.join(names)}: {error}") from error


def _cache_keys(
    decoder: Decoder, sources: Mapping[str, tuple[str, ...]], keys: Mapping[str, object]
) -> tuple[tuple[tuple[str, str] | None, ...], set[str]]:
    """For each layer the keys of its cache's scales, and all keys that have to do with them."""
    found: list[tuple[str, str] | None] = []
    theirs: set[str] = set()
    for prefix in _attention_modules(decoder, sources):
        pairs = [(f"{prefix}.{k}", f"{prefix}.{v}") for k, v in CACHE]
        found.append(next((pair for pair in pairs if set(pair) <= keys.keys()), None))
        theirs |= {key for pair in pairs for key in pair} | {f"{prefix}.{name}" for name in UNUSED}
        theirs |= {f"{prefix}.q_proj.{name}" for name in ("q_scale", "output_scale")}
    return tuple(found), theirs & keys.keys()


def _attention_modules(decoder: Decoder, sources: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """The checkpoint's name of each attention module, in order of layers."""
    for name, module in decoder.named_modules():
        if isinstance(module, Attention):
            query = sources[f"{name}.qkv.weight"][0]
            yield query.removesuffix(".weight").rpartition(".")[0]


def kv_dtype_of(fields: Mapping[str, Any]) -> torch.dtype:
    """What the scales of the cache are for: int8 where the quantization config says so, else E4M3."""
    scheme = fields.get("kv_cache_scheme") or {}
    of_modelopt = fields.get("quantization", fields).get("kv_cache_quant_algo") or ""
    is_int = scheme.get("type") == "int" or str(of_modelopt).upper() == "INT8"
    return torch.int8 if is_int else torch.float8_e4m3fn


def read_kv_scales(
    decoder: Decoder, plan: Plan, tensors: Mapping[str, InFile]
) -> tuple[KVScales | None, ...]:
    """The scales of each layer's cache, of all heads of the model; empty where no layer has any.

    CheckpointError for a scale that is zero or not finite, or of another number of heads.
    """
    if not any(plan.cache):
        return ()
    attentions = [m for m in decoder.modules() if isinstance(m, Attention)]
    return tuple(
        None if pair is None else KVScales(*(_of_heads(key, tensors[key], module) for key in pair))
        for pair, module in zip(plan.cache, attentions, strict=True)
    )


def _of_heads(key: str, stored: InFile, attention: Attention) -> Tensor:
    heads = attention.config.kv_heads
    scale = stored.read().float().flatten()
    if scale.numel() not in (1, heads):
        raise CheckpointError(f"{key} must have 1 or {heads} elements, got {list(stored.shape)}")
    if not scale.isfinite().all() or (scale <= 0).any():
        raise CheckpointError(f"{key} holds scales that are zero, negative or not finite")
    return scale.expand(heads).clone()
