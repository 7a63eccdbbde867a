"""Quantize the linear layers of a transformers model in place, and undo that from its checkpoint."""

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
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import LENGTH, SAMPLES, Calibration, read_calibration
from tlk.quantize.layers import LayerResult
from tlk.quantize.plan import plan
from tlk.quantize.run import by_layer, data_is_needed, run


@torch.no_grad()
def quantize_in_place(
    model: nn.Module,
    quantization: str | QuantConfig,
    calibration: Any = None,
    *,
    strict: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Store the linear layers of `model`, a causal language model of transformers, as `quantization` says.

    One layer after another becomes `QuantLinear`s, and its 16-bit weights are let go. Returns for each
    of the model's modules how it was made and how far it is off. Raises UnsupportedError for a model
    that tlk does not run, or of which nothing can be quantized; ValueError for a model that is
    quantized already, or without the calibration that a method needs.
    """
    config = _config(quantization, calibration)
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise ValueError("model is quantized already: load the one it came from")
    binding = bind(model)
    decoder = binding.decoder
    sources = weight_sources(FAMILIES[binding.family], decoder.config)
    planned = plan(decoder, sources, config, strict=strict)
    data = _data(model, config, decoder.config.max_position_embeddings)
    layers, dtype = by_layer(planned), next(model.parameters()).dtype

    def done(i: int, result: LayerResult) -> None:
        prefix = f"layers.{i}." if i < planned.layers else ""
        names = {prefix + name for name in layers.get(i, ())}
        adopt(model, decoder, sources, dtype, names)

    result = run(decoder, planned, data, binding.device, done=done, progress=progress)
    model.__dict__["_tlk_kept"] = dict(planned.kept)
    model.__dict__["_tlk_quantization"] = config
    model.__dict__["_tlk_report"] = result.report
    return result.report


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


def _config(quantization: str | QuantConfig, calibration: Any) -> QuantConfig:
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


def _data(model: Any, config: QuantConfig, longest: int) -> Calibration | None:
    if config.calibration is None:
        return None
    path = Path(getattr(model, "name_or_path", "") or "")
    encode = None
    if path.name and path.is_dir():
        tokenizer = load_tokenizer(str(path))

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return read_calibration(
        config.calibration,
        encode,
        vocab_size=model.config.vocab_size,
        samples=SAMPLES,
        length=min(LENGTH, longest),
    )
