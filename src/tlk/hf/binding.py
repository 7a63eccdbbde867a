"""A transformers model and tlk's decoder on the same weights.

Binding makes each fused weight one storage and the model's own parameters views of it, so there is
no second copy and `state_dict`, `save_pretrained` and the original forward stay valid.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlk.errors import UnsupportedError
from tlk.hf.foreign import foreign_layers, take_over
from tlk.hf.quant_linear import QuantLinear, fused
from tlk.models.batch import PagedKV
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, weight_sources
from tlk.models.layers import Linear
from tlk.runtime.options import kv_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Watched:
    """A module as it was when bound; anything that changes it sends tlk back to look again."""

    name: str
    module: nn.Module
    children: tuple[nn.Module | None, ...]
    tensors: tuple[tuple[str, Tensor, int], ...]  # weights: name, object, address

    def hooked(self) -> bool:
        """Whether calling the module would do more than its forward; the root's call is not skipped."""
        return bool(self.name) and _has_hooks(self.module)

    def changed(self) -> bool:
        """Whether a child or weight is another object, or lies elsewhere, than when bound."""
        m = self.module
        own = _weights(m)
        return (
            "forward" in m.__dict__
            or len(m._modules) != len(self.children)
            or any(a is not b for a, b in zip(m._modules.values(), self.children, strict=True))
            or any(own.get(n) is not t or t.data_ptr() != at for n, t, at in self.tensors)
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """The decoder built from a model's weights."""

    family: str
    decoder: Decoder
    device: torch.device
    dtype: torch.dtype  # of the weights that are not quantized
    fused: tuple[tuple[str, ...], ...]  # names of the model's parameters that share a storage
    watched: tuple[Watched, ...]
    specs: tuple[PagedKV, ...]  # what each layer keeps of every token
    quantized: tuple[str, ...]  # names of the model's modules that are stored quantized
    windowed: bool  # whether a layer has a sliding window

    def stale(self) -> bool:
        """Whether the model's modules or weights are no longer those that were bound."""
        return any(w.changed() for w in self.watched)

    def hooked(self) -> str | None:
        """The name of a module with forward hooks, which tlk would not call, or None."""
        return next((w.name for w in self.watched if w.hooked()), None)


def bind(model: nn.Module, kv_cache_dtype: str = "auto") -> Binding:
    """Build tlk's decoder on the weights of `model`, fusing them in place.

    Quantized layers that transformers gave to another package become tlk's own. Raises UnsupportedError,
    before anything has changed, naming the module that tlk cannot run.
    """
    family_name = _family_of(model)
    check_modules(model, foreign_layers(model))
    take_over(model)
    family = FAMILIES[family_name]
    hf: Any = model.config
    config = family.config(hf.to_dict())
    with torch.device("meta"):
        decoder = Decoder(config)
    sources = weight_sources(family, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    quantized = _quantized(model, sources)
    plain = {name: parts for name, parts in sources.items() if name not in quantized}
    _check_parameters(decoder, plain, parameters, tied=config.tie_embeddings)
    some = next(iter(parameters.values()))
    weights, fused = _store(decoder, quantized), []
    for name, parts in plain.items():
        weights[name] = _one_storage([parameters[p] for p in parts])
        if len(parts) > 1:
            fused.append(parts)
    decoder.load_state_dict(weights, strict=True, assign=True)
    specs = tuple(decoder.cache_specs(kv_dtype(kv_cache_dtype, some.dtype)))
    return Binding(
        family=family_name,
        decoder=decoder.eval(),
        device=some.device,
        dtype=some.dtype,
        fused=tuple(fused),
        watched=tuple(_watch(model)),
        specs=specs,
        quantized=tuple(p.removesuffix(".weight") for name in quantized for p in sources[name]),
        windowed=any(spec.window > 0 for spec in specs),
    )


def unbind(model: nn.Module, binding: Binding) -> None:
    """Give every fused parameter of `model` a storage of its own again, one group at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in binding.fused:
        for name in names:
            if name in parameters:
                parameters[name].data = parameters[name].data.clone()


def check_modules(model: nn.Module, but: Collection[str] = ()) -> None:
    """Raise UnsupportedError naming the first module whose forward is not transformers' own.

    but: names of modules that tlk replaces.
    """
    for name, module in model.named_modules():
        if name in but:
            continue
        kind = type(module)
        label = f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}"
        if "forward" in module.__dict__:
            raise UnsupportedError(
                f"{name or 'the model'} has a forward of its own (a hook of accelerate?)"
            )
        known = kind is QuantLinear or kind.__module__.startswith(
            ("transformers.", "torch.nn.modules.")
        )
        if name and not known:
            raise UnsupportedError(f"{label}, which tlk does not know")
        if name and _has_hooks(module):
            raise UnsupportedError(f"{name} has forward hooks, which tlk would not call")


def _has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks would be missed; transformers' own do nothing unless it asks them to."""
    own = "transformers.utils.output_capturing"
    return bool(module._forward_pre_hooks) or any(
        hook.__module__ != own for hook in module._forward_hooks.values()
    )


def _family_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    base = getattr(type(model), "_tlk_base", type(model))
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(
            f"{base.__module__}.{base.__qualname__} (model_type {kind!r}) is of no family that tlk knows: {known}"
        )
    package = f"transformers.models.{kind}.modeling_{kind}"
    if base.__module__ != package or not base.__name__.endswith("ForCausalLM"):
        raise UnsupportedError(
            f"the model is a {base.__module__}.{base.__qualname__}; of {kind} tlk runs the ...ForCausalLM class of transformers"
        )
    return str(kind)


def _quantized(
    model: nn.Module, sources: Mapping[str, tuple[str, ...]]
) -> dict[str, list[QuantLinear]]:
    """The quantized layers of `model` by the decoder's weight that they are parts of."""
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    found: dict[str, list[QuantLinear]] = {}
    for name, parts in sources.items():
        quantized = [layers[p] for p in parts if p in layers]
        if not quantized:
            continue
        if len(quantized) < len(parts) or any(m.format != quantized[0].format for m in quantized):
            raise UnsupportedError(f"{' and '.join(parts)} are one matmul and must share a format")
        found[name] = quantized
    return found


def _store(decoder: Decoder, quantized: Mapping[str, list[QuantLinear]]) -> dict[str, Tensor]:
    """Have `decoder` store its quantized layers as the model does; returns their tensors by name."""
    tensors: dict[str, Tensor] = {}
    for name, modules in quantized.items():
        module = name.removesuffix(".weight")
        linear = decoder.get_submodule(module)
        assert isinstance(linear, Linear)
        shape = sum(m.out_features for m in modules), modules[0].in_features
        if shape != (linear.out_features, linear.in_features):
            raise UnsupportedError(
                f"{module} has shape {shape}, the config says {(linear.out_features, linear.in_features)}"
            )
        try:
            packed = fused(modules)
        except ValueError as error:
            raise UnsupportedError(f"{module}: {error}") from error
        linear.store(modules[0].format, packed)
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
    return tensors


def _check_parameters(
    decoder: Decoder,
    sources: dict[str, tuple[str, ...]],
    parameters: dict[str, nn.Parameter],
    *,
    tied: bool,
) -> None:
    wanted = {name for parts in sources.values() for name in parts}
    extra = set(parameters) - wanted - ({"lm_head.weight"} if tied else set())
    if missing := wanted - set(parameters):
        raise UnsupportedError(f"the model lacks the parameters {sorted(missing)}")
    if extra:
        raise UnsupportedError(f"the model has parameters that tlk does not know: {sorted(extra)}")
    embedding = parameters["model.embed_tokens.weight"]
    if tied and parameters["lm_head.weight"].data_ptr() != embedding.data_ptr():
        raise UnsupportedError("lm_head.weight is not tied to the embedding, as the config says")
    some = embedding
    for name, p in parameters.items():
        if type(p) is not nn.Parameter or type(p.data) is not Tensor:
            kind = type(p.data) if type(p) is nn.Parameter else type(p)
            raise UnsupportedError(f"{name} is a {kind.__name__}, not a plain parameter")
        if p.dtype not in DTYPES or p.dtype != some.dtype:
            raise UnsupportedError(
                f"{name} is {p.dtype}; tlk runs models that are float32, float16 or bfloat16 throughout"
            )
        if p.device.type not in ("cpu", "cuda") or p.device != some.device:
            raise UnsupportedError(
                f"{name} is on {p.device}; tlk runs models on one CPU or CUDA device"
            )
    shapes = decoder.state_dict()
    for name, parts in sources.items():
        rows = sum(parameters[p].shape[0] for p in parts)
        got = (rows, *parameters[parts[0]].shape[1:])
        if got != tuple(shapes[name].shape):
            raise UnsupportedError(
                f"{' + '.join(parts)} has shape {got}, the config says {tuple(shapes[name].shape)}"
            )


def _one_storage(parts: list[nn.Parameter]) -> Tensor:
    """The parts stacked on dim 0 in one storage, with every part a view of it."""
    if len(parts) == 1:
        if not parts[0].is_contiguous():
            parts[0].data = parts[0].data.contiguous()
        return parts[0].data
    first, at = parts[0].data, parts[0].data_ptr()
    for p in parts:
        if p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or not (
            p.is_contiguous() and p.data_ptr() == at
        ):
            break
        at += p.numel() * p.element_size()
    else:  # bound before, or loaded that way
        rows = sum(p.shape[0] for p in parts)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([p.data for p in parts])
    row = 0
    for p in parts:
        p.data = whole[row : row + p.shape[0]]
        row += p.shape[0]
    if whole.is_cuda:
        # the parts' own blocks are too small for the next fused weight: hand them back now, or the
        # allocator ends up holding gate and up twice
        torch.cuda.empty_cache()
    return whole


def _watch(model: nn.Module) -> Iterator[Watched]:
    for name, m in model.named_modules():
        own = tuple((n, t, t.data_ptr()) for n, t in _weights(m).items() if t is not None)
        yield Watched(name, m, tuple(m._modules.values()), own)


def _weights(module: nn.Module) -> dict[str, Any]:
    """What a binding shares with `module`: parameters, and the codes and scales of a QuantLinear."""
    if isinstance(module, QuantLinear):
        return {**module._parameters, **module._buffers}
    return module._parameters
