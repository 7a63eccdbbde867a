import pytest

from tests.models.zoo import assert_bfloat16_agrees, assert_float32_agrees, forward_counts, tiny
from tlk.errors import UnsupportedError
from tlk.models import qwen

LLAMA_OPS = {
    "norm_linear": 2 + 1,
    "rope_and_write_kv_": 2,
    "paged_attention": 2,
    "matmul_add_": 2 * 2,
    "gated_linear": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "sliding": SLIDING,
    "layer types": SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(model_type, fields):
    assert_float32_agrees(tiny(model_type, **fields))


def test_qwen3_biases():
    assert_float32_agrees(tiny("qwen3", attention_bias=True))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_bfloat16(model_type):
    assert_bfloat16_agrees(tiny(model_type, **SLIDING))


def test_ops_of_a_forward():
    assert forward_counts(tiny("qwen2", **SLIDING)) == LLAMA_OPS
    assert forward_counts(tiny("qwen3")) == LLAMA_OPS


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_an_older_config(model_type):
    def windows(**fields):
        hf = tiny(model_type).config.to_dict() | fields
        del hf["layer_types"]
        return [layer.attention.window for layer in qwen.config(hf).layers]

    assert windows(sliding_window=7, use_sliding_window=False) == [0, 0]
    assert windows(sliding_window=7, use_sliding_window=True, max_window_layers=1) == [0, 7]
    assert windows(sliding_window=7, use_sliding_window=True, max_window_layers=0) == [7, 7]
    assert windows(sliding_window=7, use_sliding_window=True, max_window_layers=28) == [0, 0]


def test_qwen3_heads_are_128_wide_unless_said_otherwise():
    hf = tiny("qwen3").config.to_dict()
    del hf["head_dim"]
    assert qwen.config(hf).layers[0].attention.head_dim == 128
    assert qwen.config(hf | {"model_type": "qwen2"}).layers[0].attention.head_dim == 8


def test_an_unknown_layer_type_raises():
    hf = tiny("qwen2").config.to_dict()
    with pytest.raises(UnsupportedError, match="layer_types='linear_attention'"):
        qwen.config(hf | {"layer_types": ["full_attention", "linear_attention"]})
