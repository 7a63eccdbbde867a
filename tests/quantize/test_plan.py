import pytest

from tests.quantize.tiny import decoder, planned
from tlk.errors import UnsupportedError
from tlk.models.decoder import linears
from tlk.quant.config import QuantConfig
from tlk.quant.int4 import Int4
from tlk.quantize.plan import plan


def test_every_linear_layer_of_the_blocks():
    made, sources = decoder()
    found = planned(made, sources)
    assert list(found.targets) == [n for n in linears(made) if n != "lm_head"]
    target = found.targets["layers.1.attention.qkv"]
    names = tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")
    assert target.modules == names and target.heights == (64, 32, 32)
    assert target.format == Int4(32) and target.config.method == "int4-gptq"
    assert found.targets["layers.0.mlp.gate_up"].heights == (96, 96)
    assert found.layers == 2 and not found.kept


def test_the_head_if_it_is_not_ignored():
    made, sources = decoder()
    assert planned(made, sources, ignore=[]).targets["lm_head"].modules == ("lm_head",)
    tied, sources = decoder(tie_word_embeddings=True)
    assert "lm_head" not in planned(tied, sources, ignore=[]).targets


def test_per_layer_and_ignore():
    made, sources = decoder()
    found = planned(
        made, sources, ignore=["re:.*layers\\.0\\.self_attn"],
        per_layer={"re:.*down_proj": "fp8", "re:.*layers\\.1\\.mlp\\.(gate|up)": None},
    )  # fmt: skip
    methods = {name: t.config.method for name, t in found.targets.items() if name != "lm_head"}
    assert methods == {
        "layers.0.mlp.gate_up": "int4-gptq",
        "layers.0.mlp.down": "fp8",
        "layers.1.attention.qkv": "int4-gptq",
        "layers.1.attention.out": "int4-gptq",
        "layers.1.mlp.down": "fp8",
    }


def test_one_matmul_is_quantized_alike():
    made, sources = decoder()
    with pytest.raises(ValueError, match=r"q_proj.*are one matmul and must be quantized alike"):
        planned(made, sources, ignore=["model.layers.0.self_attn.k_proj"])


def test_a_layer_that_does_not_divide_is_kept_and_named():
    made, sources = decoder(intermediate_size=80)
    found = planned(made, sources)
    down = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert found.kept == dict.fromkeys(down, "80 inputs are not divisible by 32")
    assert not any(name.endswith("down") for name in found.targets)
    with pytest.raises(UnsupportedError, match=r"int4-gptq cannot hold: model.layers.0.mlp.down"):
        plan(made, sources, QuantConfig("int4-gptq", group_size=32), strict=True)


def test_blocks_of_outputs_do_not_cross_parts():
    made, sources = decoder()
    kept = planned(made, sources, "fp8-block").kept
    why = "64 outputs are not divisible by 128, and others follow in one matmul"
    assert kept["model.layers.0.self_attn.v_proj"] == why
    assert "model.layers.0.mlp.up_proj" in kept and "model.layers.0.mlp.down_proj" not in kept


def test_nothing_to_quantize_is_an_error():
    made, sources = decoder()
    with pytest.raises(UnsupportedError, match=r"would quantize nothing: .*64 inputs are not div"):
        planned(made, sources, group_size=128)
    with pytest.raises(UnsupportedError, match="would quantize nothing: all is ignored"):
        planned(made, sources, ignore=["Linear"])


def test_a_misspelt_name_is_an_error():
    made, sources = decoder()
    with pytest.raises(ValueError, match=r"got 'model\.layers\.0\.self_attn\.w_proj'"):
        planned(made, sources, ignore=["lm_head", "model.layers.0.self_attn.w_proj"])
