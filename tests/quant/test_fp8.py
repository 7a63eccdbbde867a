import torch

from tlk.quant.fp8 import Fp8


def test_one_scale_per_granularity():
    weight = torch.ones(256, 256)
    weight[0, 0], weight[200, 200] = 448, -44.8
    scales = {g: Fp8(g).quantize(weight)["scale"] for g in ("tensor", "channel", "block")}
    assert (scales["tensor"] == 1).all() and scales["tensor"].shape == (256, 1)
    assert scales["channel"][0] == 1 and scales["channel"].shape == (256, 1)
    torch.testing.assert_close(scales["channel"][200].item(), 0.1)
    torch.testing.assert_close(scales["block"], torch.tensor([[1, 1 / 448], [1 / 448, 0.1]]))


def test_partial_blocks_have_scales_of_their_own():
    weight = torch.randn(192, 320)
    packed = Fp8("block").quantize(weight)
    assert packed["scale"].shape == (2, 3)
    torch.testing.assert_close(Fp8("block").dequantize(packed), weight, rtol=0.07, atol=1e-4)
    assert packed["scale"][1, 2] == weight[128:, 256:].abs().max() / 448


def test_values_are_clamped_before_the_cast():
    packed = Fp8().encode(torch.tensor([[1e9, -1e9, 448, 17.0]]), torch.ones(1, 1))
    assert packed["weight"].float().tolist() == [[448, -448, 448, 16]]


def test_static_scales_are_room_for_the_calibrator():
    assert Fp8(static=True).empty(4, 8)["input_scale"].shape == (1, 1)
