import torch
from accelerate import init_empty_weights

from tests.models.zoo import decoder_of, tiny
from tlk.hf.binding import bind
from tlk.hf.quant_linear import QuantLinear
from tlk.hf.quantized_model import fill
from tlk.models.decoder import linears
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.int4 import Int4

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def test_a_model_around_a_decoder_shares_its_weights():
    dense = tiny("qwen2", **SIZES, tie_word_embeddings=True)
    decoder, format = decoder_of(dense), Int4(group_size=32)
    for name, linear in linears(decoder).items():
        if "layers.0" in name:
            linear.store(format, format.quantize(linear.weight.detach()))
    with init_empty_weights(include_buffers=False):
        model = type(dense)(dense.config)
    sources = weight_sources(FAMILIES["qwen2"], decoder.config)
    fill(model, decoder, sources, torch.float32)
    first, second = model.model.layers
    assert all(isinstance(m, QuantLinear) for m in (first.self_attn.v_proj, first.mlp.down_proj))
    assert torch.equal(first.self_attn.v_proj.bias, dense.model.layers[0].self_attn.v_proj.bias)
    assert torch.equal(second.mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)
    assert model.lm_head.weight.data_ptr() == decoder.embedding.weight.data_ptr()
    ids = torch.randint(0, 99, (1, 7))
    with torch.no_grad():
        logits = model.eval()(ids).logits
    assert not torch.equal(logits, dense(ids).logits)
    assert len(bind(model).quantized) == 7
