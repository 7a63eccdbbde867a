"""The weights that a benchmark serves: a checkpoint's, or random ones in the shape of a config."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlk.bench import peers
from tlk.bench.shapes import SHAPES
from tlk.hf.binding import bind
from tlk.hf.checkpoint import load_model
from tlk.hf.hub import complete_config, read_config, snapshot
from tlk.hf.weights import DTYPES, load_decoder, random_decoder
from tlk.models.decoder import Decoder, linears
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.in_place import quantize_decoder


@dataclass(frozen=True, slots=True)
class Source:
    """The decoder to measure, and the model of transformers that shares its weights, if it is wanted.

    seconds: what loading, or making them up, took.
    """

    decoder: Decoder
    peer: nn.Module | None
    seconds: float

    def sizes(self) -> dict[str, int]:
        """What the weights weigh, and what a step must do with them.

        decode_bytes: read by every decode step, which is all but an untied embedding. linear_parameters:
        multiplied with every token, the head not counted: it sees the last ones only.
        """
        embedding = self.decoder.embedding.weight
        total = {p.data_ptr(): p for p in self.decoder.parameters()}.values()
        numel = sum(p.numel() for p in total)
        size = sum(p.numel() * p.element_size() for p in total)
        layers = linears(self.decoder)
        head = layers.pop("lm_head", None)
        return {
            "parameters": numel,
            "bytes": size,
            "decode_bytes": size - (embedding.nbytes if head is not None else 0),
            "linear_parameters": sum(m.in_features * m.out_features for m in layers.values()),
        }


def load_source(
    model: str | None,
    random_weights: str | None,
    dtype: str,
    device: torch.device,
    seed: int,
    *,
    peer: bool,
    quantization: str | None = None,
) -> Source:
    """The model at `model`, or random weights for a shape's name, a config.json or its folder.

    dtype "auto": the checkpoint's own; random weights are bfloat16 on a GPU and float32 on a CPU.
    peer: load it as a model of transformers, and let tlk's decoder share its weights. quantization: a
    method; weights are rounded to nearest, for speed is the format's and not the calibration's.
    """
    if peer and quantization is not None:
        raise ValueError(
            "quantization must be None where transformers is compared on the same weights"
        )
    started = time.perf_counter()
    if random_weights is not None:
        config = _config(random_weights)
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
    if not peer:
        loaded = (
            load_decoder(str(model), dtype=dtype, device=device)
            if random_weights is None
            else random_decoder(config, dtype=dtype, device=device, seed=seed)
        )
        if quantization is not None:
            sources = weight_sources(FAMILIES[loaded.family], loaded.decoder.config)
            quantize_decoder(loaded.decoder, sources, QuantConfig(quantization), None)
        return Source(loaded.decoder, None, time.perf_counter() - started)
    other: Any
    if random_weights is None:
        wanted = "auto" if dtype == "auto" else DTYPES[dtype]
        other = load_model(str(snapshot(str(model))), dtype=wanted, device=str(device))
    else:
        other = peers.random_model(complete_config(config), DTYPES[dtype], device, seed)
    return Source(bind(other).decoder, other, time.perf_counter() - started)


def _config(name: str) -> Mapping[str, Any]:
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"random_weights must be a config.json, its folder or one of {', '.join(SHAPES)}, got {name}"
        )
    return read_config(path.parent if path.name == "config.json" else path)
