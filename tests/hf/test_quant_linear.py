import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo import tiny
from tlk.errors import UnsupportedError
from tlk.hf.binding import bind
from tlk.hf.quant_linear import quantized_like
from tlk.optimize import optimize
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4

INT4 = Int4(group_size=32, symmetric=False)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def quantize(model, formats=lambda name: INT4):
    """`model` with its layers' linears rounded to nearest."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            format = formats(name)
            packed = format.quantize(module.weight.detach())
            model.set_submodule(name, quantized_like(module, format, packed))
    return model


def test_it_multiplies_by_the_dequantized_weight():
    linear = nn.Linear(64, 24)
    packed = INT4.quantize(linear.weight.detach())
    layer = quantized_like(linear, INT4, packed)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), F.linear(x, INT4.dequantize(packed), linear.bias))


def test_the_decoder_multiplies_by_the_same_codes():
    model = quantize(tiny("qwen2", **SIZES))
    ids = torch.randint(0, 99, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        optimized = optimize(model, strict=True)
        got = optimized(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert optimized._execution.forwards == {"tlk": 1}


def test_fused_codes_are_shared_and_not_copied():
    model = quantize(tiny("llama", **SIZES))
    before = copy.deepcopy(model.model.layers[1].self_attn.k_proj.packed())
    binding = bind(model)
    qkv = binding.decoder.layers[1].attention.qkv.packed()
    for name, tensor in model.model.layers[1].self_attn.k_proj.packed().items():
        assert torch.equal(tensor, before[name])
        whole = qkv[name]
        assert whole.data_ptr() <= tensor.data_ptr() < whole.data_ptr() + whole.nbytes
    assert len(binding.quantized) == 2 * 7 and not binding.stale()
    model.model.layers[0].mlp.up_proj.scale = model.model.layers[0].mlp.up_proj.scale.clone()
    assert binding.stale()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_weights_of_their_own(again):
    model = optimize(quantize(tiny("llama", **SIZES)), strict=True)
    ids = torch.randint(0, 99, (1, 5))
    other = again(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    mine = model.model.layers[0].mlp.up_proj.weight
    assert other.model.layers[0].mlp.up_proj.weight.data_ptr() != mine.data_ptr()


@pytest.mark.parametrize("format", [INT4, Fp8("channel")], ids=str)
def test_the_dtype_stays(format):
    model = quantize(tiny("llama", **SIZES), lambda name: format)
    with pytest.raises(ValueError, match=r"dtype must stay torch.float32 .* got torch.float16"):
        model.half()
    moved = model.model.layers[0].mlp.down_proj.to("cpu")
    assert moved.weight.dtype == format.empty(4, 64)["weight"].dtype
    assert moved.to("meta").scale.is_meta


def test_parts_of_one_matmul_share_a_format():
    model = quantize(
        tiny("llama", **SIZES), lambda name: Fp8("channel") if "q_proj" in name else INT4
    )
    with pytest.raises(UnsupportedError, match=r"q_proj.* and .*k_proj.* must share a format"):
        bind(model)
    mixed = quantize(tiny("llama", **SIZES), lambda name: Fp8() if "down" in name else INT4)
    assert optimize(mixed, strict=True)(torch.tensor([[1, 2]])).logits.isfinite().all()
