import copy
import pickle

import pytest
import torch
import transformers

import tlk
from tests.models.zoo import tiny

KINDS = {
    "llama": tlk.LlamaForCausalLM,
    "mistral": tlk.MistralForCausalLM,
    "qwen2": tlk.Qwen2ForCausalLM,
    "qwen3": tlk.Qwen3ForCausalLM,
    "nemotron": tlk.NemotronForCausalLM,
}
IDS = torch.tensor([[5, 9, 2, 77, 31]])


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_from_pretrained_is_transformers_on_tlk(family, tmp_path):
    original = tiny(family)
    original.save_pretrained(tmp_path)
    for kind in (KINDS[family], tlk.AutoModelForCausalLM):
        model = kind.from_pretrained(tmp_path, dtype=torch.float32)
        assert isinstance(model, type(original)) and not model.training
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
        assert tlk.report(model).forwards == {"tlk": 1}
    assert isinstance(KINDS[family].from_pretrained(tmp_path), KINDS[family])


@torch.no_grad()
def test_from_pretrained_takes_transformers_arguments(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model, info = tlk.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype="bfloat16", attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and not info["missing_keys"]
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_construction_from_a_config():
    config = tiny("qwen3").config
    torch.manual_seed(0)
    model = tlk.Qwen3ForCausalLM(config).eval()
    torch.manual_seed(0)
    original = transformers.Qwen3ForCausalLM(config).eval()
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-5)
    assert tlk.report(model).forwards == {"tlk": 1}
    model = tlk.AutoModelForCausalLM.from_config(config)
    assert isinstance(model, transformers.Qwen3ForCausalLM) and tlk.report(model).family == "qwen3"


@torch.no_grad()
def test_restore_copies_and_pickles(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = tlk.LlamaForCausalLM.from_pretrained(tmp_path)
    want = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is tlk.LlamaForCausalLM and torch.equal(other(IDS).logits, want)
    model.save_pretrained(tmp_path / "again")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert type(tlk.restore(model)) is transformers.LlamaForCausalLM
    assert type(tlk.optimize(model)).__name__ == "LlamaForCausalLM"


def test_auto_is_not_a_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        tlk.AutoModelForCausalLM()


@torch.no_grad()
def test_from_pretrained_quantizes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tiny("llama", **sizes).save_pretrained(tmp_path / "in")
    config = tlk.QuantConfig("int4-gptq", group_size=32)
    ids = torch.randint(0, 99, (4, 24), generator=torch.Generator().manual_seed(0))
    for kind, how in (
        (tlk.LlamaForCausalLM, {"quantization": "fp8"}),
        (tlk.AutoModelForCausalLM, {"quantization": config, "calibration": ids}),
    ):
        model = kind.from_pretrained(tmp_path / "in", dtype=torch.float32, **how)
        assert sum(tlk.report(model).quantized.values()) == 14
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="out is quantized already: quantization must be None"):
        tlk.LlamaForCausalLM.from_pretrained(tmp_path / "out", quantization="fp8")
