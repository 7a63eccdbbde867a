import pytest
import torch

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
