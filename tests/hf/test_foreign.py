import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tests.models.zoo as zoo
import tlk
from tests.hf.test_quantized_checkpoint import CASES, SIZES, quantized, weights
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.binding import bind
from tlk.hf.foreign import take_over
from tlk.hf.quant_linear import QuantLinear
from tlk.hf.quantized_checkpoint import save_quantized
from tlk.quant.int8 import Int8Weight


class Stranger(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x)


LOADED = ["int4", "int4-32", "int8", "int8-weight", "fp8", "fp8-block", "fp8-static", "fp4-mx", "fp4-nv", "nf4", "fp4", "nf4-nested"]  # fmt: skip


@pytest.fixture(scope="module")
def original():
    return zoo.tiny("llama", **SIZES).to(torch.bfloat16)


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.bfloat16, **options
    )


@pytest.mark.parametrize("name", LOADED)
def test_layers_of_other_packages_become_ours(name, original, tmp_path):
    saved = quantized(original, CASES[name])
    save_quantized(saved, tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert set(take_over(model)) == set(saved.formats)
    for key, weight in weights(saved).items():
        module = model.get_submodule(key.removesuffix(".weight"))
        assert type(module) is QuantLinear and module.format == CASES[name]
        assert torch.equal(module.format.dequantize(module.packed()), weight), key
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert take_over(model) == [] and not model._forward_pre_hooks
    decoder = bind(model.to("cpu")).decoder
    assert decoder.layers[0].mlp.down.format == CASES[name]
    dense = zoo.tiny("llama", **SIZES)
    dense.load_state_dict(original.state_dict() | weights(saved))
    ids = zoo.random_ids(model)
    logits = model(ids[0][None]).logits[0].float()
    expected = dense.to(torch.bfloat16)(ids[0][None]).logits[0].float()
    assert zoo.relative_error([logits], [expected]) < 0.05


def test_eight_bits_of_bitsandbytes(original, tmp_path):
    original.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    loaded(tmp_path, quantization_config=config).save_pretrained(tmp_path / "out")
    model = loaded(tmp_path / "out")
    replaced = take_over(model)
    assert len(replaced) == 14
    for name in replaced:
        module, dense = model.get_submodule(name), original.get_submodule(name)
        assert module.format == Int8Weight()
        weight = module.format.dequantize(module.packed())
        assert (weight - dense.weight.float()).norm() < 0.01 * dense.weight.float().norm()


def test_a_model_that_was_not_quantized_is_left_alone(original):
    assert take_over(original) == []
    assert type(original.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_modules_that_are_not_as_their_files(original, tmp_path):
    save_quantized(quantized(original, CASES["int4"]), tmp_path / "out")
    model = loaded(tmp_path / "out")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    down = model.model.layers[0].mlp.down_proj
    down.register_buffer("qweight", torch.zeros(1))
    with pytest.raises(
        UnsupportedError, match=r"modules of a gptq model .*tlk\.AutoModelForCausalLM"
    ):
        take_over(model)
    assert model.model.layers[0].mlp.down_proj is down


def test_what_transformers_loads_wrong_is_refused(original, tmp_path):
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = loaded(tmp_path)  # which says so in its log
    with pytest.raises(
        CheckpointError, match=r"quantized with modelopt, and transformers loaded them as if"
    ):
        take_over(model)
    with pytest.raises(CheckpointError, match="quantized with modelopt"):
        tlk.optimize(model)


@pytest.mark.parametrize(
    ("file", "fields", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, "awq"),
    ],
)
def test_what_only_old_files_say_is_refused(file, fields, method, original, tmp_path):
    original.save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(fields))
    model = loaded(tmp_path)
    with pytest.raises(CheckpointError, match=f"quantized with {method}, and transformers loaded"):
        tlk.optimize(model)
    cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / file).unlink()
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(cache))
    assert take_over(model) == []


@pytest.mark.parametrize("name", ["int4", "nf4", "fp8"])
def test_optimize_runs_what_transformers_loaded(name, original, tmp_path):
    saved = quantized(original, CASES[name])
    save_quantized(saved, tmp_path / "out")
    model = tlk.optimize(loaded(tmp_path / "out"))
    again = tlk.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert tlk.report(model).refused is None
    assert type(model.model.layers[0].mlp.down_proj) is QuantLinear


def test_modules_that_tlk_does_not_know_keep_all_as_it_was(original, tmp_path):
    save_quantized(quantized(original, CASES["nf4"]), tmp_path / "out")
    model = loaded(tmp_path / "out")
    model.model.layers[1].mlp.act_fn = Stranger()
    with pytest.warns(tlk.errors.FallbackWarning, match="Stranger"):
        tlk.optimize(model)(torch.tensor([[1, 2]]))
    assert type(model.model.layers[0].mlp.down_proj).__module__.startswith("bitsandbytes")


def test_parts_that_cannot_be_one_matmul(tmp_path):
    narrow = zoo.tiny("llama", **(SIZES | {"num_key_value_heads": 1})).to(torch.bfloat16)
    save_quantized(quantized(narrow, CASES["fp8-block"]), tmp_path / "out")
    model = loaded(tmp_path / "out")
    take_over(model)
    with pytest.raises(UnsupportedError, match=r"attention\.qkv: a layer of 64 outputs"):
        bind(model)
