"""Quantize the linear layers of a transformers model in place, and undo that from its checkpoint."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlk.errors import UnsupportedError
from tlk.hf.binding import bind
from tlk.hf.checkpoint import load, load_tokenizer
from tlk.hf.quant_linear import QuantLinear
from tlk.hf.quantized_model import adopt
from tlk.models.decoder import Decoder, kv_scales_of, linears, set_kv_scales
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quant.format import Dense
from tlk.quantize.calibration import LENGTH, SAMPLES
from tlk.quantize.checkpoint import calibration_rows
from tlk.quantize.layers import LayerResult
from tlk.quantize.plan import plan
from tlk.quantize.report import describe
from tlk.quantize.run import KV_DTYPES, by_layer, data_is_needed, run


@torch.no_grad()
def quantize_in_place(
    model: nn.Module,
    quantization: str | QuantConfig,
    calibration: Any = None,
    *,
    kv_cache_dtype: str | None = None,
    strict: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Store the linear layers of `model`, a causal language model of transformers, as `quantization` says.

    One layer after another becomes `QuantLinear`s, and its 16-bit weights are let go. kv_cache_dtype:
    "fp8" or "int8" also finds the scales of such a cache, if there is calibration data. Returns what
    `describe` makes of it. Raises UnsupportedError for a model that tlk does not run, or of which
    nothing can be quantized; ValueError for a model that is quantized already, or without the
    calibration that a method needs.
    """
    config = as_config(quantization, calibration)
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise ValueError("model is quantized already: load the one it came from")
    binding = bind(model)
    decoder = binding.decoder
    sources = weight_sources(FAMILIES[binding.family], decoder.config)
    dtype, own = next(model.parameters()).dtype, Path(getattr(model, "name_or_path", "") or "")
    report = quantize_decoder(
        decoder, sources, config, own if own.name and own.is_dir() else None,
        kv_cache_dtype=kv_cache_dtype, strict=strict,
        done=lambda names: adopt(model, decoder, sources, dtype, names), progress=progress,
    )  # fmt: skip
    model.__dict__["_tlk_kept"] = report["kept_in_16_bit"]
    model.__dict__["_tlk_report"] = report
    if kv_scales := kv_scales_of(decoder):
        model.__dict__["_tlk_kv_scales"] = kv_scales, KV_DTYPES[report["kv_cache_dtype"]]
    return report


def quantize_decoder(
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    config: QuantConfig,
    folder: Path | None,
    *,
    kv_cache_dtype: str | None = None,
    strict: bool = False,
    done: Callable[[Collection[str]], object] = lambda names: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Store the linear layers of `decoder` as `config` says, where they lie; returns what `describe` tells.

    sources: as `weight_sources` gives them. folder: where the tokenizer for calibration texts lies.
    kv_cache_dtype: "fp8" or "int8" sets the scales of such a cache too, if there is calibration data.
    done: told the names of the linear layers of each layer when they are stored. Raises as
    `quantize_in_place` does.
    """
    if any(not isinstance(linear.format, Dense) for linear in linears(decoder).values()):
        raise ValueError("model is quantized already: quantization must be None for it")
    planned = plan(decoder, sources, config, strict=strict)
    layers = by_layer(planned)

    def stored(i: int, result: LayerResult) -> None:
        prefix = f"layers.{i}." if i < planned.layers else ""
        done({prefix + name for name in layers.get(i, ())})

    data = None
    if config.calibration is not None:
        data = calibration_rows(
            config.calibration, lambda: _tokenizer(folder), vocab_size=decoder.config.vocab_size,
            samples=SAMPLES, length=min(LENGTH, decoder.config.max_position_embeddings),
        )  # fmt: skip
    device = decoder.embedding.weight.device
    kv = kv_cache_dtype if data is not None and kv_cache_dtype in KV_DTYPES else None
    result = run(decoder, planned, data, device, kv_dtype=kv, done=stored, progress=progress)
    if kv is not None:
        set_kv_scales(decoder, dict(enumerate(result.kv_scales)), KV_DTYPES[kv])
    return describe(config, planned, data, result, device, kv)


def read_again(model: nn.Module) -> None:
    """Make `model` what its checkpoint holds: the class, the modules and the weights it came with.

    Raises UnsupportedError, with `model` as it was, if the checkpoint is not on this machine or is
    quantized itself.
    """
    own: Any = model
    kind = getattr(type(own), "_tlk_base", type(own))
    path = Path(getattr(own, "name_or_path", "") or "")
    if "_tlk_stored" in own.__dict__:
        raise UnsupportedError(
            f"{path} is quantized itself: there are no 16-bit weights to restore"
        )
    if not path.name or not path.is_dir():
        raise UnsupportedError(
            "restore reads the 16-bit weights of a quantized model from its checkpoint, and "
            f"name_or_path {str(path)!r} is no folder on this machine"
        )
    some = next(own.parameters())
    fresh, _ = load(kind, path, dtype=some.dtype)
    fresh.to(some.device).train(own.training)
    own.__class__ = kind
    own.__dict__.clear()
    own.__dict__.update(fresh.__dict__)


def as_config(quantization: str | QuantConfig, calibration: Any = None) -> QuantConfig:
    """What a user asks for as a QuantConfig; ValueError if it lacks the calibration that it needs."""
    config = quantization
    if not isinstance(config, QuantConfig):
        config = QuantConfig(config)
    if calibration is not None:
        if config.calibration is not None:
            raise ValueError("calibration must be given once, as an argument or in the QuantConfig")
        config = replace(config, calibration=calibration)
    if config.calibration is None and data_is_needed(config):
        raise ValueError(f"calibration must be texts, a JSONL file or ids for {config.method}")
    return config


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        raise ValueError(
            "calibration must be token ids: the model does not come from a folder with a tokenizer"
        )
    return load_tokenizer(str(folder))
