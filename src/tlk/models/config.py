"""What a decoder is made of, as data. A field chooses a module when the model is built.

A new kind of attention or MLP is a new config class, joined to the unions `AnyAttention` and
`AnyMLP` and to the dict from config class to module in decoder.py.
"""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu_squared"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions: the first `rotary_dim` of each head's dimensions are rotated.

    linear, dynamic: `factor`.
    llama3: `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`.
    yarn: `factor`, `beta_fast`, `beta_slow`, `truncate`, `original_max_position_embeddings`, and
    `attention_factor` or `mscale` and `mscale_all_dim` for the scale of cos and sin.
    longrope: `short_factor` and `long_factor` [rotary_dim / 2] up to and beyond
    `original_max_position_embeddings`, and `factor` or `attention_factor`.
    A `factor` of None is max_position_embeddings / original_max_position_embeddings.
    """

    rotary_dim: int
    theta: float
    max_position_embeddings: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NormConfig:
    """ "rms": x / rms(x) · (weight + weight_offset); "layer": mean removed first, bias added last."""

    kind: NormKind
    eps: float
    weight_offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Causal attention with grouped heads over paged keys and values.

    `window` W > 0: a query sees the W latest positions, its own included; 0 sees all. `softcap`
    0 is none. `sinks`: one learnt logit per head in the softmax's denominator. `rope` None: no
    positions. `qk_norm` normalizes every head of q and of k before the rotation.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    softmax_scale: float
    rope: RopeConfig | None
    bias: bool = False
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class GatedMLPConfig:
    """down(act(gate(x)) · up(x)) with `size` intermediate features."""

    size: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """down(act(up(x))) with `size` intermediate features."""

    size: int
    activation: Activation
    bias: bool = False


AnyAttention = AttentionConfig
AnyMLP = GatedMLPConfig | MLPConfig


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """x += attention(input_norm(x)), then x += mlp(post_norm(x))."""

    attention: AnyAttention
    mlp: AnyMLP
    input_norm: NormConfig
    post_norm: NormConfig


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Embedding, layers, final norm, and a head that shares the embedding's weight if tied."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig
    max_position_embeddings: int
    tie_embeddings: bool = False
