import torch

from tlk.quant.int4 import Int4


def test_int4_by_hand():
    row = torch.tensor([[-8.0, 7, 0, 1] + [0.0] * 28])
    packed = Int4(32).encode(row, torch.ones(1, 1))
    # codes 0, 15, 8, 9 and eights: the first sixteen in the low halves
    assert packed["weight"].tolist() == [[0x80, 0x8F, 0x88, 0x89] + [0x88] * 12]
    assert Int4(32).quantize(row)["scale"].item() == torch.tensor(8 / 7.5).item()
    assert Int4(32).quantize(-row)["weight"][0, :2].tolist() == [0x8F, 0x81]  # +8 is cut to 7
    low = Int4(32, symmetric=False).quantize(row * 0.5 + 0.5)  # -3.5 to 4
    assert low["zero"].item() == 7 and low["scale"].item() == 0.5
