"""Llama 1 to 3.3, and what its architecture serves unchanged. https://arxiv.org/abs/2407.21783"""

from dataclasses import replace

from tlk.models import hf_fields
from tlk.models.config import (
    AttentionConfig,
    DecoderConfig,
    GatedMLPConfig,
    LayerConfig,
    NormConfig,
)
from tlk.models.hf_fields import Fields

# transformers' module -> the decoder's; {…} are fused in that order, * is the layer
NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers.*.input_layernorm": "layers.*.input_norm",
    "model.layers.*.self_attn.{q,k,v}_proj": "layers.*.attention.qkv",
    "model.layers.*.self_attn.o_proj": "layers.*.attention.out",
    "model.layers.*.post_attention_layernorm": "layers.*.post_norm",
    "model.layers.*.mlp.{gate,up}_proj": "layers.*.mlp.gate_up",
    "model.layers.*.mlp.down_proj": "layers.*.mlp.down",
    "model.norm": "final_norm",
    "lm_head": "lm_head",
}


def config(hf: Fields) -> DecoderConfig:
    """The decoder of a Llama config."""
    hf_fields.expect(hf, "pretraining_tp", 1, None)
    (count,) = hf_fields.required(hf, "num_hidden_layers")
    windows = hf_fields.windows(hf, None, ["full_attention"] * count)
    bias = bool(hf.get("attention_bias"))
    return decoder(hf, windows, bias=bias, out_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))


def decoder(
    hf: Fields,
    windows: list[int],
    *,
    bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
) -> DecoderConfig:
    """RMS norms, rotary attention with one window per layer, and a gated MLP."""
    vocab, hidden, size, length = hf_fields.required(
        hf, "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"
    )
    heads, kv_heads, head_dim = hf_fields.head_counts(hf, head_dim)
    norm = NormConfig("rms", hf.get("rms_norm_eps", 1e-6))
    mlp = GatedMLPConfig(size, hf_fields.activation(hf, "silu", gated=True), mlp_bias)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        rope=hf_fields.rope(hf, head_dim),
        bias=bias,
        out_bias=out_bias,
        qk_norm=norm if qk_norm else None,
    )
    layer = LayerConfig(attention, mlp, input_norm=norm, post_norm=norm)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layers=tuple(replace(layer, attention=replace(attention, window=w)) for w in windows),
        final_norm=norm,
        max_position_embeddings=length,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
    )
