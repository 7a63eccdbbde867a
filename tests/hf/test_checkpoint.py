import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tlk
from tests.models.zoo import tiny
from tlk.hf.checkpoint import check_files, load, load_model


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_whole_checkpoint_loads(folder):
    model = load_model(str(folder), dtype=torch.float32)
    assert not model.training
    for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True):
        assert torch.equal(a, b)


def test_missing_and_left_over_keys_are_listed(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({"model.surplus": t.pop(name)}))
    with pytest.raises(tlk.CheckpointError, match=rf"missing: {name}; left over: model.surplus"):
        tlk.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(tlk.CheckpointError, match="LlamaForCausalLM"):
        tlk.AutoModelForCausalLM.from_pretrained(folder)


def test_misshapen_keys_are_listed(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: torch.zeros(3, 4)}))
    with pytest.raises(tlk.CheckpointError, match=rf"of another shape: .*{name}"):
        load(AutoModelForCausalLM, folder)


@pytest.mark.parametrize("size", [0, 5, 500, -16])
def test_truncated_files(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(tlk.CheckpointError, match=r"model\.safetensors is corrupt or truncated"):
        load_model(str(folder))


def test_pickles_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(tlk.CheckpointError, match=r"pickles are not loaded \(pytorch_model\.bin\)"):
        tlk.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(tlk.CheckpointError, match="use_safetensors=False"):
        tlk.LlamaForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_shards_and_their_index(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="50kB")
    check_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = min(whole["weight_map"].values())
    (tmp_path / first).rename(tmp_path / "elsewhere")
    with pytest.raises(tlk.CheckpointError, match=f"lacks the shards {first}"):
        load_model(str(tmp_path))
    (tmp_path / "elsewhere").rename(tmp_path / first)
    whole["weight_map"]["more"] = first
    index.write_text(json.dumps(whole))
    with pytest.raises(tlk.CheckpointError, match="keys that the index names: more"):
        load_model(str(tmp_path))
    index.write_text("{")
    with pytest.raises(tlk.CheckpointError, match=r"index\.json is corrupt"):
        load_model(str(tmp_path))


def test_what_shards_hold_beyond_their_index(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="50kB")
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    first = where.pop("lm_head.weight")
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(tlk.CheckpointError, match=f"does not name: lm_head.weight in {first}"):
        check_files(tmp_path)
    index.unlink()
    check_files(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(tlk.CheckpointError, match=r"several files hold the keys lm_head\.weight"):
        check_files(tmp_path)


def test_files_beside_the_model_are_not_its_own(folder):
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.index.json").write_text("stale")
    check_files(folder)
    load_model(str(folder))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(tlk.CheckpointError, match=r"no config\.json"):
        load_model(str(tmp_path))
