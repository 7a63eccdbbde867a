import copy
from collections import Counter

import pytest
import torch

from tests.models.zoo import (
    STEPS,
    Pages,
    decoder_of,
    paged_logits,
    random_ids,
    relative_error,
    tiny,
    transformers_logits,
)
from tlk.kernels._op import count_ops
from tlk.models.batch import group_specs
from tlk.models.decoder import Decoder, linears
from tlk.models.families import FAMILIES
from tlk.quant.int8 import Int8

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


def one_step(decoder, lengths=(5, 3)):
    pages = Pages(decoder.cache_specs(torch.float32, 4), lengths, "cpu")
    batch = pages.step(list(enumerate(lengths)))
    decoder.prepare(max(lengths))
    return batch, pages.cache


def test_layers_with_the_same_rotation_share_its_tables():
    decoder = decoder_of(tiny("llama"))
    assert len(decoder.ropes) == 1
    assert decoder.layers[0].attention.rope is decoder.layers[1].attention.rope is decoder.ropes[0]
    twin = copy.deepcopy(decoder)
    assert twin.layers[0].attention.rope is twin.layers[1].attention.rope is twin.ropes[0]


def test_layers_with_a_window_have_pages_of_their_own():
    specs = decoder_of(tiny("qwen2", **SLIDING)).cache_specs(torch.bfloat16)
    groups, of_layer = group_specs(specs)
    assert [g.window for g in groups] == [0, 5] and of_layer == [0, 1]
    assert specs[0].page_size == 16 and specs[0].dtype == torch.bfloat16
    assert len(group_specs(decoder_of(tiny("llama")).cache_specs(torch.float32))[0]) == 1


def test_a_tied_head_is_the_embedding():
    decoder = decoder_of(tiny("llama", tie_word_embeddings=True))
    assert decoder.lm_head is None
    assert [n for n in decoder.state_dict() if n in ("embedding.weight", "lm_head.weight")] == [
        "embedding.weight"
    ]


def test_a_decoder_can_be_built_without_memory():
    config = FAMILIES["qwen3"].config(tiny("qwen3").config.to_dict())
    with torch.device("meta"):
        decoder = Decoder(config)
    assert all(p.is_meta for p in decoder.parameters())
    loaded = decoder_of(tiny("qwen3"))
    decoder.load_state_dict(loaded.state_dict(), assign=True, strict=True)
    batch, cache = one_step(decoder)
    hidden = decoder(torch.arange(8), batch, cache)
    batch, cache = one_step(loaded)
    assert torch.equal(hidden, loaded(torch.arange(8), batch, cache))


def test_a_layer_writes_over_its_input_only_if_it_may():
    decoder = decoder_of(tiny("llama"))
    batch, cache = one_step(decoder)
    x = torch.randn(8, decoder.config.hidden_size)
    before = x.clone()
    y = decoder.layers[0](x, batch, cache.layers[0])
    assert torch.equal(x, before)
    assert torch.equal(decoder.layers[0](x, batch, cache.layers[0], in_place=True), y)
    assert torch.equal(x, y)


def test_embeds_stand_for_ids():
    decoder = decoder_of(tiny("llama"))
    batch, cache = one_step(decoder)
    ids = torch.arange(8)
    hidden = decoder(ids, batch, cache)
    assert torch.equal(decoder(None, batch, cache, embeds=decoder.embedding(ids)), hidden)
    with pytest.raises(ValueError, match="either ids or embeds"):
        decoder(ids, batch, cache, embeds=hidden)
    with pytest.raises(ValueError, match="either ids or embeds"):
        decoder(None, batch, cache)


def test_forward_leaves_its_input_alone():
    decoder = decoder_of(tiny("llama"))
    batch, cache = one_step(decoder)
    embeds = torch.randn(8, 48)
    before = embeds.clone()
    decoder(None, batch, cache, embeds=embeds)
    assert torch.equal(embeds, before)


def test_logits_of_chosen_rows():
    decoder = decoder_of(tiny("nemotron"))
    batch, cache = one_step(decoder)
    hidden = decoder(torch.arange(8), batch, cache)
    rows = torch.tensor([4, 7])
    torch.testing.assert_close(decoder.logits(hidden[rows]), decoder.logits(hidden)[rows])


@pytest.mark.parametrize("page_size", [1, 3, 16, 32])
def test_page_sizes(page_size):
    model = tiny("qwen2", **SLIDING)
    ids = random_ids(model)
    actual = paged_logits(decoder_of(model), ids, STEPS, page_size)
    assert relative_error(actual, transformers_logits(model, ids)) < 1e-4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_compiles_to_one_graph(model_type):
    decoder = decoder_of(tiny(model_type))
    ids, (batch, cache) = torch.arange(8), one_step(decoder)
    expected = decoder.logits(decoder(ids, batch, cache))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ids, batch, cache):
        return decoder.logits(decoder(ids, batch, cache))

    torch._dynamo.reset()
    for _ in range(2):  # the second time over a cache that holds something else
        for layer in cache.layers:
            layer.k.fill_(3.0)
        torch.testing.assert_close(step(ids, batch, cache), expected)
    torch._dynamo.reset()


def test_longer_models_run_the_same_ops_per_layer():
    def count(layers):
        decoder = decoder_of(tiny("llama", num_hidden_layers=layers))
        batch, cache = one_step(decoder)
        with count_ops() as counts:
            decoder(torch.arange(8), batch, cache)
        return counts.total()

    assert count(3) - count(2) == count(2) - count(1) == 6


def test_what_inference_mode_made_is_of_use_outside():
    decoder = decoder_of(tiny("llama", rope_parameters=DYNAMIC))
    with torch.inference_mode():
        batch, cache = one_step(decoder)
        expected = decoder(torch.arange(8), batch, cache)
    decoder.prepare(80)
    decoder.prepare(5)
    assert torch.equal(decoder(torch.arange(8), batch, cache), expected)


def test_norms_and_gates_round_for_layers_of_8_bits():
    decoder = decoder_of(tiny("llama"))
    for name, linear in linears(decoder).items():
        if name != "lm_head":
            linear.store(Int8(), Int8().quantize(linear.weight.detach()))
    batch, cache = one_step(decoder)
    with count_ops() as counts:
        decoder(torch.zeros(8, dtype=torch.int64), batch, cache)
    few = Counter({name.partition("[")[0]: n for name, n in counts.items()})
    assert few["dequant_mm"] == 2 * 4 and not few["scaled_mm"]
    batch, cache = one_step(decoder, (5, 4))
    with count_ops() as counts:
        decoder(torch.zeros(9, dtype=torch.int64), batch, cache)
    ran = Counter({name.partition("[")[0]: n for name, n in counts.items()})
    per_layer = {"rms_norm_quant": 2, "scaled_mm": 4, "quantize_act": 1, "gated_quant": 1}
    assert {name: ran[name] for name in per_layer} == {k: 2 * n for k, n in per_layer.items()}
    assert ran.total() == few.total() + 2 * 4  # four more kernels a layer, which round
