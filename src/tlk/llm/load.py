"""From what a user names as model to a decoder, a tokenizer and the model's own habits."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlk.hf.binding import bind
from tlk.hf.checkpoint import load_tokenizer
from tlk.hf.hub import GENERATION, generation_defaults, snapshot
from tlk.hf.weights import load_decoder
from tlk.llm.inputs import Text
from tlk.models.decoder import Decoder, set_kv_scales
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.in_place import quantize_decoder
from tlk.runtime.options import pick_device
from tlk.runtime.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Loaded:
    """A decoder that the engine may have for itself, and what belongs to it.

    eos: tokens that end a text. default: parameters of a request that brings none. seconds: what
    loading took.
    """

    decoder: Decoder
    text: Text
    eos: tuple[int, ...]
    default: SamplingParams
    seconds: float


def load(
    model: Any,
    dtype: str,
    device: str,
    tokenizer: Any,
    quantization: QuantConfig | None = None,
    kv_cache_dtype: str = "auto",
) -> Loaded:
    """The model at a path or hub id, or a model object of transformers, whose weights are shared.

    dtype "auto" is the checkpoint's or the object's own; device "auto" the GPU if there is one, or
    where the object is. tokenizer: an object, a path or hub id, or None for the model's own.
    quantization: what to make of a checkpoint's 16-bit weights; its calibration data then also finds
    the scales of a cache of kv_cache_dtype "fp8" or "int8".
    """
    started = time.perf_counter()
    if isinstance(model, nn.Module):
        if quantization is not None:
            raise ValueError(
                "quantization must be None for a model object: tlk.optimize(model, quantization=…) first"
            )
        decoder = _shared(model, dtype, device)
        how, folder = _habits(model), _folder_of(model)
    elif isinstance(model, str | Path):
        folder = snapshot(str(model))
        place = pick_device(device)
        loaded = load_decoder(str(folder), dtype=dtype, device=place)
        decoder = loaded.decoder
        if quantization is not None:
            sources = weight_sources(FAMILIES[loaded.family], decoder.config)
            quantize_decoder(decoder, sources, quantization, folder, kv_cache_dtype=kv_cache_dtype)
        how = generation_defaults(str(folder))
    else:
        raise TypeError(
            f"model must be a path, a hub id or a model of transformers, got {type(model).__name__}"
        )
    text = _text(tokenizer, folder)
    seconds = time.perf_counter() - started
    return Loaded(decoder, text, tuple(how["eos_token_id"]), default_params(how), seconds)


def default_params(how: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json sets, as SamplingParams; `do_sample` is not read, as in vLLM."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    fields = {name: how[name] for name in names if how.get(name) is not None}
    if how.get("max_new_tokens") is not None:
        fields["max_tokens"] = how["max_new_tokens"]
    return SamplingParams(**fields)


def _shared(model: nn.Module, dtype: str, device: str) -> Decoder:
    """A decoder on the weights of `model`, which cannot be asked to move or to change them."""
    some = next(model.parameters())
    if device != "auto" and torch.device(device).type != some.device.type:
        raise ValueError(f"device must be auto or where the model is, {some.device}, got {device}")
    own = str(some.dtype).removeprefix("torch.")
    if dtype not in ("auto", own):
        raise ValueError(f"dtype must be auto or the model's own, {own}, got {dtype}")
    decoder = bind(model).decoder
    if (found := model.__dict__.get("_tlk_kv_scales")) is not None:
        set_kv_scales(decoder, *found)
    return decoder


def _habits(model: Any) -> dict[str, Any]:
    """As `generation_defaults`, of a model object."""
    generation = model.generation_config
    eos = generation.eos_token_id if generation else None
    eos = model.config.eos_token_id if eos is None else eos
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    how = {name: getattr(generation, name, None) for name in GENERATION}
    return {"eos_token_id": ids, **how}


def _folder_of(model: Any) -> Path | None:
    """Where the model object came from, if that is a folder here."""
    path = Path(getattr(model, "name_or_path", "") or "")
    return path if path.name and path.is_dir() else None


def _text(tokenizer: Any, folder: Path | None) -> Text:
    if isinstance(tokenizer, str | Path):
        return Text(load_tokenizer(str(tokenizer)))
    if tokenizer is not None:
        return Text(tokenizer)
    if folder is None:
        return Text(None, "the model object does not come from a folder on this machine")
    try:
        return Text(load_tokenizer(str(folder)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return Text(None, f"{folder} holds none that transformers can load ({reason})")
