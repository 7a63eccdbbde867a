import pytest
import torch

from tlk.errors import CheckpointError
from tlk.quant.files import awq
from tlk.quant.files.awq import AWQ, NIBBLE_OF, ORDER


def test_columns_are_interleaved():
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32)  # code n for output n
    tensors = awq.write(codes, torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8))
    assert tensors["qweight"].tolist() == [[0x75316420]] * 32
    assert tensors["qzeros"].tolist() == [[0x88888888 - 2**32]]  # no off-by-one
    ramp = awq.write(codes, torch.ones(8, 1), torch.arange(8, dtype=torch.uint8)[:, None])
    assert ramp["qzeros"].tolist() == [[0x75316420]]  # zero points lie as the codes do
    assert [ORDER[i] for i in NIBBLE_OF] == list(range(8))
    layer = AWQ(32).read("a", tensors, (8, 32))
    assert torch.equal(layer.format.dequantize(layer.packed), codes.float() - 8)


def test_parts_of_names_stay_in_16_bit():
    scheme = awq.scheme({"bits": 4, "modules_to_not_convert": ["mlp.gate", "vision"]})
    assert scheme.listed("model.layers.0.mlp.gate_proj") is False  # substring
    assert scheme.listed("model.layers.0.mlp.up_proj") is True
    assert scheme.listed("lm_head") is False
    assert awq.scheme({"modules_to_not_convert": None}).skipped == ()


def test_fields_of_old_and_new_files():
    assert awq.scheme({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}).group_size == 64
    assert awq.scheme({"bits": 4, "group_size": 32, "format": "gemm"}).group_size == 32
    assert awq.scheme({"bits": 4, "group_size": -1}).group_size is None


def test_outputs_that_do_not_fill_a_word():
    with pytest.raises(CheckpointError, match="a has 12 outputs: AWQ packs eight"):
        AWQ(32).read("a", {}, (12, 32))
