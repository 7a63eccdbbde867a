import pytest

from tests.models.zoo import assert_bfloat16_agrees, assert_float32_agrees, forward_counts, tiny
from tlk.errors import UnsupportedError
from tlk.models import nemotron

VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "silu": {"hidden_act": "silu", "norm_eps": 0.5},
    "quarter rotated": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.25,
        }
    },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(fields):
    assert_float32_agrees(tiny("nemotron", **fields))


def test_bfloat16():
    assert_bfloat16_agrees(tiny("nemotron", attention_bias=True))


def test_ops_of_a_forward():
    assert forward_counts(tiny("nemotron")) == {
        "layer_norm": 2 * 2 + 1,
        "rope_and_write_kv_": 2,
        "paged_attention": 2,
        "matmul": 2 * 2 + 1,
        "matmul_add_": 2 * 2,
    }


def test_an_older_config_means_the_same():
    hf = tiny("nemotron").config.to_dict()
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    old |= {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert nemotron.config(old) == nemotron.config(hf)
    del old["partial_rotary_factor"]
    assert nemotron.config(old) == nemotron.config(hf)


def test_an_unknown_activation_raises():
    hf = tiny("nemotron").config.to_dict()
    with pytest.raises(UnsupportedError, match="hidden_act='relu'"):
        nemotron.config(hf | {"hidden_act": "relu"})
