import pytest

from tlk.errors import CheckpointError, UnsupportedError
from tlk.models import hf_fields

BASE = {"max_position_embeddings": 4096, "num_hidden_layers": 2}


def rope(parameters=None, partial=None, **fields):
    hf = BASE | {"rope_parameters": parameters} | fields
    return hf_fields.rope(hf, 64, partial)


def test_rope_defaults():
    config = rope()
    assert (config.kind, config.theta, config.rotary_dim) == ("default", 10000.0, 64)
    assert rope(rope_theta=5.0).theta == 5.0
    assert rope({"rope_theta": 7.0}, rope_theta=5.0).theta == 7.0


def test_the_original_length_comes_from_the_outer_field_first():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    assert rope(yarn).original_max_position_embeddings == 512
    assert rope(yarn, original_max_position_embeddings=99).original_max_position_embeddings == 99
    del yarn["original_max_position_embeddings"]
    assert rope(yarn).original_max_position_embeddings == 4096


def test_fields_of_other_kinds_do_not_count():
    assert rope({"factor": 3.0, "rope_type": "default"}) == rope()
    assert rope({"rope_type": "linear", "factor": 3.0, "beta_fast": 5.0}).beta_fast == 32.0


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_a_missing_factor_is_named(kind):
    with pytest.raises(CheckpointError, match=f"rope_type {kind} has no factor"):
        rope({"rope_type": kind})


def test_missing_longrope_factors_are_named():
    with pytest.raises(CheckpointError, match="config has no long_factor"):
        rope({"rope_type": "longrope", "short_factor": [1.0] * 32})


def test_partial_rotation():
    assert rope(partial=0.5).rotary_dim == 32
    assert rope(partial=0.5, partial_rotary_factor=0.25).rotary_dim == 16
    assert rope({"partial_rotary_factor": 0.75}, partial=0.5).rotary_dim == 48
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor=0.25 .* only 1.0"):
        rope({"partial_rotary_factor": 0.25})


@pytest.mark.parametrize(
    ("name", "ours"),
    [("swish", "silu"), ("gelu_new", "gelu_tanh"), ("gelu", "gelu"), (None, "silu")],
)
def test_activations(name, ours):
    assert hf_fields.activation({"hidden_act": name}, "silu", gated=True) == ours


def test_activations_without_a_gate():
    assert hf_fields.activation({"hidden_act": "relu2"}, "silu", gated=False) == "relu_squared"
    with pytest.raises(UnsupportedError, match="hidden_act='relu2'"):
        hf_fields.activation({"hidden_act": "relu2"}, "silu", gated=True)


def test_head_counts():
    hf = {"num_attention_heads": 6, "hidden_size": 48}
    assert hf_fields.head_counts(hf) == (6, 6, 8)
    assert hf_fields.head_counts(hf, 128) == (6, 6, 128)
    full = hf | {"num_key_value_heads": 2, "head_dim": 20}
    assert hf_fields.head_counts(full, 128) == (6, 2, 20)


def test_windows():
    default = ["full_attention", "full_attention"]
    assert hf_fields.windows(BASE, 7, default) == [0, 0]
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    assert hf_fields.windows(BASE | types, 7, default) == [7, 0]
    with pytest.raises(UnsupportedError, match="sliding_window=None"):
        hf_fields.windows(BASE | types, None, default)
    with pytest.raises(CheckpointError, match="layer_types has 1 entries"):
        hf_fields.windows(BASE | {"layer_types": default[:1]}, 7, default)


def test_expect_accepts_an_absent_field():
    hf_fields.expect({}, "pretraining_tp", 1)
    with pytest.raises(UnsupportedError, match="config pretraining_tp=2 is not supported, only 1"):
        hf_fields.expect({"pretraining_tp": 2}, "pretraining_tp", 1)
