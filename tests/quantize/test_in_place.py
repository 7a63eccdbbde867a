import json

import pytest
import torch

import tlk
from tests.models.zoo import tiny
from tlk.errors import UnsupportedError
from tlk.hf.quant_linear import QuantLinear
from tlk.models.decoder import kv_scales_of
from tlk.quant.config import QuantConfig
from tlk.quantize.in_place import quantize_in_place

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
INT4 = QuantConfig("int4", group_size=32)
IDS = torch.randint(0, 99, (8, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_layer_is_rounded_and_the_rest_stays(kind):
    model = tiny(kind, **SIZES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    same = tlk.optimize(model, quantization=INT4, strict=True)
    assert same is model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    for name, layer in layers.items():
        want = layer.format.quantize(before[f"{name}.weight"])
        assert all(torch.equal(layer.packed()[part], want[part]) for part in want)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    logits = model(IDS).logits
    assert model._execution.forwards["original"] == 0
    want = model._tlk_base.forward(model, input_ids=IDS).logits
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["fp8", "int8-weight", "nf4", "fp4", "fp4-mx", "fp4-nv"])
def test_methods_that_need_no_data(method):
    model = tlk.optimize(tiny("llama", **SIZES), quantization=method, strict=True)
    report = tlk.report(model)
    assert sum(report.quantized.values()) == 14 and not report.kept
    assert "14 linear layers stored as" in str(report)
    tokens = model.generate(
        IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert tokens.shape[1] == 28


@pytest.mark.parametrize("method", ["int8", "int4-awq", "int4-gptq"])
def test_methods_that_need_data(method):
    config = QuantConfig(method, group_size=None if method == "int8" else 32)
    with pytest.raises(ValueError, match=f"calibration must be .* for {method}"):
        tlk.optimize(tiny("llama", **SIZES), quantization=config)
    dense = tiny("llama", **SIZES)
    want = dense(IDS).logits
    model = tlk.optimize(tiny("llama", **SIZES), quantization=config, calibration=IDS, strict=True)
    error = (model(IDS).logits - want).norm() / want.norm()
    assert 0 < error < 0.3


def test_what_does_not_fit_stays_and_is_reported():
    sizes = SIZES | {"intermediate_size": 48}  # no multiple of 32
    model = tlk.optimize(tiny("llama", **sizes), quantization=INT4)
    kept = tlk.report(model).kept
    assert set(kept) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "not divisible by 32" in next(iter(kept.values()))
    with pytest.raises(UnsupportedError, match=r"down_proj.*not divisible"):
        tlk.optimize(tiny("llama", **sizes), quantization=INT4, strict=True)


def test_restore_reads_the_checkpoint_again(tmp_path):
    model = tiny("llama", **SIZES)
    model.save_pretrained(tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loaded = type(model).from_pretrained(tmp_path)
    same = tlk.restore(tlk.optimize(loaded, quantization="fp8"))
    assert same is loaded and type(loaded) is type(model)
    assert all(torch.equal(p, before[n]) for n, p in loaded.named_parameters())
    memory = tlk.optimize(tiny("llama", **SIZES), quantization="fp8")
    with pytest.raises(UnsupportedError, match="restore reads the 16-bit weights"):
        tlk.restore(memory)
    assert isinstance(memory.model.layers[0].mlp.up_proj, QuantLinear)


def test_a_model_is_quantized_once_and_only_if_tlk_runs_it():
    model = tlk.optimize(tiny("llama", **SIZES), quantization="fp8")
    with pytest.raises(ValueError, match="quantized already"):
        tlk.optimize(model, quantization="fp8")
    with pytest.raises(UnsupportedError, match="no family"):
        quantize_in_place(torch.nn.Linear(4, 4), "fp8")
    with pytest.raises(ValueError, match="method must be one of"):
        tlk.optimize(tiny("llama", **SIZES), quantization="int3")
    with pytest.raises(ValueError, match="calibration needs a quantization"):
        tlk.optimize(tiny("llama", **SIZES), calibration=["text"])


@pytest.mark.parametrize("method", ["int4", "fp8", "nf4", "fp4-mx"])
def test_what_is_saved_is_loaded_with_the_same_codes(method, tmp_path):
    model = tlk.optimize(tiny("llama", **SIZES), quantization=method if method != "int4" else INT4)
    want = model(IDS).logits
    folder = tmp_path / "new"
    model.save_pretrained(folder)
    again = tlk.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(again, tlk.LlamaForCausalLM) and again._execution.refused is None
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert sum(tlk.report(again).quantized.values()) == 14
    any_class = tlk.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(any_class).__name__ == "LlamaForCausalLM"
    with pytest.raises(UnsupportedError, match="is quantized itself"):
        tlk.restore(again)
    told = json.loads((folder / "tlk_quant.json").read_text())
    assert told["method"] == method and told["calibration"] is None and len(told["layers"]) == 14
    assert told["layers"]["model.layers.1.mlp.up_proj"]["weight_error"] > 0
    assert set(told["versions"]) == {"tlk", "torch", "triton", "transformers"} and told["format"]
    with pytest.raises(FileExistsError, match="there already"):
        model.save_pretrained(folder)
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_scales_of_the_cache_are_calibrated_kept_saved_and_loaded(name, tmp_path):
    """By optimize and by LLM, and from a checkpoint for a cache of either dtype."""
    config = QuantConfig("fp8", calibration=IDS)
    model = tlk.optimize(tiny("llama", **SIZES), quantization=config, kv_cache_dtype=name)
    scales = kv_scales_of(model._execution.binding.decoder)
    assert len(scales) == 2 and all(
        (s > 0).all() and s.shape == (2,) for kv in scales.values() for s in kv
    )
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/tlk_quant.json").read_text())["kv_cache_dtype"] == name
    again = tlk.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for kind, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        tlk.optimize(again, kv_cache_dtype=kind)  # UncalibratedWarning would be an error
        tokens = again(IDS[:1], use_cache=True).past_key_values.kv.layers[0]
        assert tokens.k.dtype == dtype
        for i, pair in enumerate(again._execution.binding.decoder.cache_scales(dtype)):
            for found, here in zip(scales[i], pair, strict=True):
                factor = 1 if kind == name else 448 / 127 if name == "fp8" else 127 / 448
                torch.testing.assert_close(here, found * factor, rtol=1e-5, atol=0)
    options = {"max_model_len": 32, "max_num_seqs": 2, "kv_cache_memory": 2**20}
    tiny("llama", **SIZES).save_pretrained(tmp_path / "in")
    llm = tlk.LLM(
        str(tmp_path / "in"), quantization=config, kv_cache_dtype=name, dtype="float32", **options
    )
    mine = kv_scales_of(llm.engine._runner.decoder)
    torch.testing.assert_close(mine, scales, rtol=5e-3, atol=0)  # by kernels on a GPU
    shared = tlk.LLM(again, kv_cache_dtype=name, **options)
    assert len(kv_scales_of(shared.engine._runner.decoder)) == 2
