import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers import auto

import tests.models.zoo as zoo
import tlk
from tests.hf.test_quantized_checkpoint import SIZES, quantized, weights
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.quant_linear import QuantLinear
from tlk.hf.quantized_checkpoint import save_quantized
from tlk.quant.format import DENSE
from tlk.quant.fp4 import NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4

FILE = "model.safetensors"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
CASES = {
    "gptq": (Int4(), "gptq"),
    "awq": (Int4(32, symmetric=False), "awq"),
    "modelopt": (Fp8("tensor", static=True), "ct"),
    "modelopt-nvfp4": (NVFP4(), "ct"),
    "compressed-tensors": (Int4(32), "ct"),
    "fp8": (Fp8("block"), "fp8"),
}


@pytest.fixture(scope="module")
def original():
    return zoo.tiny("llama", **SIZES).to(torch.bfloat16)


@pytest.fixture
def registered():
    with tlk.register_quantizers("gptq", "awq", "modelopt", "compressed-tensors", "fp8"):
        yield


def rewrite(folder, change, fields=None):
    """Let `change` work on the file's tensors; fields: of quantization_config instead of its own."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    if fields is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = fields
        (folder / "config.json").write_text(json.dumps(config))


def as_modelopt(tensors):
    """compressed-tensors' NVFP4 names and global scale as ModelOpt has them; its FP8 is the same."""
    for key in [key for key in tensors if key.endswith("weight_packed")]:
        tensors[key.replace("weight_packed", "weight")] = tensors.pop(key)
        factor = tensors.pop(key.replace("weight_packed", "weight_global_scale"))
        tensors[key.replace("weight_packed", "weight_scale_2")] = 1 / factor.reshape(())


def checkpoint(name, model, folder):
    """What is saved, and where."""
    format, layout = CASES[name]
    saved = quantized(model, format)
    save_quantized(saved, folder, format=layout)
    if "modelopt" in name:
        own = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        own["quant_algo"] = "NVFP4" if "nvfp4" in name else "FP8"
        rewrite(folder, as_modelopt, own)
    return saved


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_and_tlk_runs_it(name, original, tmp_path):
    saved, out = checkpoint(name, original, tmp_path / "in"), tmp_path / "out"
    model, info = load(tmp_path / "in", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original.save_pretrained(tmp_path / "dense")
    expected, dense = weights(saved), load(tmp_path / "dense")
    for key, weight in expected.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        assert type(module) is QuantLinear and module.dtype == torch.bfloat16
        torch.testing.assert_close(
            module.format.dequantize(module.packed()), weight, rtol=1e-6, atol=0
        )
    dense.load_state_dict(original.state_dict() | expected)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
    optimized = tlk.optimize(model, strict=True)
    again = tlk.AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    assert optimized is model and torch.equal(model(IDS).logits, again(IDS).logits)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    with pytest.raises(UnsupportedError, match="is quantized itself"):
        tlk.restore(model)
    assert tlk.report(model).refused is None and model.model.layers[0].mlp.down_proj.format != DENSE
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), again.generate(IDS, **options))
    model.save_pretrained(out)
    assert torch.equal(tlk.AutoModelForCausalLM.from_pretrained(out)(IDS).logits, model(IDS).logits)


def test_nothing_is_registered_unasked_and_all_is_given_back(original, tmp_path):
    tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [dict(table) for table in tables]
    assert all(not c.__module__.startswith("tlk") for table in before for c in table.values())
    assert "modelopt" not in before[0]
    with tlk.register_quantizers():
        changed = {
            n for t, b in zip(tables, before, strict=True) for n in t if t[n] is not b.get(n)
        }
        assert changed == {"gptq", "awq", "modelopt"}
        with tlk.register_quantizers("fp8", "gptq"):
            assert auto.AUTO_QUANTIZER_MAPPING["fp8"] is auto.AUTO_QUANTIZER_MAPPING["awq"]
        assert auto.AUTO_QUANTIZER_MAPPING["fp8"] is before[0]["fp8"]
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is auto.AUTO_QUANTIZER_MAPPING["awq"]
    assert [dict(table) for table in tables] == before
    kept = tlk.register_quantizers("gptq")
    kept.undo()
    kept.undo()
    assert [dict(table) for table in tables] == before
    with pytest.raises(ValueError, match=r"methods must be of gptq, awq, .* got 'bitsandbytes'"):
        tlk.register_quantizers("bitsandbytes")
    checkpoint("gptq", original, tmp_path / "in")
    with pytest.raises(ImportError, match="optimum"):  # it is transformers' again
        load(tmp_path / "in")


