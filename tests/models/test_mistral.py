import pytest

from tests.models.zoo import assert_bfloat16_agrees, assert_float32_agrees, forward_counts, tiny
from tlk.errors import UnsupportedError
from tlk.models import mistral


@pytest.mark.parametrize("window", [None, 1, 5, 16, 4096])
def test_logits_are_those_of_transformers(window):
    assert_float32_agrees(tiny("mistral", sliding_window=window))


def test_bfloat16():
    assert_bfloat16_agrees(tiny("mistral", sliding_window=5, tie_word_embeddings=True))


def test_ops_of_a_forward():
    assert forward_counts(tiny("mistral", sliding_window=5)) == {
        "norm_linear": 2 + 1,
        "rope_and_write_kv_": 2,
        "paged_attention": 2,
        "matmul_add_": 2 * 2,
        "gated_linear": 2,
    }


def test_every_layer_has_the_window():
    hf = tiny("mistral", sliding_window=5).config.to_dict()
    assert [layer.attention.window for layer in mistral.config(hf).layers] == [5, 5]
    types = hf | {"layer_types": ["sliding_attention"] * 2}
    assert mistral.config(types) == mistral.config(hf)


def test_layer_types_that_transformers_would_ignore_raise():
    hf = tiny("mistral", sliding_window=5).config.to_dict()
    with pytest.raises(UnsupportedError, match="layer_types"):
        mistral.config(hf | {"layer_types": ["full_attention", "sliding_attention"]})
