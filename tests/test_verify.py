import math

import pytest
import torch
from transformers import LlamaForCausalLM

import tlk
from tests.models.zoo import tiny


def test_both_paths_agree():
    model = tlk.optimize(tiny("qwen3"))
    result = tlk.verify(model)
    assert result.positions == 4 * 64 and result.top1_agreement == 1
    assert result.relative_error < 1e-5 and 0 <= abs(result.kl) < 1e-6
    assert result.to_dict()["positions"] == 256 and "KL" in str(result)


def test_a_difference_is_seen():
    model = tlk.optimize(tiny("llama"))
    decoder = model._execution.binding.decoder
    decoder.layers[1].mlp.down.weight.data = decoder.layers[1].mlp.down.weight * 1.5
    result = tlk.verify(model, [torch.tensor([5, 9, 2]), torch.tensor([7])])
    assert result.positions == 4
    assert result.relative_error > 0.01 and result.kl > 1e-3 and result.max_logit_error > 0.1


@torch.no_grad()
def test_perplexity_is_that_of_the_next_tokens():
    torch.manual_seed(0)
    model = tiny("llama")
    ids = [torch.randint(0, 99, (n,)) for n in (9, 1, 5)]
    loss = [model(i[None]).logits[0, :-1].log_softmax(-1)[range(len(i) - 1), i[1:]] for i in ids]
    wanted = float((-torch.cat(loss).mean()).exp())
    result = tlk.verify(tlk.optimize(model), ids)
    assert result.perplexity == pytest.approx(wanted, rel=1e-4)
    assert result.original_perplexity == pytest.approx(wanted, rel=1e-4)
    assert not result.quantized and "perplexity" not in str(result)
    assert math.isnan(tlk.verify(model, [torch.tensor([3])]).perplexity)


def test_a_quantized_model_is_compared_with_its_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    exact = LlamaForCausalLM.from_pretrained(tmp_path)
    model = tlk.optimize(LlamaForCausalLM.from_pretrained(tmp_path).eval(), quantization="fp8")
    ids = [torch.arange(40), torch.arange(20)]
    result = tlk.verify(model, ids)
    a, b = (torch.cat([m(i[None]).logits[0] for i in ids]).detach() for m in (model, exact.eval()))
    assert result.quantized and result.positions == 60
    assert result.relative_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-3)
    assert 0.005 < result.relative_error < 0.3 and result.kl > 1e-5
    assert result.perplexity != result.original_perplexity
    assert "before quantization (" in str(result)
    model.name_or_path = "gone"
    with pytest.raises(tlk.UnsupportedError, match="'gone' is no folder on this machine"):
        tlk.verify(model, ids)


def test_bad_input():
    with pytest.raises(ValueError, match="must be optimized"):
        tlk.verify(tiny("llama"))
    model = tlk.optimize(tiny("llama"))
    with pytest.raises(ValueError, match="at least one sequence"):
        tlk.verify(model, [])
    with pytest.raises(ValueError, match="eval mode"):
        tlk.verify(model.train())
    model.eval().model.layers[0].register_forward_hook(lambda *a: None)
    with pytest.warns(tlk.FallbackWarning), pytest.raises(ValueError, match="forward hooks"):
        tlk.verify(model)
