import pytest
import torch

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.files.layer import Tensors, finer_groups, integers
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8Weight


def test_what_is_wrong_with_a_tensor():
    t = Tensors("m", {"a": torch.zeros(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(1)})
    assert t.take("a", torch.float32, 2, None).shape == (2, 3)
    with pytest.raises(CheckpointError, match="m lacks its tensor d; it has a, b, c"):
        t.take("d", torch.float32, 1)
    with pytest.raises(CheckpointError, match=r"m\.a must be int8 or uint8, got torch\.float32"):
        t.take("a", (torch.int8, torch.uint8), 2, 3)
    for shape in ((2, 4), (6,), (2, 3, 1)):
        with pytest.raises(CheckpointError, match=r"m\.a must have shape .* got \[2, 3\]"):
            t.take("a", torch.float32, *shape)
    assert t.take("b", torch.float32, 1, 1).shape == (1, 1)  # one number, in any shape
    with pytest.raises(CheckpointError, match="m has tensors that are not of its format: c"):
        t.done()
    t.ignore("c")
    t.done()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_codes_widen(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(4, 2, generator=generator) + 0.1
    zero = None
    if not symmetric:
        zero = torch.randint(2**bits, (4, 2), generator=generator, dtype=torch.uint8)
    format, packed = integers("m", codes, scale, zero, bits, None)
    assert format == (Int4(32, symmetric) if bits <= 4 else Int8Weight(32, symmetric))
    middle = 2.0 ** (bits - 1) if symmetric else zero.float().repeat_interleave(32, 1)
    expected = (codes.float() - middle) * scale.repeat_interleave(32, 1)
    assert torch.equal(format.dequantize(packed), expected)


def test_large_groups_are_several():
    scale = torch.rand(4, 2)
    for k, groups in ((512, 4), (1024, 8), (192, 6), (128, 2)):
        finer, _ = finer_groups("m", k, scale, None)
        assert finer.shape == (4, groups)
    assert finer_groups("m", 100, scale[:, :1], None)[0].shape == (4, 1)
    for k in (32, 33):
        with pytest.raises(UnsupportedError, match="m has groups of 16"):
            finer_groups("m", k, scale, None)
