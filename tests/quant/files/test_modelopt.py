import pytest
import torch

from tests.quant.golden.load import cases
from tlk.errors import UnsupportedError
from tlk.quant.files import modelopt
from tlk.quant.fp4 import NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8


def read(name):
    case = cases("modelopt")[name]
    return case, modelopt.scheme(case.config).read("a", case.tensors, case.shape)


def test_each_algorithm_is_a_format():
    expected = {
        "FP8": Fp8("tensor", static=True),
        "FP8_PER_CHANNEL_PER_TOKEN": Fp8("channel"),
        "FP8_PB_WO_256": Fp8("block", weight_only=True),
        "NVFP4": NVFP4(),
        "W4A16_AWQ": Int4(128),
        "W8A8_SQ_PER_CHANNEL": Int8(static=True),
    }
    for name, format in expected.items():
        assert read(f"{name}.down_proj")[1].format == format


def test_integers_are_twos_complement_along_the_outputs():
    octets = torch.tensor([[0x8F, 0x70]], dtype=torch.uint8).repeat(1, 64)  # outputs 0 and 1
    scheme = modelopt.scheme({"quant_algo": "W4A16_AWQ", "group_size": 128})
    tensors = {"weight": octets, "weight_scale": torch.ones(2, 1)}
    format, packed = scheme.read("a", tensors, (2, 128))
    assert format.dequantize(packed)[:, :2].tolist() == [[-1, 0], [-8, 7]]


def test_inputs_are_scaled_before_the_weight():
    case, (format, packed) = read("W4A16_AWQ.down_proj")
    scale = case.tensors["pre_quant_scale"].float()
    assert torch.equal(packed["pre_scale"][0].float(), scale)
    x = torch.randn(3, 128)
    expected = (x * scale) @ format.dequantize(packed).T
    torch.testing.assert_close(format.linear(x, packed), expected)


def test_the_second_scale_multiplies():
    case, (_, packed) = read("NVFP4.down_proj")
    assert (packed["global_scale"] == case.tensors["weight_scale_2"]).all()


def test_layers_by_name_and_wildcard():
    scheme = modelopt.scheme(
        {
            "quantization": {
                "quant_algo": "FP8",
                "exclude_modules": ["lm_head", "model.layers.0.*", "router"],
            }
        }
    )
    assert scheme.listed("lm_head") is False and scheme.listed("model.layers.0.mlp.up") is False
    assert scheme.listed("model.layers.1.mlp.router") is False
    assert scheme.listed("model.layers.10.mlp.up") is True


def test_mixed_precision_by_layer():
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
    scheme = modelopt.scheme(
        {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    )
    assert (scheme.of("a"), scheme.of("b"), scheme.of("c")) == ("FP8", "NVFP4", None)
    assert scheme.listed("c") is False and scheme.named() == ["a", "b"]
    with pytest.raises(
        UnsupportedError, match="c is quantized, and quantized_layers does not say how"
    ):
        scheme.read("c", {}, (4, 4))
    with pytest.raises(UnsupportedError, match="quant_algo 'W4A8_MXFP4_FP8'"):
        modelopt.scheme(
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "W4A8_MXFP4_FP8"}},
            }
        )
