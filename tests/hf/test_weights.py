import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.models.zoo as zoo
from tlk import parallel
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf import checkpoint, weights
from tlk.hf.weights import load_decoder, random_decoder
from tlk.models.families import FAMILIES

ONE, STEPS = "model.safetensors", [[(0, 7), (2, 8)], [(2, 1), (0, 9), (1, 1)], [(0, 1)]]
UP = "model.layers.0.mlp.up_proj.weight"


def save(model, folder, shards=True):
    model.save_pretrained(folder, max_shard_size="20kB" if shards else "1GB")
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    save(zoo.tiny("llama"), tmp_path, shards=False)
    return tmp_path


def rewrite(folder, **tensors):
    """Change tensors of the file in `folder`, or drop those that are None."""
    changed = load_file(folder / ONE) | tensors
    save_file({k: t for k, t in changed.items() if t is not None}, folder / ONE)


def configure(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **options):
    return load_decoder(str(folder), progress=False, **options)


def assert_same(decoder, expected):
    assert dict(decoder.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for (name, a), b in zip(decoder.named_parameters(), expected.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_transformers(model_type, tied, tmp_path):
    model = zoo.tiny(model_type, tie_word_embeddings=tied)
    loaded = load(save(model, tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert (loaded.family, loaded.dtype) == (model_type, torch.float32)
    assert loaded.bytes == sum(p.numel() * 4 for p in model.parameters()) and loaded.seconds > 0
    assert loaded.config["max_position_embeddings"] == 64
    assert not loaded.decoder.training
    assert_same(loaded.decoder, zoo.decoder_of(model))
    ids = zoo.random_ids(model)
    logits = zoo.paged_logits(loaded.decoder, ids, STEPS)
    assert zoo.relative_error(logits, zoo.transformers_logits(model, ids)) < 1e-4


def test_defaults_that_config_json_leaves_out(folder):
    fields = json.loads((folder / "config.json").read_text())
    for name in ("rms_norm_eps", "tie_word_embeddings", "attention_bias", "hidden_act"):
        fields.pop(name, None)
    (folder / "config.json").write_text(json.dumps(fields))
    assert load(folder).config["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize("name", [None, "auto", "bfloat16", torch.bfloat16, torch.float16])
def test_dtypes(folder, name):
    configure(folder, dtype="float16")
    loaded = load(folder, dtype=name)
    chosen = {None: torch.float16, "auto": torch.float16, "bfloat16": torch.bfloat16}.get(
        name, name
    )
    assert loaded.dtype == chosen
    assert_same(loaded.decoder, zoo.decoder_of(zoo.tiny("llama"), chosen))
    assert loaded.bytes == 2 * sum(p.numel() for p in loaded.decoder.parameters())


def test_auto_dtype_without_a_field_is_the_embeddings(folder):
    configure(folder, dtype=None, torch_dtype="bfloat16")
    assert load(folder).dtype == torch.bfloat16
    configure(folder, torch_dtype=None)
    rewrite(folder, **{"model.embed_tokens.weight": torch.zeros(99, 48).half()})
    assert load(folder).dtype == torch.float16


def test_dtypes_that_tlk_does_not_run(folder):
    with pytest.raises(ValueError, match=r"dtype must be auto, .*got torch\.float64"):
        load(folder, dtype=torch.float64)
    configure(folder, dtype="float64")
    with pytest.raises(UnsupportedError, match=r"config\.json: dtype .*float64"):
        load(folder)
    rewrite(folder, **{UP: torch.zeros(88, 48, dtype=torch.int8)})
    with pytest.raises(UnsupportedError, match=rf"{ONE}: {UP} is stored as I8"):
        load(folder, dtype="float32")


class Watch:
    """A safetensors file that knows how many of the tensors it gave out are alive."""

    alive, most, given = set(), 0, 0

    def __init__(self, file, framework):
        self.file = checkpoint_safe_open(file, framework)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, key):
        return self.watched(self.file.get_tensor(key))

    def get_slice(self, key):
        return WatchedSlice(self.file.get_slice(key), self.watched)

    @classmethod
    def watched(cls, tensor):
        cls.alive.add(id(tensor))
        weakref.finalize(tensor, cls.alive.discard, id(tensor))
        cls.most, cls.given = max(cls.most, len(cls.alive)), cls.given + 1
        return tensor


class WatchedSlice:
    def __init__(self, part, watched):
        self.part, self.watched = part, watched

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __getitem__(self, index):
        return self.watched(self.part[index])


checkpoint_safe_open = checkpoint.safe_open


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(checkpoint, "safe_open", Watch)
    Watch.alive, Watch.most, Watch.given = set(), 0, 0
    return Watch


def test_one_tensor_in_host_memory_at_a_time(tmp_path, watch):
    load(save(zoo.tiny("qwen3"), tmp_path))
    assert (watch.most, watch.given, len(watch.alive)) == (1, 25, 0)


def test_tensors_are_read_in_the_order_of_the_file(folder, monkeypatch):
    read, original = [], weights.InFile.__getitem__
    monkeypatch.setattr(
        weights.InFile, "__getitem__", lambda t, part: read.append(t.key) or original(t, part)
    )
    rewrite(folder, **{UP: torch.zeros(88, 48).half()})  # the file has it behind wider ones
    load(folder)
    with checkpoint_safe_open(folder / ONE, "pt") as file:
        assert read == file.offset_keys() != sorted(read)


def refused(folder, watch, error, match):
    with pytest.raises(error, match=match):
        load(folder)
    assert watch.given == 0


def test_what_does_not_fit_is_listed_before_anything_is_read(folder, watch, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *args, **kwargs: pytest.fail("built"))
    rewrite(folder, **{UP: None, "model.surplus": torch.zeros(3)})
    refused(folder, watch, CheckpointError, rf"{folder} .*missing: .*{UP}.*left over: .*surplus")
    names = ["q", "k", "v"]
    rows = {n: torch.zeros(r, 48) for n, r in zip(names, (32, 96, 32), strict=True)}
    rewrite(folder, **{"model.surplus": None, UP: torch.zeros(88, 48)})
    rewrite(folder, **{f"model.layers.1.self_attn.{n}_proj.weight": t for n, t in rows.items()})
    shapes = r"q_proj.weight has shape \(32, 48\), not \(96, 48\); .*k_proj.weight has shape \(96"
    refused(folder, watch, CheckpointError, shapes)


def test_other_models_are_refused(folder, watch):
    configure(folder, model_type="gpt2")
    refused(folder, watch, UnsupportedError, "model_type 'gpt2' .*llama, mistral")
    configure(folder, model_type="llama", quantization_config={"quant_method": "quanto"})
    refused(folder, watch, UnsupportedError, "quantized with quanto, which tlk does not read")


@pytest.mark.parametrize("size", [0, 5, 500, -16])
def test_truncated_files(folder, size):
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt or truncated"):
        load(folder)


def test_a_read_that_fails_names_the_file(folder, monkeypatch):
    def broken(self, key):
        raise checkpoint.SafetensorError("bad sector")

    monkeypatch.setattr(checkpoint, "safe_open", Watch)
    monkeypatch.setattr(Watch, "get_tensor", broken)
    with pytest.raises(
        CheckpointError, match=rf"{ONE}: lm_head\.weight cannot be read: bad sector"
    ):
        load(folder)


def test_a_tied_head_must_equal_the_embedding(tmp_path, monkeypatch):
    model = zoo.tiny("llama", tie_word_embeddings=True)
    save(model, tmp_path, shards=False)
    table = load_file(tmp_path / ONE)["model.embed_tokens.weight"]
    rewrite(tmp_path, **{"lm_head.weight": table.clone()})
    assert_same(load(tmp_path).decoder, zoo.decoder_of(model))
    table[98, 47] += 1
    rewrite(tmp_path, **{"lm_head.weight": table})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": table[:-1]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": table})
    configure(tmp_path, tie_word_embeddings=False)
    assert torch.equal(load(tmp_path).decoder.lm_head.weight, table)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_only_its_part(tmp_path, monkeypatch, rank, watch):
    model = zoo.tiny("llama", attention_bias=True, mlp_bias=True)
    save(model, tmp_path)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    read = []
    monkeypatch.setattr(Watch, "watched", lambda _, t: read.append(t.numel()) or t)
    loaded = load(tmp_path)
    assert sum(read) * 4 == loaded.bytes < 0.7 * sum(p.numel() * 4 for p in model.parameters())
    state = model.state_dict()
    layer = loaded.decoder.layers[1]
    half = {n: state[f"model.layers.1.self_attn.{n}_proj.weight"].chunk(2)[rank] for n in "qkv"}
    assert torch.equal(layer.attention.qkv.weight, torch.cat(list(half.values())))
    gate = [state[f"model.layers.1.mlp.{n}_proj.bias"].chunk(2)[rank] for n in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up.bias, torch.cat(gate))
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(layer.mlp.down.weight, state[f"{down}.weight"].chunk(2, 1)[rank])
    assert torch.equal(layer.mlp.down.bias, state[f"{down}.bias"])
    assert torch.equal(loaded.decoder.embedding.weight, state["model.embed_tokens.weight"])


def test_progress_counts_the_bytes(folder, capsys):
    load_decoder(str(folder))
    assert "weights: 100%" in capsys.readouterr().err
    load(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_weights_keep_a_plausible_scale(model_type, tmp_path):
    shape = {"hidden_size": 96, "num_hidden_layers": 6, "attention_bias": True}
    config = zoo.tiny(model_type, **shape).config.to_dict() | {"dtype": "bfloat16"}
    loaded = random_decoder(config, dtype=torch.float32)
    (tmp_path / "shape.json").write_text(json.dumps(config))
    assert_same(
        random_decoder(str(tmp_path / "shape.json"), dtype="float32").decoder, loaded.decoder
    )
    assert random_decoder(config).dtype == torch.bfloat16
    other = random_decoder(config, dtype="float32", seed=1).decoder
    for (name, a), b in zip(loaded.decoder.named_parameters(), other.parameters(), strict=True):
        assert a.isfinite().all() and not torch.equal(a, b), name
    norm = loaded.decoder.final_norm
    assert abs(norm.weight.mean() + norm.weight_offset - 1) < 0.1
    ids = zoo.random_ids(zoo.tiny(model_type))
    logits = torch.cat(zoo.paged_logits(loaded.decoder, ids, STEPS))
    assert 0.1 < logits.std() < 10


def test_random_weights_from_a_folder(folder):
    assert random_decoder(str(folder)).decoder.config.hidden_size == 48
    with pytest.raises(CheckpointError, match="is no file"):
        random_decoder(str(folder / "shape.json"))
