import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.zoo import decoder_of, tiny
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.streaming import stream
from tlk.hf.weights import load_decoder


@pytest.fixture
def folder(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_modules_are_loaded_one_by_one(folder):
    wanted = dict(load_decoder(str(folder), progress=False).decoder.named_parameters())
    with stream(str(folder)) as found:
        assert found.dtype == torch.bfloat16 and found.folder == folder
        assert all(p.is_meta for p in found.decoder.parameters())
        found.load("layers.1", "cpu")
        for name, p in found.decoder.named_parameters():
            assert p.is_meta != name.startswith("layers.1.")
        for name in ("embedding", "layers.0", "final_norm", "lm_head"):
            found.load(name, "cpu")
        loaded = dict(found.decoder.named_parameters())
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        assert not any(p.requires_grad for p in loaded.values())
        key = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(found.tensor(key), wanted["layers.0.attention.qkv.weight"][:96])


def test_rotary_tables_stay(folder):
    with stream(str(folder)) as found:
        (rope,) = found.decoder.ropes
        rope.prepare(10, torch.device("cpu"))
        cos = rope.cos.clone()
        found.load("layers.0", "cpu")
        assert torch.equal(rope.cos, cos)


def test_a_float32_file_of_a_bfloat16_model(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with stream(str(tmp_path)) as found:
        found.load("layers.0", "cpu")
        weight = decoder_of(model).layers[0].mlp.down.weight
        assert torch.equal(found.decoder.layers[0].mlp.down.weight, weight.bfloat16())


def test_what_does_not_fit_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, folder / "model.safetensors")
    with (
        pytest.raises(CheckpointError, match=r"does not fit its config.json: missing"),
        stream(str(folder)),
    ):
        pass
    save_file(tensors, folder / "model.safetensors")
    tied = json.dumps(config | {"tie_word_embeddings": True})
    (folder / "config.json").write_text(tied)
    with pytest.raises(CheckpointError, match="differs from the embedding"), stream(str(folder)):
        pass
    quantized = config | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(UnsupportedError, match="quantized already, with awq"), stream(str(folder)):
        pass
