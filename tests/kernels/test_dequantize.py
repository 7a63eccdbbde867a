import pytest
import torch

from tests.kernels.quantized import ALL, decode, options, quantized
from tlk.kernels.dequantize import dequantize

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
BF16 = torch.bfloat16
IDS = [f"{name} {group}" for name, group in ALL]


def size(group):
    return 192 if group <= 64 else 256


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_dequantize(name, group, dtype, device):
    w = quantized(name, 37, size(group), group, dtype, device)
    actual = dequantize(w.weight, w.scale, dtype=dtype, **options(w))
    assert torch.equal(actual, decode(w).to(dtype))


@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_the_reference_decodes_as_the_formats_say(name, group):
    w = quantized(name, 37, size(group), group, BF16)
    actual = dequantize(w.weight, w.scale, dtype=torch.float32, **options(w))
    assert torch.equal(actual, decode(w))


def test_bad_dtype_of_dequantize():
    w = quantized("int4", 32, 192, 64, BF16)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
        dequantize(w.weight, w.scale, dtype=torch.float64, **options(w))
