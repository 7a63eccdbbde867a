import pytest
import torch
from transformers import DynamicCache

from tests.models.test_rope import KINDS
from tests.models.zoo import (
    assert_bfloat16_agrees,
    assert_float32_agrees,
    decoder_of,
    forward_counts,
    paged_logits,
    relative_error,
    tiny,
)
from tlk.errors import CheckpointError, UnsupportedError
from tlk.models import llama

VARIANTS = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"intermediate_size": 37, "head_dim": 20, "hidden_size": 42, "vocab_size": 51},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.5},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(fields):
    assert_float32_agrees(tiny("llama", **fields))


@pytest.mark.parametrize("name", ["biases", "tied", "odd sizes"])
def test_bfloat16(name):
    assert_bfloat16_agrees(tiny("llama", **VARIANTS[name]))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dynamic" and "longrope" not in k])
def test_rotary_kinds(kind):
    assert_float32_agrees(tiny("llama", rope_parameters={"rope_theta": 100.0} | KINDS[kind]))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_depend_on_the_length_follow_transformers_step_by_step(kind):
    parameters = {"rope_theta": 100.0} | KINDS[kind]
    model = tiny("llama", rope_parameters=parameters, max_position_embeddings=30)
    ids = torch.randint(0, 99, (41,))
    chunks = [23, 1, 1, 5, 1, 9, 1]
    cache, expected = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split(chunks):
            expected.append(model(part[None], past_key_values=cache).logits[0])
    decoder = decoder_of(model)
    actual = paged_logits(decoder, [ids], [[(0, n)] for n in chunks])
    assert relative_error(actual, expected) < 1e-4


def test_ops_of_a_forward():
    assert forward_counts(tiny("llama")) == {
        "norm_linear": 2 + 1,
        "rope_and_write_kv_": 2,
        "paged_attention": 2,
        "matmul_add_": 2 * 2,
        "gated_linear": 2,
    }


def test_an_older_config_means_the_same():
    model = tiny("llama", rope_parameters={"rope_theta": 100.0} | KINDS["llama3"])
    new = model.config.to_dict()
    scaling = {k: v for k, v in new["rope_parameters"].items() if k != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "pretraining_tp")}
    assert llama.config(old | {"rope_theta": 100.0, "rope_scaling": scaling}) == llama.config(new)
    assert llama.config(old | {"rope_scaling": None}).layers[0].attention.rope.theta == 10000.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu2"),
        ("hidden_act", "quick_gelu"),
        ("pretraining_tp", 2),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_parameters", {"rope_type": "proportional"}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [2, 3, 3]}),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 4),
    ],
)
def test_what_llama_does_not_model_raises(field, value):
    hf = tiny("llama").config.to_dict() | {field: value}
    with pytest.raises(UnsupportedError, match=r"config .* is not supported"):
        llama.config(hf)


def test_a_missing_field_is_named():
    hf = tiny("llama").config.to_dict()
    with pytest.raises(CheckpointError, match="vocab_size, intermediate_size"):
        llama.config({k: v for k, v in hf.items() if k not in ("vocab_size", "intermediate_size")})
