import json

import pytest

from tests.demo.tiny import save_tiny
from tlk.cli import main
from tlk.demo import corpus
from tlk.quantize import command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in corpus.texts(["json"]).values()]
    file.write_text("\n".join(lines))
    return str(file)


def test_quantize_tells_what_became_of_the_model(model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    how = ["--method", "int4-gptq", "--calibration", texts, "--samples", "4", "--length", "32"]
    assert main(["quantize", model, str(out), *how, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert f"{out}: 21 layers in int4-gptq, stored as compressed-tensors, " in printed.out
    assert "relative output error: mean 0." in printed.out and "worst 0." in printed.out
    assert f"calibrated on 4 × 32 tokens of {texts}" in printed.out
    assert " s on " in printed.out and "GiB of memory" in printed.out
    assert "int4-gptq: 100%" in printed.err and "3/3" in printed.err
    assert (out / "tlk_quant.json").is_file() and (out / "tokenizer.json").is_file()


def test_every_option_is_handed_on(monkeypatch, tmp_path):
    seen = {}

    def quantize(source, out, **options):
        seen.update(options, source=source, out=out)
        return {"layers": {"a": {"weight_error": 0.1, "fallback": "none"}}, "calibration": None,
                "method": "nf4", "format": "f", "seconds": 1.0, "device": "cpu", "memory_bytes": 1,
                "kept_in_16_bit": {"b": "odd"}, "fallbacks": ["a"]}  # fmt: skip

    monkeypatch.setattr(command, "quantize", quantize)
    options = (
        "--method nf4 --calibration c --group-size 32 --zero-points --double-quant --static --samples 3 "
        "--length 5 --ignore a re:b --format bitsandbytes --kv-cache-dtype int8 --device cpu "
        "--strict --no-resume"
    )
    assert main(["quantize", "m", str(tmp_path), *options.split()]) == 0
    assert seen == {
        "source": "m", "out": tmp_path, "method": "nf4", "calibration": "c", "group_size": 32,
        "symmetric": False, "double_quant": True, "static": True, "samples": 3, "length": 5,
        "ignore": ["a", "re:b"], "format": "bitsandbytes", "kv_cache_dtype": "int8",
        "device": "cpu", "strict": True, "resume": False,
    }  # fmt: skip
    assert main(["quantize", "m", str(tmp_path), "--method", "int4"]) == 0
    for name in ("calibration", "group_size", "symmetric", "ignore", "format", "kv_cache_dtype"):
        assert seen[name] is None, name
    assert seen["resume"] and not seen["strict"] and seen["double_quant"] is None


def test_the_summary_names_what_did_not_go_as_asked(tmp_path):
    report = {
        "layers": {"a": {"weight_error": 0.1, "fallback": "rounded"}, "c": {"weight_error": 0.3}},
        "calibration": None, "method": "nf4", "format": "f", "seconds": 1.0, "device": "cpu",
        "memory_bytes": 2**30, "kept_in_16_bit": {"b": "odd"}, "fallbacks": ["a"],
    }  # fmt: skip
    text = command.summary(report, tmp_path)
    assert "mean 0.2000, worst 0.3000 (c)" in text and "1.0 GiB" in text
    assert "b stays in 16 bit: odd" in text and "a: rounded" in text and "calibrated" not in text


def test_what_is_asked_wrongly_is_one_line(model, tmp_path, capsys):
    assert main(["quantize", model, str(tmp_path / "out"), "--method", "int4-awq"]) == 2
    assert capsys.readouterr().err.startswith("tlk: calibration must be texts")
    (tmp_path / "out").mkdir()
    assert main(["quantize", model, str(tmp_path / "out"), "--method", "int4"]) == 1
    assert "is there already" in capsys.readouterr().err
