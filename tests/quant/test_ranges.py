import pytest
import torch

from tlk.kernels.act_quant import quantize_act
from tlk.quant.ranges import input_scale, rounded, scale_of

STORAGES = [torch.float8_e4m3fn, torch.int8]


def test_scales():
    amax = torch.tensor([0.0, 448.0, 2.0])
    assert scale_of(amax, torch.float8_e4m3fn).tolist() == pytest.approx([1.0, 1.0, 2 / 448])
    assert scale_of(amax, torch.int8).tolist() == pytest.approx([1.0, 448 / 127, 2 / 127])
    one = input_scale(amax, torch.int8, torch.bfloat16)
    assert one.shape == (1, 1) and one.dtype == torch.float32
    assert float(one) == float(torch.tensor(448 / 127).bfloat16())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("static", [True, False])
def test_rounded_is_what_the_kernel_makes(storage, static):
    x = torch.randn(6, 64) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0, 0.2])[:, None]
    scale = input_scale(torch.tensor([10.0]), storage, torch.float32) if static else None
    q, s = quantize_act(x, storage, scale=scale.view(1) if static else None)
    assert torch.allclose(rounded(x, storage, scale), q.float() * s, rtol=1e-6)
    assert (rounded(x, storage, scale) != x)[2].any()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_static_scale_clips(storage):
    y = rounded(
        torch.tensor([[100.0, -100.0, 1.0]]), storage, scale_of(torch.tensor(10.0), storage)
    )
    assert y.tolist()[0] == pytest.approx([10.0, -10.0, 1.0], rel=0.05)
