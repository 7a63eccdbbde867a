import pytest
import torch

from tlk.quant.fp4 import MXFP4, NVFP4, e2m1_codes, e2m1_values


def test_e2m1_by_hand():
    values = torch.tensor([0.5, -6, 0, 1.5, -0.0, 3])
    assert e2m1_codes(values).tolist() == [1, 15, 0, 3, 8, 5]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert e2m1_values(e2m1_codes(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e2m1_values(e2m1_codes(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert e2m1_values(e2m1_codes(torch.tensor([1e9, -1e9]))).tolist() == [6, -6]


def test_mxfp4_exponents_follow_amax():
    amax = torch.tensor([1.74, 1.75, 6, 7, 0, 2.0**-140, 2.0**127])
    weight = torch.zeros(7, 32)
    weight[:, 3] = amax
    assert MXFP4().scales(weight).flatten().tolist() == [125, 126, 127, 128, 127, 0, 252]
    packed = {"weight": torch.full((1, 16), 0x11, dtype=torch.uint8), "scale": torch.tensor([[0]])}
    packed["scale"] = packed["scale"].to(torch.uint8)
    assert MXFP4().dequantize(packed)[0, 0].item() == 2.0**-128


def test_nvfp4_layers_share_a_global_scale_that_survives_its_file():
    format = NVFP4()
    for amax in torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 10:
        scale = format.global_scale(amax)
        assert 1 / (1 / scale) == scale
    assert (1 / format.global_scale(torch.tensor(0.0625))).item() == 43008
    torch.manual_seed(0)
    small, large = torch.randn(4, 64), torch.randn(4, 64)
    shared = format.global_scale(large.abs().max())
    packed = format.quantize(small, global_scale=shared)
    assert (packed["global_scale"] == shared).all()
    alone = format.quantize(small)["global_scale"]
    ratio = (large.abs().max() / small.abs().max()).item()
    assert (shared / alone[0]).item() == pytest.approx(ratio)
    torch.testing.assert_close(format.dequantize(packed), small, rtol=0.3, atol=0.3)
