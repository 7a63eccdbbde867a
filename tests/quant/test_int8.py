import torch

from tlk.quant.int8 import Int8, Int8Weight


def test_int8_by_hand():
    row = torch.tensor([[-127.5, 127.5, 0, 2.5, 3.5, 1]])
    for format in (Int8(), Int8Weight()):
        packed = format.quantize(row)  # amax / 127.5, half to even; the top is cut
        assert packed["scale"].item() == 1
        assert packed["weight"].tolist() == [[-128, 127, 0, 2, 4, 1]]
    assert Int8().quantize(row)["weight"].tolist() == [[-128, 127, 0, 2, 4, 1]]


def test_zero_points_move_the_range():
    row = torch.tensor([[0.0, 1, 2, 255]])
    packed = Int8Weight(symmetric=False).quantize(row)
    assert packed["scale"].item() == 1 and packed["zero"].item() == -128
    assert packed["weight"].tolist() == [[-128, -127, -126, 127]]
    positive = torch.rand(2, 64) + 5  # 0 stays in the range
    error = Int8Weight(symmetric=False).dequantize(Int8Weight(symmetric=False).quantize(positive))
    torch.testing.assert_close(error, positive, rtol=0, atol=6 / 255)


def test_static_scales_are_room_for_the_calibrator():
    empty = Int8(static=True).empty(4, 8, dtype=torch.bfloat16)
    assert empty["input_scale"].shape == (1, 1) and empty["scale"].dtype == torch.float32
    assert "input_scale" not in Int8().empty(4, 8)
