import json

import pytest
import torch

from tests.quant.golden.load import cases
from tlk.quant.files.recognise import recognise
from tlk.quant.files.writers import WRITERS, Saved, choose, layer_tensors
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.table4 import TableFormat

SAME = [
    *(("compressed-tensors", "compressed_tensors", case) for case in (
        "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16",
        "NVFP4A16", "int4_channel", "int4_half",
    )),
    *(("awq", "autoawq", case) for case in ("group32", "group128")),
    *(("gptq", "gptqmodel", case) for case in ("sym_v1_4bit", "channel")),
    *(("bitsandbytes", "bitsandbytes", case) for case in (
        "nf4", "fp4", "nf4_nested", "fp4_nested", "nf4_float32", "nf4_128",
    )),
]  # fmt: skip


@pytest.mark.parametrize("layout, tool, name", SAME, ids=str)
def test_we_write_what_the_tools_wrote(layout, tool, name):
    case = cases(tool)[name]
    format, packed = recognise(case.config).read("a", case.tensors, case.shape)
    if case.reference.dtype == torch.float32 and tool == "gptqmodel":
        dtype = torch.float16
    else:
        dtype = case.reference.dtype
    ours = layer_tensors(layout, "a", format, packed, dtype)
    assert ours.keys() == {f"a.{suffix}" for suffix in case.tensors}
    for suffix, theirs in case.tensors.items():
        mine = ours[f"a.{suffix}"]
        if "quant_state" in suffix:
            assert json.loads(bytes(mine.tolist())) == json.loads(bytes(theirs.tolist()))
            continue
        assert mine.dtype == theirs.dtype and mine.numel() == theirs.numel(), suffix
        if suffix == "weight_global_scale":  # the reciprocal of a reciprocal
            torch.testing.assert_close(mine, theirs, rtol=1.2e-7, atol=0)
            continue
        assert torch.equal(mine.flatten().float(), theirs.flatten().float()), suffix
    config = WRITERS[layout].config(Saved({"a": format}, ["lm_head"], dtype))
    again = recognise(config)
    assert again.listed("lm_head") is False and again.listed("a") is not False
    back = again.read("a", {k.removeprefix("a."): t for k, t in ours.items()}, case.shape)
    assert back.format == format and back.packed.keys() == packed.keys()
    assert all(torch.equal(back.packed[k].float(), packed[k].float()) for k in packed)


def test_the_layout_that_most_loaders_read():
    shape = {"a": (64, 256), "b": (64, 256)}

    def chosen(*formats, shapes=shape, wanted=None):
        return choose(dict(zip("ab", formats, strict=False)), shapes, wanted)

    assert chosen(Int4()) == "compressed-tensors"
    assert chosen(Int4(symmetric=False)) == "awq"
    assert chosen(Int4(symmetric=False), shapes={"a": (40, 256)}) == "compressed-tensors"
    assert chosen(Int4(symmetric=False), Fp8()) == "compressed-tensors"
    assert chosen(TableFormat("nf4"), TableFormat("nf4")) == "bitsandbytes"
    assert chosen(Fp8("block"), wanted="fp8") == "fp8" and chosen(Int4(), wanted="ct")


def test_names_of_layers_in_16_bit_reach_every_config():
    kept = ["lm_head", "model.layers.1.mlp.up_proj"]
    for layout, format in (
        ("compressed-tensors", Int4()), ("awq", Int4(symmetric=False)), ("gptq", Int4()),
        ("bitsandbytes", TableFormat("nf4")), ("fp8", Fp8("block")),
    ):  # fmt: skip
        scheme = recognise(WRITERS[layout].config(Saved({"a": format}, kept, torch.bfloat16)))
        for module in kept:
            assert scheme.listed(module) is False, layout
        assert scheme.listed("model.layers.11.mlp.up_proj") is not False, layout
        assert scheme.listed("model.layers.1.mlp.up_proj_2") is not False or layout == "awq"
