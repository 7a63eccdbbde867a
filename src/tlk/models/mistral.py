"""Mistral: Llama with a sliding window. https://arxiv.org/abs/2310.06825"""

from tlk.models import hf_fields, llama
from tlk.models.config import DecoderConfig
from tlk.models.hf_fields import Fields

NAMES = llama.NAMES


def config(hf: Fields) -> DecoderConfig:
    """The decoder of a Mistral config: `sliding_window` in every layer, or in none."""
    window = hf.get("sliding_window")
    (count,) = hf_fields.required(hf, "num_hidden_layers")
    default = ["sliding_attention" if window else "full_attention"] * count
    windows = hf_fields.windows(hf, window, default)
    if window and 0 in windows:  # transformers gives every Mistral layer the window all the same
        raise hf_fields.unsupported("layer_types", hf["layer_types"], "one type for all layers")
    return llama.decoder(hf, windows)
