import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    initialize_module_for_quantization,
)

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.files import compressed_tensors, write_compressed_tensors
from tlk.quant.files._bits import pack_words
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight

FORMATS = [
    Int4(128), Int4(32), Int4(None), Int4(64, symmetric=False), Int8Weight(), Int8Weight(128),
    Int8Weight(32, symmetric=False), Int8(), Int8(static=True), Fp8("tensor"), Fp8("channel"),
    Fp8("block"), Fp8("channel", static=True), Fp8("channel", weight_only=True), MXFP4(), NVFP4(),
]  # fmt: skip


def config(format, **fields):
    return write_compressed_tensors.config({"a": format}, ["lm_head"], None) | fields


def group(format):
    return config(format)["config_groups"]["group_0"]


def their_module(format, weight):
    """A linear layer as compressed-tensors prepares it for our scheme, with our scales."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    scheme = QuantizationScheme.model_validate(group(format))
    initialize_module_for_quantization(linear, scheme, force_zero_point=False)
    return linear


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_ours_to_theirs_and_theirs_to_ours(format):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    packed = format.quantize(weight)
    if getattr(format, "static", False):
        packed["input_scale"] = torch.tensor([[0.25]])
    ours = write_compressed_tensors.tensors("a", format, packed, torch.float32)

    theirs = their_module(format, weight)
    for suffix in ("weight_scale", "weight_global_scale", "input_scale"):
        if suffix in ours:
            parameter = getattr(theirs, suffix)
            value = ours[suffix]
            if isinstance(format, MXFP4):  # before it is packed, the power of two itself
                value = torch.exp2(value.float() - 127)
            parameter.data = value.to(parameter.dtype).reshape(parameter.shape)
    if "zero" in packed:
        middle = 8 if isinstance(format, Int4) else 0
        zero = packed["zero"].to(torch.int16) - middle
        theirs.weight_zero_point.data = zero.to(theirs.weight_zero_point.dtype)
    compress_module(theirs)
    state = theirs.state_dict()
    assert state.keys() == ours.keys()
    for suffix, tensor in state.items():
        same = tensor.float() == ours[suffix].float().reshape(tensor.shape)
        if isinstance(format, NVFP4) and suffix == "weight_packed":
            assert same.float().mean() > 0.99  # it multiplies where we divide
        else:
            assert bool(same.all()), suffix

    scheme = compressed_tensors.scheme(config(format))
    found, read = scheme.read("a", state, (64, 256))
    assert found == format and read.keys() == packed.keys()
    for suffix, tensor in ours.items():  # and theirs of ours
        setattr(theirs, suffix, torch.nn.Parameter(tensor, requires_grad=False))
    decompress_module(theirs)
    exact = format.dequantize(packed, theirs.weight.dtype)
    tolerance = 2**-7 if isinstance(format, NVFP4) else 0  # it multiplies in bfloat16
    torch.testing.assert_close(theirs.weight.data, exact, rtol=tolerance, atol=0)


def test_codes_are_offset_binary():
    codes = torch.arange(8)[None]  # -8 to -1
    assert pack_words(codes, 4).item() == 0x76543210
    weight = torch.arange(-8.0, 0).repeat(4)[None]
    packed = Int4(32).encode(weight, torch.ones(1, 1))
    ours = write_compressed_tensors.tensors("a", Int4(32), packed, torch.float32)
    assert ours["weight_packed"].tolist() == [[0x76543210] * 4]
    eights = Int4(32).encode(torch.zeros(1, 32), torch.ones(1, 1))
    ours = write_compressed_tensors.tensors("a", Int4(32), eights, torch.float32)
    assert ours["weight_packed"].tolist() == [[0x88888888 - 2**32] * 4]
    eight = Int8Weight().encode(torch.tensor([[-128.0, -1, 0, 127]]), torch.ones(1, 1))
    ours = write_compressed_tensors.tensors("a", Int8Weight(), eight, torch.float32)
    assert ours["weight_packed"].item() & 0xFFFFFFFF == 0xFF807F00


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_that_do_not_fill_words_in_old_and_new_files(bits):
    codes = torch.randint(2**bits, (4, 64), generator=torch.Generator().manual_seed(0))
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -64 % per_word)).view(4, -1, per_word)
    old = (padded << (torch.arange(per_word) * bits)).sum(-1).to(torch.int32)
    fields = config(Int4(32))
    fields["config_groups"]["group_0"]["weights"] |= {"num_bits": bits}
    scheme = compressed_tensors.scheme(fields)
    rest = {"weight_scale": torch.ones(4, 2), "weight_shape": torch.tensor([4, 64])}
    for words in (old, pack_words(codes, bits)):
        format, packed = scheme.read("a", rest | {"weight_packed": words}, (4, 64))
        assert torch.equal(format.dequantize(packed), codes.float() - 2 ** (bits - 1))


def test_inputs_in_act_order():
    g_idx = torch.tensor([1, 0] * 32)
    weight = torch.randn(4, 64)
    order = g_idx.argsort(stable=True)
    sorted_ = Int4(32).quantize(weight[:, order])
    ours = write_compressed_tensors.tensors("a", Int4(32), sorted_, torch.float32)
    natural = torch.empty(4, 64, dtype=torch.uint8)
    from tlk.quant.codes import unpack_nibbles

    natural[:, order] = unpack_nibbles(sorted_["weight"], 32)
    ours |= {"weight_packed": pack_words(natural, 4), "weight_g_idx": g_idx.int()}
    format, packed = compressed_tensors.scheme(config(Int4(32))).read("a", ours, (4, 64))
    assert torch.equal(packed["weight"], sorted_["weight"]) and packed["perm"].tolist() == [
        order.tolist()
    ]
    x = torch.randn(3, 64)
    expected = x[:, order] @ format.dequantize(sorted_).T
    torch.testing.assert_close(format.linear(x, packed), expected)


def test_targets_and_ignored_layers():
    groups = {
        "a": group(Int4()) | {"targets": ["re:.*down_proj", "model.special"]},
        "b": group(Fp8()) | {"targets": ["Linear"]},
    }
    scheme = compressed_tensors.scheme(
        {"config_groups": groups, "format": "mixed-precision", "ignore": ["lm_head", "re:.*vision"]}
    )
    assert scheme.of("model.layers.0.mlp.down_proj").format == "pack-quantized"
    assert scheme.of("model.special").format == "pack-quantized"
    assert scheme.of("model.layers.0.mlp.up_proj").format == "float-quantized"
    assert scheme.listed("lm_head") is False and scheme.listed("model.vision.0") is False
    assert scheme.listed("vision") is False and scheme.listed("model.up") is True
    only = compressed_tensors.scheme(
        {"config_groups": {"a": groups["a"]}, "format": "pack-quantized"}
    )
    assert only.listed("model.up") is False
    with pytest.raises(
        CheckpointError, match=r"model\.up is quantized, and no config group has it"
    ):
        only.read("model.up", {}, (4, 32))


def test_formats_that_the_config_leaves_out():
    for format in (Int4(), Int8(), Fp8(), MXFP4(), NVFP4()):
        fields = config(format)
        own = fields["config_groups"]["group_0"].pop("format")
        fields["format"] = own
        assert compressed_tensors.scheme(fields).groups[0].format == own
    del fields["format"]
    assert compressed_tensors.scheme(fields).groups[0].format == "nvfp4-pack-quantized"


def test_the_shape_in_the_file_is_the_truth():
    ours = write_compressed_tensors.tensors(
        "a", Int4(32), Int4(32).quantize(torch.randn(4, 64)), torch.float32
    )
    scheme = compressed_tensors.scheme(config(Int4(32)))
    with pytest.raises(
        CheckpointError, match=r"a\.weight_shape says \[4, 64\], expected \[4, 96\]"
    ):
        scheme.read("a", ours, (4, 96))


def test_inputs_that_kernels_do_not_round_stay_in_16_bit():
    ours = write_compressed_tensors.tensors(
        "a", Int8(), Int8().quantize(torch.randn(4, 96)), torch.float32
    )
    fields = config(Int8())
    fields["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    assert compressed_tensors.scheme(fields).read("a", ours, (4, 96)).format == Int8Weight()
    fields = config(Fp8())
    fields["config_groups"]["group_0"]["input_activations"] = None
    ours = write_compressed_tensors.tensors(
        "a", Fp8(), Fp8().quantize(torch.randn(4, 96)), torch.float32
    )
    assert compressed_tensors.scheme(fields).read("a", ours, (4, 96)).format == Fp8(
        weight_only=True
    )


def test_strategies_and_blocks_that_have_no_kernel():
    fields = config(Fp8("block"))
    fields["config_groups"]["group_0"]["weights"]["block_structure"] = [64, 64]
    with pytest.raises(UnsupportedError, match=r"a: blocks of \[64, 64\]"):
        compressed_tensors.scheme(fields).read("a", {}, (4, 64))
    fields = config(Int4())
    fields["config_groups"]["group_0"]["weights"]["num_bits"] = 1
    with pytest.raises(UnsupportedError, match="a: 1 bit int, strategy group is no integer"):
        compressed_tensors.scheme(fields).read("a", {}, (4, 64))
