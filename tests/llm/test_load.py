import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tlk
from tests.models.zoo import tiny
from tlk.demo.generate import EMBEDDED
from tlk.errors import CheckpointError, UnsupportedError
from tlk.llm.load import default_params, load
from tlk.quant.config import QuantConfig
from tlk.runtime.params import SamplingParams


def test_a_folder_brings_its_tokenizer_and_its_habits():
    loaded = load(str(EMBEDDED), "float32", "cpu", None)
    assert loaded.decoder.embedding.weight.dtype == torch.float32
    assert loaded.text.tokenizer.encode("def")
    assert loaded.eos == (0,) and loaded.seconds > 0
    assert load(EMBEDDED, "auto", "cpu", None).decoder.embedding.weight.dtype == torch.bfloat16


def test_a_tokenizer_may_be_given_as_object_or_path():
    own = AutoTokenizer.from_pretrained(EMBEDDED)
    assert load(EMBEDDED, "auto", "cpu", own).text.tokenizer is own
    assert load(EMBEDDED, "auto", "cpu", str(EMBEDDED)).text.tokenizer.encode("def")


@pytest.mark.parametrize("optimized", [False, True])
def test_a_model_object_shares_its_weights(optimized):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    model = tlk.optimize(model) if optimized else model.eval()
    loaded = load(model, "auto", "cpu", None)
    assert (
        loaded.decoder.embedding.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    )
    q = model.model.layers[0].self_attn.q_proj.weight
    assert loaded.decoder.layers[0].attention.qkv.weight.data_ptr() == q.data_ptr()
    assert loaded.text.tokenizer is not None and loaded.eos == (0,)  # it came from a folder
    if optimized:
        ids = torch.tensor([[5, 6, 7]])
        assert model(ids).logits.shape == (1, 3, model.config.vocab_size)


def test_a_model_object_from_nowhere_has_no_tokenizer():
    loaded = load(tiny("llama"), "auto", "cpu", None)
    with pytest.raises(
        UnsupportedError, match=r"text needs a tokenizer: the model object .* tokenizer="
    ):
        loaded.text.needed("text")


def test_a_folder_without_a_tokenizer(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    loaded = load(str(tmp_path), "auto", "cpu", None)
    with pytest.raises(UnsupportedError, match="holds none that transformers can load"):
        loaded.text.needed("text")


def test_a_model_object_is_not_moved_or_converted():
    model = tiny("llama")
    with pytest.raises(ValueError, match="dtype must be auto or the model's own, float32, got bfl"):
        load(model, "bfloat16", "auto", None)
    with pytest.raises(
        ValueError, match="device must be auto or where the model is, cpu, got cuda"
    ):
        load(model, "auto", "cuda", None)


@pytest.mark.parametrize(
    ("model", "error"), [(5, TypeError), (None, TypeError), ("/no/such/folder", CheckpointError)]
)
def test_what_is_no_model(model, error):
    with pytest.raises(error):
        load(model, "auto", "cpu", None)


def test_defaults_as_vllm_reads_them():
    how = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5, "min_p": None}
    assert default_params(how) == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=5)
    assert default_params({}) == SamplingParams()


def test_a_checkpoint_can_be_quantized_while_it_is_loaded():
    plain, quantized = (
        load(EMBEDDED, "float32", "cpu", None, how) for how in (None, QuantConfig("int8-weight"))
    )
    layer, own = plain.decoder.layers[0].mlp.down, quantized.decoder.layers[0].mlp.down
    assert torch.equal(own.weight, own.format.quantize(layer.weight)["weight"])
    with pytest.raises(ValueError, match=r"tlk.optimize\(model, quantization=…\) first"):
        load(tiny("llama"), "auto", "cpu", None, QuantConfig("fp8"))


def test_a_quantized_checkpoint_is_recognized_and_not_quantized_again(tmp_path):
    model = tlk.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    tlk.optimize(model, quantization="fp8").save_pretrained(tmp_path / "fp8")
    text = AutoTokenizer.from_pretrained(EMBEDDED)
    loaded = load(tmp_path / "fp8", "float32", "cpu", text)
    assert loaded.decoder.layers[0].mlp.down.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path / "fp8", "float32", "cpu", text, QuantConfig("fp8"))
