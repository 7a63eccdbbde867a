import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.quant.golden.load import cases
from tlk.errors import CheckpointError
from tlk.quant.files import compressed_tensors
from tlk.quant.files.floats import from_gpt_oss
from tlk.quant.fp4 import MXFP4


@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_of_gpt_oss(interleaved):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), generator=generator, dtype=torch.uint8)
    packed = from_gpt_oss(blocks, scales, interleaved=interleaved)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    if interleaved:  # gate, up, gate, up
        theirs = torch.cat([theirs[:, ::2], theirs[:, 1::2]], 1)
    for i in range(3):
        own = {name: tensor[i] for name, tensor in packed.items()}
        assert torch.equal(MXFP4().dequantize(own), theirs[i])


def test_a_byte_of_gpt_oss_by_hand():
    blocks = torch.full((1, 1, 1, 16), 0x71, dtype=torch.uint8)
    packed = from_gpt_oss(blocks, torch.tensor([[[128]]], dtype=torch.uint8), interleaved=False)
    own = {name: tensor[0] for name, tensor in packed.items()}
    assert MXFP4().dequantize(own)[0, :2].tolist() == [1.0, 12.0]


def test_experts_that_do_not_fit():
    scales = torch.zeros(3, 8, 2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"blocks must have shape \[3, 8, 2, 16\], got"):
        from_gpt_oss(torch.zeros(3, 8, 2, 8, dtype=torch.uint8), scales, interleaved=False)
    blocks = torch.zeros(3, 8, 2, 16, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="scales holds scales that are no number"):
        from_gpt_oss(blocks, scales + 255, interleaved=False)


def test_minus_zero_is_a_zero():
    case = cases("compressed_tensors")["MXFP4A16"]
    minus = case.tensors | {"weight_packed": torch.full_like(case.tensors["weight_packed"], 0x88)}
    format, packed = compressed_tensors.scheme(case.config).read("a", minus, case.shape)
    assert (format.dequantize(packed) == 0).all()
