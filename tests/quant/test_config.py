import json

import pytest

from tlk.quant.config import METHODS, QuantConfig, config_of, format_of
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import TableFormat


@pytest.mark.parametrize(
    "config, format",
    [
        (QuantConfig("fp8"), Fp8("channel")),
        (QuantConfig("fp8-tensor"), Fp8("tensor")),
        (QuantConfig("fp8-tensor", static=True), Fp8("tensor", static=True)),
        (QuantConfig("fp8-block"), Fp8("block")),
        (QuantConfig("int8"), Int8()),
        (QuantConfig("int8-weight"), Int8Weight(None)),
        (QuantConfig("int8-weight", group_size=128, symmetric=False), Int8Weight(128, False)),
        (QuantConfig("int4"), Int4(128)),
        (QuantConfig("int4", group_size=32, symmetric=False), Int4(32, symmetric=False)),
        (QuantConfig("int4-awq"), Int4(128, symmetric=False)),
        (QuantConfig("int4-awq", symmetric=True), Int4(128)),
        (QuantConfig("int4-gptq", group_size=64), Int4(64)),
        (QuantConfig("nf4"), TableFormat("nf4", 64)),
        (QuantConfig("fp4", double_quant=True), TableFormat("fp4", 64, nested=True)),
        (QuantConfig("fp8", static=True), Fp8("channel", static=True)),
        (QuantConfig("int8", static=True), Int8(static=True)),
        (QuantConfig("nf4", group_size=128), TableFormat("nf4", 128)),
        (QuantConfig("fp4-mx"), MXFP4()),
        (QuantConfig("fp4-nv", symmetric=True), NVFP4()),
    ],
)
def test_a_method_is_a_format(config, format):
    assert format_of(config, "model.layers.0.mlp.down_proj") == format
    assert json.loads(json.dumps(config.to_dict()))["method"] == config.method


def test_every_method_of_the_readme_is_there():
    assert list(METHODS) == [
        "fp8", "fp8-tensor", "fp8-block", "int8", "int8-weight", "int4", "int4-awq", "int4-gptq", "nf4", "fp4",
        "fp4-mx", "fp4-nv",
    ]  # fmt: skip


def test_names_choose_layers():
    config = QuantConfig(
        "int4",
        ignore=["lm_head", "Router", "re:.*vision"],
        per_layer={
            "re:.*down_proj": "fp8",
            "model.layers.0.mlp.up_proj": QuantConfig("nf4", group_size=128),
            "re:.*up": None,
        },
    )
    assert format_of(config, "lm_head") is None
    assert format_of(config, "model.lm_head") == Int4()  # a name is whole, not a part
    assert format_of(config, "model.mlp.gate", "Router") is None
    assert format_of(config, "model.vision.down_proj") is None  # ignore comes first
    assert format_of(config, "model.layers.1.mlp.down_proj") == Fp8()
    assert format_of(config, "model.layers.0.mlp.up_proj") == TableFormat("nf4", 128)
    assert format_of(config, "model.layers.1.mlp.up_proj") is None
    assert config_of(config, "model.layers.1.mlp.down_proj").method == "fp8"
    assert config_of(config, "model.layers.1.self_attn.q_proj") is config
    assert (
        format_of(QuantConfig("int4", ignore=["re:layers"]), "model.layers.0") == Int4()
    )  # anchored


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"method": "int5"}, "method must be one of fp8, fp8-tensor, .*got 'int5'"),
        ({"method": "int4", "group_size": 48}, "group_size must be None or one of.*got 48"),
        ({"method": "fp8", "group_size": 128}, "group_size must be None for fp8, got 128"),
        ({"method": "fp4-mx", "symmetric": False}, "symmetric must be None or True for fp4-mx"),
        ({"method": "int4", "double_quant": True}, "double_quant is of nf4 and fp4, not of int4"),
        ({"method": "int4", "static": True}, "static is of int8 and fp8, not of int4"),
        ({"method": "fp8-block", "static": True}, "static is of int8 and fp8, not of fp8-block"),
        ({"method": "int4", "ignore": "lm_head"}, "ignore must be a sequence of names"),
        ({"method": "int4", "ignore": ["re:("]}, r"'re:\(' is no regular expression"),
        ({"method": "int4", "per_layer": {"re:[": "fp8"}}, r"'re:\[' is no regular expression"),
        ({"method": "int4", "per_layer": {"a": "x"}}, r"per_layer\['a'\] must be a QuantConfig"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        QuantConfig(**arguments)
