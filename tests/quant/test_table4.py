import pytest
import torch

from tlk.quant.table4 import FP4, NF4, TableFormat, dynamic_map, unnest


def test_nf4_and_fp4_by_hand():
    row = torch.tensor([[1.0, -1, 0.25] + [0.0] * 61])
    halves = NF4.quantize(row)["weight"][0]
    assert [halves[i].item() & 15 for i in range(4)] == [0xF, 0x0, 0xA, 0x7]
    assert halves[0].item() >> 4 == 0x7
    halves = FP4.quantize(row)["weight"][0]
    assert [halves[i].item() & 15 for i in range(4)] == [0x3, 0xB, 0x7, 0x0]


def test_bitsandbytes_map_is_the_one_it_documents():
    values = dynamic_map()
    assert len(values) == 256 and (values.diff() > 0).all()
    assert values[0].item() == pytest.approx(-0.9929687) and values[127] == 0 and values[-1] == 1
    assert values[128].item() == pytest.approx(5.5e-7)


def test_nested_scales_are_found_from_any_row():
    absmax = torch.rand(7, 96) + 0.1  # rows begin anywhere in runs of 256
    packed = TableFormat("nf4", 32, nested=True).quantize(
        absmax.repeat_interleave(32, 1) * torch.where(torch.arange(96 * 32) % 2 == 0, 1, -1)
    )
    assert packed["nested_start"].flatten().tolist() == [96 * i % 256 for i in range(7)]
    torch.testing.assert_close(unnest(packed), absmax, rtol=0.02, atol=0.01)
