"""Qwen2, Qwen2.5 and Qwen3, dense. https://arxiv.org/abs/2407.10671 https://arxiv.org/abs/2505.09388"""

from tlk.models import hf_fields, llama
from tlk.models.config import DecoderConfig
from tlk.models.hf_fields import Fields

NAMES = llama.NAMES | {
    "model.layers.*.self_attn.q_norm": "layers.*.attention.q_norm",
    "model.layers.*.self_attn.k_norm": "layers.*.attention.k_norm",
}


def config(hf: Fields) -> DecoderConfig:
    """The decoder of a Qwen2 (biases on q, k and v) or Qwen3 (norms on q and k) config."""
    qwen3 = hf["model_type"] == "qwen3"
    bias = bool(hf.get("attention_bias")) if qwen3 else True
    return llama.decoder(
        hf,
        _windows(hf),
        bias=bias,
        out_bias=bias and qwen3,
        qk_norm=qwen3,
        head_dim=128 if qwen3 else None,
    )


def _windows(hf: Fields) -> list[int]:
    """With use_sliding_window, the layers from max_window_layers on have a window."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    (count,) = hf_fields.required(hf, "num_hidden_layers")
    full = hf.get("max_window_layers", 28) if window else count
    default = ["full_attention" if i < full else "sliding_attention" for i in range(count)]
    return hf_fields.windows(hf, window, default)
