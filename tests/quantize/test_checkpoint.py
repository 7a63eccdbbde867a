import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.zoo import tiny
from tests.quantize.tiny import FIELDS, data
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.weights import load_decoder
from tlk.models.decoder import linears
from tlk.quant.config import QuantConfig
from tlk.quant.format import DENSE
from tlk.quantize import checkpoint as module
from tlk.quantize.checkpoint import quantize

IDS = data().ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model"
    fields = FIELDS | {"intermediate_size": 128, "hidden_size": 128, "head_dim": 32}
    tiny("llama", **fields).to(torch.bfloat16).save_pretrained(path)
    return path


def run(folder, out, method="int4-gptq", **options):
    options = {"calibration": IDS, "group_size": 32, "progress": False, "device": "cpu"} | options
    return quantize(str(folder), out, method=method, **options)


@pytest.mark.parametrize(
    ("method", "options", "layout"),
    [
        ("int4-gptq", {}, "compressed-tensors"),
        ("int4-awq", {}, "awq"),
        ("int8", {"group_size": None}, "compressed-tensors"),
        ("fp8", {"group_size": None, "calibration": None}, "compressed-tensors"),
        ("nf4", {"group_size": None, "calibration": None}, "bitsandbytes"),
        ("fp4-nv", {"group_size": None}, "compressed-tensors"),
        ("int4-gptq", {"format": "gptq"}, "gptq"),
    ],
)
def test_what_is_written_is_what_was_found(folder, tmp_path, method, options, layout):
    """tlk reads it back, and its layers hold the packed tensors of the run in memory."""
    out = tmp_path / "out"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    report = run(folder, out, method, **options)
    assert report["format"] == layout and report["method"] == method
    assert json.loads((out / "tlk_quant.json").read_text()) == report
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))
    loaded = load_decoder(str(out), progress=False)
    dense = load_decoder(str(folder), progress=False)
    for (name, linear), exact in zip(
        linears(loaded.decoder).items(), linears(dense.decoder).values(), strict=True
    ):
        assert (linear.format == DENSE) == (name == "lm_head"), name
        if name.endswith("down"):
            values, weight = linear.format.dequantize(linear.packed()), exact.weight.float()
            wanted = report["layers"][f"model.{name.rpartition('.mlp')[0]}.mlp.down_proj"]
            if "scaled_by" not in wanted:
                error = float((values - weight).norm() / weight.norm())
                assert error == pytest.approx(wanted["weight_error"], rel=0.02)


def test_transformers_loads_it(folder, tmp_path):
    run(folder, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        a, b = theirs(IDS).logits.float(), exact(IDS).logits.float()
    assert 1e-3 < float((a - b).norm() / b.norm()) < 0.3


def test_scales_of_the_cache(folder, tmp_path):
    report = run(folder, tmp_path / "out", kv_cache_dtype="fp8")
    assert report["kv_cache_dtype"] == "fp8"
    scales = load_decoder(str(tmp_path / "out"), progress=False).kv_scales
    assert len(scales) == 2 and all(s.k.shape == (2,) and (s.k > 0).all() for s in scales)


def test_the_report(folder, tmp_path):
    report = run(folder, tmp_path / "out", ignore=["lm_head", "re:.*o_proj"], samples=4)
    assert report["calibration"] == "4 × 20 token ids" and report["fallbacks"] == []
    assert "model.layers.0.self_attn.o_proj" not in report["layers"]
    assert report["config"]["ignore"] == ["lm_head", "re:.*o_proj"]
    assert report["versions"].keys() == {"tlk", "torch", "triton", "transformers"}
    errors = report["layers"]["model.layers.1.mlp.up_proj"]
    assert 0 < errors["output_error"] < errors["weight_error"] < 0.5


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    done = []

    class Stopping(module.Pieces):
        def done(self, i, result):
            super().done(i, result)
            if i == 0 and not done:
                done.append(i)
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "Pieces", Stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    assert not out.exists() and (tmp_path / "out.partial/layer-00000.safetensors").is_file()
    with pytest.raises(CheckpointError, match="unfinished run that differs in config"):
        run(folder, out, group_size=64)
    with pytest.raises(CheckpointError, match="differs in calibration_sha256"):
        run(folder, out, samples=3)
    run(folder, out)
    run(folder, tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_not_to_resume_begins_anew(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/run.json").write_text("{}")
    run(folder, tmp_path / "out", resume=False)
    assert (tmp_path / "out").is_dir()


def test_a_failed_save_leaves_nothing_but_the_pieces(folder, tmp_path, monkeypatch):
    def fails(*a, **o):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("tlk.hf.quantized_checkpoint.save_file", fails)
        with pytest.raises(OSError, match="no space left"):
            run(folder, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out.partial"]
    run(folder, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_bad_input_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"

    def refuses(error, message, **options):
        with pytest.raises(error, match=message):
            run(folder, out, **options)
        assert not out.exists()

    refuses(ValueError, "calibration must be texts, a JSONL file or ids", calibration=None)
    refuses(ValueError, "existing JSONL file", calibration="wikitext")
    refuses(ValueError, "calibration must hold at least one token", calibration=IDS[:0])
    refuses(ValueError, "kv_cache_dtype must be None or one of fp8, int8", kv_cache_dtype="int4")
    options = {"method": "fp8", "calibration": None, "group_size": None, "kv_cache_dtype": "fp8"}
    refuses(ValueError, "calibration must be given to find scales", **options)
    refuses(ValueError, "group_size must be fields of the QuantConfig", method=QuantConfig("int4"))
    twice = QuantConfig("int4", calibration=IDS)
    refuses(ValueError, "calibration must be given once", method=twice, group_size=None)
    refuses(ValueError, "method must be one of", method="int3")
    refuses(UnsupportedError, "device cuda: torch finds no GPU", device="cuda")
    out.mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        run(folder, out)
