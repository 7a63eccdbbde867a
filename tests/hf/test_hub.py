import fnmatch
import json
import shutil

import pytest

from tests.models.zoo import tiny
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf import hub
from tlk.hf.hub import (
    complete_config,
    generation_defaults,
    read_config,
    read_quantization,
    snapshot,
)


class Hub:
    """What snapshot_download does, from one folder, keeping account of what was asked for."""

    def __init__(self, repository, cache):
        self.repository, self.cache, self.revisions = repository, cache, []

    def __call__(self, path, *, allow_patterns, revision="main"):
        if path != "some/model":
            raise FileNotFoundError(f"no repository {path}")
        self.revisions.append(revision)
        self.cache.mkdir(exist_ok=True)
        for file in self.repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache)
        return str(self.cache)


@pytest.mark.parametrize("shards", ["20kB", "1GB"])
def test_the_hub_is_asked_for_the_models_own_files(tmp_path, monkeypatch, shards):
    repository = tmp_path / "repository"
    tiny("llama").save_pretrained(repository, max_shard_size=shards)
    wanted = {f.name for f in repository.iterdir()} | {"chat_template.jinja", "tokenizer.model"}
    for name in wanted | {"consolidated.safetensors", "pytorch_model.bin", "model.gguf"}:
        (repository / name).touch()
    fake = Hub(repository, tmp_path / "c0ffee")
    monkeypatch.setattr(hub, "snapshot_download", fake)
    folder = snapshot("some/model")
    assert {f.name for f in folder.iterdir()} == wanted
    assert fake.revisions == ["main", "c0ffee"]
    with pytest.raises(CheckpointError, match="no repository other/model"):
        snapshot("other/model")


def test_folders_are_used_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked"))
    assert snapshot(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="absent is no folder"):
        snapshot(str(tmp_path / "absent"))


def test_ids_that_cannot_be(monkeypatch):
    with pytest.raises(CheckpointError, match="a/b/c is no folder"):
        snapshot("a/b/c")


def write(folder, name, fields):
    (folder / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))


def test_configs(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_config(tmp_path)
    write(tmp_path, "config.json", "{")
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt"):
        read_config(tmp_path)
    write(tmp_path, "config.json", "[]")
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt: .* no JSON object"):
        read_config(tmp_path / "config.json")
    write(tmp_path, "config.json", {"model_type": "qwen2"})
    assert read_config(tmp_path) == {"model_type": "qwen2"}
    assert complete_config(read_config(tmp_path))["use_sliding_window"] is False
    with pytest.raises(CheckpointError, match="llama config is not valid"):
        complete_config({"model_type": "llama", "hidden_size": "wide"})
    for kind in ("bert", None):
        with pytest.raises(UnsupportedError, match=f"model_type {kind!r} is of no family"):
            complete_config({"model_type": kind})
    complete = complete_config({"model_type": "llama", "quantization_config": {"bits": 4}})
    assert "quantization_config" not in complete


def test_how_a_checkpoint_says_that_it_is_quantized(tmp_path):
    assert read_quantization(tmp_path, {"model_type": "llama"}) is None
    write(tmp_path, "quant_config.json", {"w_bit": 4})
    assert read_quantization(tmp_path, {}) == {"w_bit": 4}
    write(tmp_path, "quantize_config.json", {"bits": 4})
    assert read_quantization(tmp_path, {}) == {"bits": 4}
    own = {"quant_method": "awq", "bits": 4}
    assert read_quantization(tmp_path, {"quantization_config": own}) == own
    write(tmp_path, "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    assert read_quantization(tmp_path, {"quantization_config": own}) == own
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8"}  # its other file says more
    for fields in ({}, {"quantization_config": modelopt}):
        assert read_quantization(tmp_path, fields) == {"quantization": {"quant_algo": "FP8"}}


def test_generation_defaults(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": 7, "bos_token_id": 1, "temperature": 9})
    assert generation_defaults(str(tmp_path)) == {
        "eos_token_id": [7],
        "pad_token_id": None,
        "bos_token_id": 1,
        "temperature": 9,
    }
    own = {"eos_token_id": [5, 6], "pad_token_id": 0, "do_sample": True, "temperature": 0.6}
    write(tmp_path, "generation_config.json", own | {"top_p": None, "transformers_version": "5"})
    assert generation_defaults(str(tmp_path)) == own | {"bos_token_id": None}
    write(tmp_path, "generation_config.json", {})
    assert generation_defaults(str(tmp_path))["eos_token_id"] == [7]
    write(tmp_path, "config.json", {})
    assert generation_defaults(str(tmp_path))["eos_token_id"] == []


@pytest.mark.parametrize("value", ["2", [1, None], -1, True, [[3]]])
def test_ids_must_be_ids(tmp_path, value):
    write(tmp_path, "config.json", {})
    write(tmp_path, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(CheckpointError, match="eos_token_id must be one or several token ids"):
        generation_defaults(str(tmp_path))
    write(tmp_path, "generation_config.json", "eos")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is corrupt"):
        generation_defaults(str(tmp_path))
