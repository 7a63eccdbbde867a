import json
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

import tests.models.zoo as zoo
from tlk.errors import UnsupportedError
from tlk.hf import quantized_checkpoint
from tlk.hf.quantized_checkpoint import QuantizedModel, save_quantized
from tlk.hf.weights import load_decoder
from tlk.models.decoder import linears
from tlk.quant.config import METHODS
from tlk.quant.format import DENSE
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import TableFormat

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 96,
}  # fmt: skip
CASES = {
    **METHODS,
    "fp8-static": Fp8("tensor", static=True),
    "int8-static": Int8(static=True),
    "int4-32": Int4(32),
    "int4-channel": Int4(None),
    "int8-group": Int8Weight(32),
    "nf4-nested": TableFormat("nf4", 64, nested=True),
}
LAYOUTS = [(name, None) for name in CASES] + [
    ("int4", "gptq"), ("int4-channel", "gptq"), ("int4", "awq"), ("int4-awq", "ct"), ("fp8-block", "fp8"),
]  # fmt: skip
TRANSFORMERS = ("compressed-tensors", "bitsandbytes", "fp8")
"""Layouts that transformers loads with packages that run in these tests."""


@pytest.fixture(scope="module")
def original():
    return zoo.tiny("llama", **SIZES).to(torch.bfloat16)


def quantized(model, format, some=None):
    """`model` with its linear layers (those of `some` other formats by a part of their names) quantized."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    formats, layers = {}, {}
    for name, module in modules.items():
        found = [own for key, own in (some or {}).items() if key in name]
        own = None if name == "lm_head" else found[0] if found else format
        if own is not None:
            formats[name] = own
            layers[name] = own.quantize(module.weight.detach())
            if getattr(own, "static", False):
                layers[name]["input_scale"] = torch.tensor([[0.5]])
    gone = {f"{name}.weight" for name in formats}
    return QuantizedModel(
        fields=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        formats=formats,
        shapes={name: tuple(modules[name].weight.shape) for name in formats},
        layers=lambda: iter(layers.items()),
        dense=lambda: ((k, t) for k, t in model.state_dict().items() if k not in gone),
        linears=list(modules),
        dtype=torch.bfloat16,
    )


def weights(saved):
    """The dequantized weights by the checkpoint's keys."""
    return {
        f"{name}.weight": saved.formats[name].dequantize(packed) for name, packed in saved.layers()
    }


def fused(expected, decoder_names, decoder):
    parts = {"attention.qkv": "self_attn.{}_proj:q,k,v", "mlp.gate_up": "mlp.{}_proj:gate,up"}
    parts |= {"attention.out": "self_attn.{}_proj:o", "mlp.down": "mlp.{}_proj:down"}
    for name in decoder_names:
        layer, own = name.split(".", 2)[1], name.split(".", 2)[2]
        pattern, _, letters = parts[own].partition(":")
        keys = [f"model.layers.{layer}.{pattern.format(x)}.weight" for x in letters.split(",")]
        yield name, torch.cat([expected[key] for key in keys])


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=str)
def test_what_is_saved_is_loaded_again_to_the_same_bits(name, layout, original, tmp_path):
    saved, out = quantized(original, CASES[name]), tmp_path / "out"
    used = save_quantized(saved, out, format=layout, report={"method": name}, source=tmp_path)
    expected = weights(saved)
    loaded = load_decoder(str(out), progress=False)
    decoder = loaded.decoder
    assert loaded.dtype == torch.bfloat16 and loaded.quantization["quant_method"] == used
    names = [n for n, linear in linears(decoder).items() if linear.format != DENSE]
    assert len(names) == 8 and decoder.lm_head.format == DENSE
    for own, weight in fused(expected, names, decoder):
        linear = decoder.get_submodule(own)
        assert torch.equal(linear.format.dequantize(linear.packed()), weight), own
    assert json.loads((out / "tlk_quant.json").read_text()) == {"method": name, "format": used}
    if used in TRANSFORMERS:
        check_transformers(out, expected, original, name)


