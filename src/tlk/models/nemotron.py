"""Nemotron and Minitron, dense: layer norms with weight + 1, squared ReLU without a gate, and half
of each head rotated. https://arxiv.org/abs/2402.16819 https://arxiv.org/abs/2407.14679
"""

from tlk.models import hf_fields, llama
from tlk.models.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig, NormConfig
from tlk.models.hf_fields import Fields

NAMES = {name: ours for name, ours in llama.NAMES.items() if not ours.endswith("gate_up")} | {
    "model.layers.*.mlp.up_proj": "layers.*.mlp.up"
}


def config(hf: Fields) -> DecoderConfig:
    """The decoder of a Nemotron config."""
    vocab, hidden, size, count, length = hf_fields.required(
        hf,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "max_position_embeddings",
    )
    hf_fields.windows(hf, None, ["full_attention"] * count)
    heads, kv_heads, head_dim = hf_fields.head_counts(hf)
    norm = NormConfig("layer", hf.get("norm_eps", 1e-5), weight_offset=1.0, bias=True)
    bias = bool(hf.get("attention_bias"))
    attention = AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        rope=hf_fields.rope(hf, head_dim, partial=0.5),
        bias=bias,
        out_bias=bias,
    )
    act = hf_fields.activation(hf, "relu2", gated=False)
    mlp = MLPConfig(size, act, bool(hf.get("mlp_bias")))
    layer = LayerConfig(attention, mlp, input_norm=norm, post_norm=norm)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(layer,) * count,
        final_norm=norm,
        max_position_embeddings=length,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
    )