@pytest.mark.usefixtures("registered")
def test_saving_before_optimizing_says_what_to_do(original, tmp_path):
    checkpoint("gptq", original, tmp_path / "in")
    model = load(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"call tlk\.optimize\(model\) first"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("registered")
def test_old_modelopt_files_say_more_than_the_config(original, tmp_path):
    tmp_path = tmp_path / "in"
    checkpoint("modelopt", original, tmp_path)
    own = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    rewrite(tmp_path, lambda t: None, {"quant_method": "modelopt"})
    assert load(tmp_path).model.layers[1].mlp.up_proj.format == Fp8("tensor", static=True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("k, v", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
def test_scales_of_the_cache_serve_optimize(k, v, original, tmp_path):
    checkpoint("modelopt", original, tmp_path / "in")
    scales = {
        f"model.layers.{i}.self_attn.{x}": torch.tensor(i + 0.5) for i in (0, 1) for x in (k, v)
    }
    rewrite(tmp_path / "in", lambda t: t.update(scales))
    model, info = load(tmp_path / "in", output_loading_info=True)
    assert not info["unexpected_keys"]
    model = tlk.optimize(model, kv_cache_dtype="fp8", strict=True)
    found = model._execution.binding.decoder.cache_scales(torch.float8_e4m3fn)
    assert [(float(a[0]), float(b[1])) for a, b in found] == [(0.5, 0.5), (1.5, 1.5)]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_one_device(device_map, original, tmp_path):
    checkpoint("awq", original, tmp_path / "in")
    model = load(tmp_path / "in", device_map=device_map)
    assert model.model.layers[0].mlp.down_proj.weight.device == model.device
    for several in ("balanced", {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(UnsupportedError, match="tlk runs a model on one device"):
            load(tmp_path / "in", device_map=several)


BROKEN = {
    "a tensor is missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.qzeros"), {},
        r"model\.layers\.1\.mlp\.up_proj lacks its tensor qzeros"),
    "of another shape": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.ones(1, 3).half()}), {},
        r"model\.layers\.0\.mlp\.up_proj\.scales must have shape \[any, 256\], got \[1, 3\]"),
    "scales are zero": (
        lambda t: t["model.layers.0.mlp.up_proj.scales"].zero_(), {},
        r"up_proj\.scales holds 256 scales that are zero"),
    "kept in 16 bit by the config": (
        lambda t: None, {"dynamic": {"-:model.layers.1.mlp.down_proj": {}}},
        r"config says that model\.layers\.1\.mlp\.down_proj stays in 16 bit, but the files hold"),
    "no linear layer": (
        lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.qweight": torch.ones(1).int()}), {},
        r"experts\.0\.up_proj is quantized with gptq, and is no linear layer of LlamaForCausalLM"),
    "unknown bits": (lambda t: None, {"bits": 5}, "gptq with bits 5"),
}  # fmt: skip


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(what, original, tmp_path):
    checkpoint("gptq", original, tmp_path / "in")
    change, fields, match = BROKEN[what]
    own = json.loads((tmp_path / "in/config.json").read_text())["quantization_config"]
    rewrite(tmp_path / "in", change, own | fields)
    with pytest.raises((CheckpointError, UnsupportedError), match=match):
        load(tmp_path / "in")


@pytest.mark.usefixtures("registered")
def test_modules_of_the_config_and_layers_of_the_files_must_agree(original, tmp_path):
    original.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: None, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantized with gptq, but no layer of it is"):
        load(tmp_path)
    checkpoint("compressed-tensors", original, tmp_path / "in")
    own = json.loads((tmp_path / "in/config.json").read_text())["quantization_config"]
    own["config_groups"]["group_0"]["targets"].insert(0, "model.layers.7.mlp.up_proj")
    rewrite(tmp_path / "in", lambda t: None, own)
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.7\.mlp\.up_proj"):
        load(tmp_path / "in")


@pytest.mark.usefixtures("registered")
def test_a_config_of_another_class_is_refused_by_transformers(original, tmp_path):
    checkpoint("gptq", original, tmp_path / "in")
    with pytest.raises(ValueError, match="StoredConfig but you are passing a GPTQConfig"):
        load(tmp_path / "in", quantization_config=GPTQConfig(bits=4))


@pytest.mark.usefixtures("registered")
def test_files_that_are_no_safetensors(original, tmp_path):
    tmp_path = tmp_path / "in"
    checkpoint("gptq", original, tmp_path)
    torch.save(load_file(tmp_path / FILE), tmp_path / "pytorch_model.bin")
    (tmp_path / FILE).unlink()
    with pytest.raises(UnsupportedError, match=r"safetensors files, got pytorch_model\.bin"):
        load(tmp_path)
