import pytest
import torch
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

from tlk.errors import CheckpointError
from tlk.quant.files import deepseek
from tlk.quant.fp8 import Fp8

BLOCKS = deepseek.scheme(
    {"weight_block_size": [128, 128], "modules_to_not_convert": ["mlp.gate", "lm_head"]}
)


def stored(n, k, suffix="weight_scale_inv"):
    packed = Fp8("block").quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    return {"weight": packed["weight"], suffix: packed["scale"]}


@pytest.mark.parametrize("n, k", [(256, 256), (576, 192), (192, 320), (64, 128)])
def test_blocks_multiply_and_the_last_may_be_partial(n, k):
    tensors = stored(n, k)
    format, packed = BLOCKS.read("a", tensors, (n, k))
    named = {f"m.{key}": tensor for key, tensor in tensors.items()}
    theirs = FP8BlockDequantizer(targets=["re:.*"], dtype=torch.float32).process(named)["m.weight"]
    assert format == Fp8("block") and torch.equal(format.dequantize(packed), theirs)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_names_of_the_scale(suffix):
    assert BLOCKS.holds({"weight", suffix})
    layer = BLOCKS.read("a", stored(128, 256, suffix), (128, 256))
    assert torch.equal(layer.packed["scale"], stored(128, 256)["weight_scale_inv"])


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_powers_of_two_as_scales(dtype):
    exponents = torch.tensor([[127, 128], [120, 1]], dtype=torch.uint8)
    tensors = stored(256, 256) | {"weight_scale_inv": exponents.view(dtype)}
    layer = BLOCKS.read("a", tensors, (256, 256))
    assert layer.packed["scale"].tolist() == [[1, 2], [2**-7, 2**-126]]
    tensors["weight_scale_inv"] = torch.full((2, 2), 255, dtype=torch.uint8)
    with pytest.raises(
        CheckpointError, match=r"a\.weight_scale_inv holds scales that are no number"
    ):
        BLOCKS.read("a", tensors, (256, 256))


def test_one_scale_per_tensor_static_or_not():
    weight = torch.randn(8, 16).to(torch.float8_e4m3fn)
    tensors = {
        "weight": weight,
        "weight_scale": torch.tensor(0.5),
        "input_scale": torch.tensor(2.0),
    }
    for scheme, static in (("static", True), ("dynamic", False)):
        format, packed = deepseek.scheme({"activation_scheme": scheme}).read("a", tensors, (8, 16))
        assert format == Fp8("tensor", static=static)
        assert torch.equal(format.dequantize(packed), weight.float() * 0.5)
        assert ("input_scale" in packed) == static
    transformers = {"weight": weight, "weight_scale_inv": torch.tensor([0.5])}
    layer = deepseek.scheme({}).read("a", transformers, (8, 16))
    assert (layer.packed["scale"] == 0.5).all()


def test_fbgemm_has_a_scale_per_output():
    weight, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.rand(8, 1) + 0.1
    tensors = {"weight": weight, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}
    scheme = deepseek.fbgemm_scheme({"modules_to_not_convert": ["model.layers.0"]})
    format, packed = scheme.read("a", tensors, (8, 16))
    assert format == Fp8("channel") and torch.equal(
        format.dequantize(packed), weight.float() * scale
    )
    assert (
        scheme.listed("model.layers.0.mlp") is False
        and scheme.listed("model.layers.01.mlp") is True
    )


def test_layers_by_name():
    assert BLOCKS.listed("model.layers.0.mlp.gate") is False
    assert BLOCKS.listed("model.layers.0.mlp.gate_proj") is True
    other = deepseek.scheme({"ignored_layers": ["model.layers.0.mlp"]})
    assert other.listed("model.layers.0.mlp.up") is False
    assert other.listed("lm_head") is False
