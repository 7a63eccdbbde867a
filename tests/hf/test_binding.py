import pytest
import torch
from torch import nn

from tests.models.zoo import tiny
from tlk.errors import UnsupportedError
from tlk.hf.binding import bind, unbind


def test_fused_weights_are_the_parts_in_order():
    model = tiny("qwen2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    binding = bind(model)
    attention = model.model.layers[1].self_attn
    fused = binding.decoder.layers[1].attention.qkv
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    for name in ("weight", "bias"):
        whole = torch.cat([getattr(p, name) for p in parts])
        assert torch.equal(getattr(fused, name), whole)
    with torch.no_grad():
        attention.k_proj.weight.zero_()
        rows = attention.q_proj.out_features
        assert fused.weight[rows : rows + attention.k_proj.out_features].abs().max() == 0
        attention.k_proj.weight.copy_(before["model.layers.1.self_attn.k_proj.weight"])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_binding_again_shares_the_same_storage():
    model = tiny("llama")
    first = bind(model).decoder.layers[0].mlp.gate_up.weight
    second = bind(model).decoder.layers[0].mlp.gate_up.weight
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, second)


def test_parameters_stay_the_same_objects():
    model = tiny("llama", tie_word_embeddings=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    binding = bind(model)
    unbind(model, binding)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[n] is p for n, p in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_staleness():
    model = tiny("llama")
    binding = bind(model)
    assert not binding.stale() and binding.hooked() is None
    linear = model.model.layers[0].mlp.up_proj
    hook = linear.register_forward_pre_hook(lambda m, a: None)
    assert binding.hooked() == "model.layers.0.mlp.up_proj" and not binding.stale()
    hook.remove()
    linear.weight.data = linear.weight.data.clone()
    assert binding.stale()


def refused(model, match):
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=match):
        bind(model)
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}  # nothing was fused


def test_refusals_name_the_module_and_change_nothing():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = type("Mine", (nn.SiLU,), {"__module__": "mine"})()
    refused(model, r"model\.layers\.1\.mlp\.act_fn is a mine\.Mine")

    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.half()
    refused(model, r"up_proj\.weight is torch\.float16")

    model = tiny("llama")
    model.model.layers[0].mlp.register_parameter("extra", nn.Parameter(torch.ones(1)))
    refused(model, r"parameters that tlk does not know: .*mlp\.extra")

    model = tiny("llama")
    model.model.layers[0].self_attn.o_proj = nn.Identity()
    refused(model, r"lacks the parameters .*o_proj\.weight")

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(3, 48))
    refused(model, r"gate_proj\.weight \+ .*up_proj\.weight has shape")

    model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    refused(model, r"lm_head\.weight is not tied")

    model = tiny("llama").to("meta")
    refused(model, "is on meta")

    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model.config.hidden_act = "tanh"
    refused(model, "hidden_act='tanh'")
