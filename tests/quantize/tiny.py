"""A tiny decoder with random weights, and calibration data for it."""

import torch

from tests.models.zoo import tiny
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, load_weights, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import Calibration
from tlk.quantize.plan import Plan, plan

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def decoder(model_type: str = "llama", **fields: object) -> tuple[Decoder, dict]:
    """The decoder in eval mode, and the checkpoint's tensors it is made of, per parameter."""
    model = tiny(model_type, **(FIELDS | fields))
    family = FAMILIES[model_type]
    config = family.config(model.config.to_dict())
    made, sources = Decoder(config).eval(), weight_sources(family, config)
    load_weights(made, sources, model.state_dict())
    return made, sources


def planned(made: Decoder, sources: dict, method: str = "int4-gptq", **options: object) -> Plan:
    """What a method makes of it, in groups of 32 where it has groups."""
    if method.startswith("int4"):
        options.setdefault("group_size", 32)
    return plan(made, sources, QuantConfig(method, **options))


def data(sequences: int = 6, length: int = 20, vocab: int = 64) -> Calibration:
    """Random ids, some much more frequent than others."""
    g = torch.Generator().manual_seed(1)
    ids = (vocab * torch.rand(sequences, length, generator=g) ** 2).long()
    return Calibration(ids, "random ids")
