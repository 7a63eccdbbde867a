import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from tests.hf.test_quantized_checkpoint import CASES
from tlk.errors import UnsupportedError
from tlk.quant.files.write_compressed_tensors import FORMATS, config, in_dtype, tensors
from tlk.quant.fp4 import NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4


@pytest.mark.parametrize("name", [n for n, f in CASES.items() if isinstance(f, FORMATS)])
def test_their_parser_takes_the_config(name):
    fields = config({"a": CASES[name], "b": CASES["int4-32"]}, ["lm_head"], "fp8")
    parsed = QuantizationConfig.model_validate(fields)
    assert parsed.ignore == ["lm_head"] and parsed.kv_cache_scheme.num_bits == 8


def test_the_largest_group_comes_last():
    formats = {"a": Int4(), "b": Fp8(), "c": Int4(), "d": Fp8("block")}
    groups = config(formats, [], None)["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["b"], ["d"], ["Linear"]]
    assert config(formats, [], None)["format"] == "mixed-precision"


def test_scales_that_would_change_are_refused():
    scale = torch.tensor([[1.0, 1 + 2**-20]])
    with pytest.raises(
        UnsupportedError, match=r"m has scales in torch\.float32 that torch\.bfloat16"
    ):
        in_dtype("m", scale, torch.bfloat16)
    assert in_dtype("m", scale, torch.float32) is not None


def test_one_number_per_tensor():
    packed = NVFP4().quantize(torch.randn(4, 32))
    packed["global_scale"][2] *= 2
    with pytest.raises(UnsupportedError, match="m has rows of different global_scale"):
        tensors("m", NVFP4(), packed, torch.bfloat16)
    packed = Fp8("channel").quantize(torch.randn(4, 32).bfloat16())
    with pytest.raises(UnsupportedError, match="m has rows of different scale"):
        tensors("m", Fp8("tensor"), packed, torch.bfloat16)
