"""A transformers model around a decoder whose weights are quantized.

A quantized checkpoint is read by tlk (`weights.load_decoder`) and not by the packages that
transformers would ask for. The model of transformers is then made around the decoder's tensors: its
quantized layers are `QuantLinear`s of the same names, its other parameters views of the decoder's.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tlk.errors import UnsupportedError
from tlk.hf.hub import QUANTIZATION, read_config, read_quantization, snapshot
from tlk.hf.quant_linear import QuantLinear, quantized_like
from tlk.hf.quantized_checkpoint import SHARD, QuantizedModel, save_quantized
from tlk.hf.quantized_weights import kv_dtype_of
from tlk.hf.weights import load_decoder
from tlk.models.decoder import Decoder, kv_scales_of, linears
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.format import Dense, rows
from tlk.runtime.options import pick_device

SEVERAL = ("balanced", "balanced_low_0", "sequential", "disk")
"""Values of device_map that spread a model."""


def load_quantized(
    kind: Any,
    path: Any,
    *,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    **fields: Any,
) -> nn.Module:
    """The quantized checkpoint at `path`, a folder or a hub id, as a model of class `kind`, in eval mode.

    kind: a causal language model of transformers, or AutoModelForCausalLM. dtype (or torch_dtype):
    what activations and unquantized weights are; None or "auto" is the checkpoint's own. device_map:
    None is the CPU, else one device: "cuda", "auto", {"": device}. Raises TypeError for other
    arguments, CheckpointError and UnsupportedError as `load_decoder` does.
    """
    if fields:
        raise TypeError(
            f"a quantized checkpoint is loaded with dtype and device_map, got {sorted(fields)} too"
        )
    folder = snapshot(str(path))
    config = AutoConfig.from_pretrained(folder)
    stored = {name: config.__dict__.pop(name) for name in QUANTIZATION if name in config.__dict__}
    wanted = dtype if dtype is not None else torch_dtype
    loaded = load_decoder(str(folder), dtype=wanted, device=one_device(device_map))
    config.dtype = loaded.dtype
    with init_empty_weights(include_buffers=False):
        model: Any = _class_of(kind, config)(config)
    sources = weight_sources(FAMILIES[loaded.family], loaded.decoder.config)
    fill(model, loaded.decoder, sources, loaded.dtype)
    model.to(next(loaded.decoder.parameters()).device)  # the rotary tables
    model.name_or_path = str(path)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.__dict__["_tlk_stored"] = stored
    if kv_scales := kv_scales_of(loaded.decoder):
        model.__dict__["_tlk_kv_scales"] = kv_scales, kv_dtype_of(loaded.quantization or {})
    return model.eval()


def is_quantized(path: Any) -> bool:
    """Whether the checkpoint at `path` says that its weights are quantized."""
    folder = snapshot(str(path))
    return read_quantization(folder, read_config(folder)) is not None


@torch.no_grad()
def fill(
    model: nn.Module,
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
) -> None:
    """Give `model`, whose parameters lie nowhere yet, those of `decoder`, of which they are parts."""
    adopt(model, decoder, sources, dtype)
    parameters, mine = dict(decoder.named_parameters()), dict(model.named_parameters())
    for name, parts in sources.items():
        start = 0
        for part in (p for p in parts if p in mine):
            module_name, _, tensor = part.rpartition(".")
            height = mine[part].shape[0]
            view = parameters[name][start : start + height]
            model.get_submodule(module_name)._parameters[tensor] = nn.Parameter(view)
            start += height
    model.tie_weights()  # type: ignore[operator]


def adopt(
    model: nn.Module,
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
    names: Collection[str] | None = None,
) -> None:
    """Make `QuantLinear`s, with activations in `dtype`, of what `decoder` stores quantized.

    The modules of `model` that they replace let go of their weights. names: of layers of the decoder;
    None are all.
    """
    for name, linear in linears(decoder).items():
        if isinstance(linear.format, Dense) or (names is not None and name not in names):
            continue
        start = 0
        for part in sources[f"{name}.weight"]:
            module_name = part.removesuffix(".weight")
            module = model.get_submodule(module_name)
            assert isinstance(module, nn.Linear)
            stop = start + module.out_features
            packed = rows(linear.packed(), start, stop)
            model.set_submodule(module_name, quantized_like(module, linear.format, packed, dtype))
            start = stop


def _class_of(kind: Any, config: Any) -> Any:
    return (
        AutoModelForCausalLM._model_mapping[type(config)] if kind is AutoModelForCausalLM else kind
    )


def one_device(device_map: Any) -> torch.device:
    """The one device of a `device_map` of transformers; UnsupportedError if it names several."""
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    if isinstance(device_map, dict | list) or device_map in SEVERAL:
        raise UnsupportedError(f"device_map {device_map!r}: tlk runs a model on one device")
    return pick_device("cpu" if device_map is None else str(device_map))


def save(model: Any, folder: Path, *, format: str | None = None, shard: int = SHARD) -> str:
    """Write a model with `QuantLinear`s to `folder` in the standard layout of its formats; returns its name.

    folder: a new one, or an empty one. format: a layout of `save_quantized`. Raises FileExistsError for a
    folder that holds something: what is there is never touched.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    linear = [n for n, m in model.named_modules() if isinstance(m, QuantLinear | nn.Linear)]
    stored = QuantizedModel(
        fields={**model.config.to_dict(), "architectures": [type(model).__name__]},
        formats={n: m.format for n, m in layers.items()},
        shapes={n: (m.out_features, m.in_features) for n, m in layers.items()},
        layers=lambda: ((n, m.packed()) for n, m in layers.items()),
        dense=lambda: ((n, p.detach()) for n, p in model.named_parameters()),
        linears=linear,
        dtype=next(model.parameters()).dtype,
    )
    attentions = [n for n, m in model.named_modules() if hasattr(m, "q_proj")]
    kv_scales, kv_dtype = model.__dict__.get("_tlk_kv_scales") or ({}, torch.float8_e4m3fn)
    stored = replace(
        stored,
        kv_scales={attentions[i]: scales for i, scales in kv_scales.items()},
        kv_dtype=("int8" if kv_dtype == torch.int8 else "fp8") if kv_scales else None,
    )
    report = model.__dict__.get("_tlk_report")
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    name = save_quantized(stored, folder, format=format, report=report, shard=shard)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return name