def check_transformers(out, expected, original, name):
    """transformers, on a CPU, makes the same weights of the files, rounded to the model's dtype."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    options = {}
    if (
        name == "int4-awq"
    ):  # it does not load zero points that are packed, unless it is to dequantize
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif config["quant_method"] == "fp8":  # else it keeps the codes where there is a GPU
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that dequantize overrides the file's config
        model = AutoModelForCausalLM.from_pretrained(
            out, device_map="cpu", dtype=torch.bfloat16, **options
        )
    if config["quant_method"] == "compressed-tensors":
        model(torch.tensor([[1, 2]]))  # the first forward decompresses
    for key, weight in expected.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        theirs = module.weight
        if config["quant_method"] == "bitsandbytes":
            theirs = dequantize_4bit(module.weight.data, module.weight.quant_state)
        if "fp4-nv" in name:  # compressed-tensors multiplies in bfloat16
            torch.testing.assert_close(theirs, weight.bfloat16(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(theirs.float(), weight.bfloat16().float()), key
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_layers_of_several_formats_are_groups(original, tmp_path):
    saved = quantized(original, Int4(), {"down_proj": Fp8(), "layers.0.self_attn": None})
    assert save_quantized(saved, tmp_path / "out") == "compressed-tensors"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    (first, last) = config["config_groups"].values()
    assert first["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert first["format"] == "float-quantized" and last["targets"] == ["Linear"]
    assert "lm_head" in config["ignore"] and "model.layers.0.self_attn.q_proj" in config["ignore"]
    decoder = load_decoder(str(tmp_path / "out"), progress=False).decoder
    assert decoder.layers[0].attention.qkv.format == DENSE
    assert decoder.layers[1].attention.qkv.format == Int4()
    assert decoder.layers[0].mlp.down.format == Fp8()
    check_transformers(tmp_path / "out", weights(saved), original, "mixed")
    with pytest.raises(UnsupportedError, match=r"awq cannot hold .*down_proj: .*not 4-bit"):
        save_quantized(saved, tmp_path / "other", format="awq")


def test_shards_have_an_index(original, tmp_path):
    saved = quantized(original, Int4())
    save_quantized(saved, tmp_path / "out", shard=60_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = {key: t for file in files for key, t in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    for file in files:
        assert sum(t.numel() * t.element_size() for t in load_file(file).values()) <= 60_000
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    assert size == sum(f.stat().st_size for f in files) - sum(
        8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files
    )  # no file holds what lies around a view
    load_decoder(str(tmp_path / "out"), progress=False)


def test_a_save_that_fails_leaves_nothing(original, tmp_path, monkeypatch):
    saved = quantized(original, Int4())
    layers = list(saved.layers())

    def broken():
        yield from layers[:3]
        raise OSError("disk full")

    object.__setattr__(saved, "layers", broken)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(saved, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    object.__setattr__(saved, "layers", lambda: iter([]))
    with pytest.raises(ValueError, match="layers must give all that formats names"):
        save_quantized(saved, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already"):
        save_quantized(saved, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_small_files_of_the_source_come_along(original, tmp_path):
    source = tmp_path / "source"
    original.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "hf_quant_config.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    save_quantized(quantized(original, Int4()), tmp_path / "out", source=source)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert "quantization_config" not in json.loads((source / "config.json").read_text())


def test_scales_that_float16_does_not_hold_go_to_compressed_tensors(original, tmp_path):
    saved = quantized(original, Int4(symmetric=False))
    tiny = {name: dict(packed) for name, packed in saved.layers()}
    name = "model.layers.1.mlp.down_proj"
    tiny[name]["scale"] = tiny[name]["scale"].clone()
    tiny[name]["scale"][0, 0] = 1e-9
    object.__setattr__(saved, "layers", lambda: iter(tiny.items()))
    with pytest.raises(
        UnsupportedError, match=rf"{name}\.scales has 1 scales that float16 does not hold"
    ):
        save_quantized(saved, tmp_path / "out", format="awq")
    assert save_quantized(saved, tmp_path / "out") == "compressed-tensors"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "format, layout, match",
    [
        (Int4(), "fp8", "fp8 cannot hold model.*Int4.* is not fp8 in blocks"),
        (Fp8(), "gptq", "gptq cannot hold .* is not 4-bit integers"),
        (Int4(symmetric=False), "gptq", "gptq cannot hold .*: it has zero points"),
        (Int4(), "bitsandbytes", "is not one of its tables"),
        (TableFormat("nf4"), "ct", "compressed-tensors cannot hold"),
    ],
)
def test_layouts_that_cannot_hold_a_format_say_so(format, layout, match, original, tmp_path):
    with pytest.raises(UnsupportedError, match=match):
        save_quantized(quantized(original, format), tmp_path / "out", format=layout)
    with pytest.raises(
        ValueError, match=r"format must be one of compressed-tensors, awq.*got 'zip'"
    ):
        save_quantized(quantized(original, format), tmp_path / "out", format="zip")


def test_permuted_inputs_are_not_saved(original, tmp_path):
    saved = quantized(original, Int4())
    layers = {n: p | {"perm": torch.arange(128)[None].int()} for n, p in saved.layers()}
    object.__setattr__(saved, "layers", lambda: iter(layers.items()))
    with pytest.raises(UnsupportedError, match="has perm of its inputs"):
        save_quantized(saved, tmp_path / "out")


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_scales_of_the_cache_are_saved_and_loaded(kv_dtype, original, tmp_path):
    saved = quantized(original, Int4())
    scales = {
        f"model.layers.{i}.self_attn": (torch.tensor([0.5, 1.5 + i]), torch.tensor([0.25, 2.0]))
        for i in (0, 1)
    }
    object.__setattr__(saved, "kv_scales", scales)
    object.__setattr__(saved, "kv_dtype", kv_dtype)
    save_quantized(saved, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == ("float" if kv_dtype == "fp8" else "int")
    loaded = load_decoder(str(tmp_path / "out"), progress=False)
    assert len(loaded.kv_scales) == 2
    for (k, v), (ours_k, ours_v) in zip(scales.values(), loaded.kv_scales, strict=True):
        assert torch.equal(k, ours_k) and torch.equal(v, ours_v)
    assert quantized_checkpoint.SHARD == 5_000_000_000


def test_layouts_without_a_field_for_the_cache_hold_scales_of_fp8(original, tmp_path):
    saved = quantized(original, Int4(symmetric=False))
    scales = {f"model.layers.{i}.self_attn": (torch.ones(2), torch.ones(2)) for i in (0, 1)}
    object.__setattr__(saved, "kv_scales", scales)
    object.__setattr__(saved, "kv_dtype", "int8")
    assert save_quantized(saved, tmp_path / "out") == "awq"
    decoder = load_decoder(str(tmp_path / "out"), progress=False).decoder
    for scale in (s for pair in decoder.cache_scales(torch.int8) for s in pair):
        torch.testing.assert_close(scale, torch.ones(2), rtol=2**-8, atol=0)
    assert decoder.cache_scales(torch.float8_e4m3fn)[0][0][0] < 0.3
