import pytest
import torch

from tlk.quant.codes import nearest, pack_nibbles, positive, unpack_nibbles


@pytest.mark.parametrize("group_size", [2, 32, 64, 128])
def test_nibbles_come_back(group_size):
    codes = torch.randint(16, (3, 128), generator=torch.Generator().manual_seed(0))
    packed = pack_nibbles(codes, group_size)
    assert packed.shape == (3, 64) and packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, group_size), codes.to(torch.uint8))


def test_the_first_half_of_a_group_lies_in_the_low_halves():
    assert pack_nibbles(torch.arange(8)[None], 4).tolist() == [[0x20, 0x31, 0x64, 0x75]]


def test_the_nearest_entry_and_ties():
    table = torch.tensor([-1.0, 0, 1, 4])
    values = torch.tensor([[-9, -0.5, 0.5, 0.51], [2.5, 2.6, 9, 0]])
    assert nearest(values, table).tolist() == [[0, 0, 1, 2], [2, 3, 3, 1]]


def test_zero_scales_become_small_ones():
    assert positive(torch.tensor([0.0, 2])).tolist() == [torch.finfo(torch.float32).eps, 2]
