import pytest
import torch

from tests.models.zoo import decoder_of, tiny, weights_of
from tlk.errors import CheckpointError
from tlk.models.families import FAMILIES, load_weights, parameter_splits, weight_sources


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_weight_has_one_place(model_type, tied):
    model = tiny(model_type, tie_word_embeddings=tied)
    decoder, state = decoder_of(model), weights_of(model)
    sources = weight_sources(FAMILIES[model_type], decoder.config)
    assert set(sources) == set(decoder.state_dict())
    used = [name for names in sources.values() for name in names]
    assert sorted(used) == sorted(state)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, torch.cat([state[s] for s in sources[name]])), name


def test_sources_are_in_the_order_of_the_rows():
    decoder = decoder_of(tiny("qwen2", num_hidden_layers=11))
    sources = weight_sources(FAMILIES["qwen2"], decoder.config)
    assert sources["layers.10.attention.qkv.bias"] == (
        "model.layers.10.self_attn.q_proj.bias",
        "model.layers.10.self_attn.k_proj.bias",
        "model.layers.10.self_attn.v_proj.bias",
    )
    assert sources["layers.3.mlp.gate_up.weight"] == (
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    )
    assert sources["embedding.weight"] == ("model.embed_tokens.weight",)


def load(model, state):
    decoder = decoder_of(model)
    sources = weight_sources(FAMILIES[model.config.model_type], decoder.config)
    load_weights(decoder, sources, state)


def test_loading_is_strict():
    model = tiny("llama")
    state = weights_of(model)
    with pytest.raises(
        CheckpointError, match=r"missing: \['model.norm.weight'\], left over: \['x'\]"
    ):
        load(
            model,
            {k: v for k, v in state.items() if k != "model.norm.weight"}
            | {"x": state["model.norm.weight"]},
        )
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name}.* has shape"):
        load(model, state | {name: state[name][:3]})


def test_a_tied_head_in_the_checkpoint_is_not_left_over():
    model = tiny("llama", tie_word_embeddings=True)
    load(model, weights_of(model) | {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="left over"):
        load(model, weights_of(model) | {"lm_head.bias": torch.zeros(1)})


def test_what_ranks_divide():
    splits = parameter_splits(decoder_of(tiny("llama", attention_bias=True)))
    assert splits["layers.0.attention.qkv.bias"] == "out"
    assert splits["layers.1.attention.out.weight"] == "in"
    assert splits["layers.0.mlp.gate_up.weight"] == "out"
    assert splits["layers.0.mlp.down.weight"] == "in"
    assert splits["layers.0.input_norm.weight"] is None
    assert splits["embedding.weight"] is None and splits["lm_head.weight"] is None
