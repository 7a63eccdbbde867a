import json

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as F

from tests.quant.golden.load import cases
from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.codes import unpack_nibbles
from tlk.quant.files import bitsandbytes
from tlk.quant.int8 import Int8Weight
from tlk.quant.table4 import TableFormat, dynamic_map

SCHEME = bitsandbytes.scheme({"llm_int8_skip_modules": ["vision", "re.ul"]})
FORMATS = [TableFormat(name, 64, nested) for name in ("nf4", "fp4") for nested in (False, True)]


def written(format, packed, dtype=torch.bfloat16):
    codes = unpack_nibbles(packed["weight"], format.blocksize)
    return bitsandbytes.write(format, packed, codes, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_ours_to_theirs(format, dtype):
    weight = torch.randn(48, 448, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = format.quantize(weight)
    ours = written(format, packed, dtype)
    data = ours.pop("weight")
    stats = {key.removeprefix("weight."): tensor for key, tensor in ours.items()}
    theirs = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu")
    weights = F.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(weights, format.dequantize(packed, dtype))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_both_quantize_alike(format):
    weight = torch.randn(48, 448, generator=torch.Generator().manual_seed(3))
    packed = format.quantize(weight)
    data, state = F.quantize_4bit(
        weight, blocksize=64, quant_type=format.name, compress_statistics=format.nested
    )
    ours = written(format, packed, torch.float32)
    same = (ours["weight"] == data).float().mean()
    assert same > (0.999 if format.name == "nf4" else 0.99)  # it knows FP4's values to four digits
    if format.nested:
        assert (ours["weight.absmax"] == state.absmax).float().mean() > 0.99
        torch.testing.assert_close(ours["weight.nested_absmax"], state.state2.absmax)
        assert torch.equal(ours["weight.nested_quant_map"], state.state2.code)
    else:
        assert torch.equal(ours["weight.absmax"], state.absmax)


def test_the_dynamic_map_is_theirs():
    assert torch.equal(dynamic_map(), F.create_dynamic_map())


def test_the_high_half_comes_first():
    row = torch.tensor([[1.0, -1, 0.25] + [0.0] * 61])
    for name, octets in (("nf4", [0xF0, 0xA7, 0x77]), ("fp4", [0x3B, 0x70, 0x00])):
        format = TableFormat(name)
        ours = written(format, format.quantize(row))
        assert ours["weight"][:3, 0].tolist() == octets
        assert ours["weight.absmax"].tolist() == [1]


def test_the_table_in_the_file_counts():
    case = cases("bitsandbytes")["nf4"]
    changed = case.tensors | {"weight.quant_map": case.tensors["weight.quant_map"] * 2}
    ours, other = (SCHEME.read("a", t, case.shape) for t in (case.tensors, changed))
    assert torch.equal(
        other.format.dequantize(other.packed), ours.format.dequantize(ours.packed) * 2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_stored_as_another_dtype(dtype):
    case = cases("bitsandbytes")["nf4"]
    stored = case.tensors["weight"].flatten().view(dtype)[:, None]
    layer = SCHEME.read("a", case.tensors | {"weight": stored}, case.shape)
    plain = SCHEME.read("a", case.tensors, case.shape)
    assert torch.equal(layer.packed["weight"], plain.packed["weight"])


def test_eight_bits_by_row():
    case = cases("bitsandbytes")["int8"]
    format, packed = SCHEME.read("a", case.tensors, case.shape)
    assert format == Int8Weight() and packed["scale"].shape == (32, 1)
    turing = case.tensors | {"weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(UnsupportedError, match=r"a\.weight_format is 2: tlk reads rows"):
        SCHEME.read("a", turing, case.shape)


def test_states_that_do_not_fit():
    case = cases("bitsandbytes")["nf4"]
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(case.tensors[key].tolist()))

    def read(changed):
        octets = torch.tensor(list(changed.encode()), dtype=torch.uint8)
        return SCHEME.read("a", case.tensors | {key: octets}, case.shape)

    with pytest.raises(CheckpointError, match=r"a\.weight\.quant_state.* is corrupt"):
        read("{")
    with pytest.raises(CheckpointError, match=r"is of a weight \[9, 9\], expected \[32, 128\]"):
        read(json.dumps(state | {"shape": [9, 9]}))
    with pytest.raises(UnsupportedError, match="a is stored as 'af4'"):
        read(json.dumps(state | {"quant_type": "af4"}))
    blocks = {"weight.absmax": torch.ones(2)}
    with pytest.raises(
        CheckpointError, match=r"a\.weight\.absmax must have shape \[64\], got \[2\]"
    ):
        SCHEME.read("a", case.tensors | blocks, case.shape)
    negative = case.tensors["weight.absmax"].clone()
    negative[3] = -1
    with pytest.raises(CheckpointError, match=r"a\.weight\.absmax holds values that are negative"):
        SCHEME.read("a", case.tensors | {"weight.absmax": negative}, case.shape)


def test_blocks_that_no_32_inputs_share():
    data, state = F.quantize_4bit(torch.randn(8, 48), blocksize=64, quant_type="nf4")
    tensors = {"weight": data} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    with pytest.raises(UnsupportedError, match="a has 48 inputs and blocks of 64 across its rows"):
        SCHEME.read("a", tensors, (8, 48))


def test_scales_that_were_fused_or_cut_are_not_one_run():
    format = TableFormat("nf4", 64, nested=True)
    packed = format.quantize(torch.randn(8, 64))
    late = packed | {"nested_start": packed["nested_start"] + 1}
    with pytest.raises(ValueError, match="must be runs over the whole weight"):
        written(format, late)
    offset = packed["nested_offset"].clone()
    offset[0] += 1
    with pytest.raises(ValueError, match="nested_offset must be the same for all rows"):
        written(format, packed | {"nested_offset": offset})


def test_layers_by_name():
    assert SCHEME.listed("lm_head") is False and SCHEME.listed("vision.layer") is False
    assert SCHEME.listed("model.vision") is False and SCHEME.listed("model.visionary") is True
    assert SCHEME.holds({"weight", "SCB"}) and not SCHEME.holds({"weight"})
