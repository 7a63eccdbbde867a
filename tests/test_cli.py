import json
from types import SimpleNamespace

import pytest

from tests.demo.tiny import save_tiny
from tlk import __version__, cli
from tlk.cli import main
from tlk.demo import corpus
from tlk.doctor import Check
from tlk.errors import UnsupportedError
from tlk.quant.config import QuantConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_demo_compares_prints_and_writes(model, tmp_path, capsys):
    file = tmp_path / "demo.json"
    command = ["demo", "--model", model, "--prompt", "def f", "--max-new-tokens", "4"]
    assert main([*command, "--device", "cpu", "--json", str(file)]) == 0
    values = json.loads(file.read_text())
    assert values["prompt"] == "def f" and len(values["tokens"]) == 4 and values["matched"]
    assert "4 new, the same from both" in capsys.readouterr().out


def test_demo_fails_if_the_tokens_differ(monkeypatch, capsys):
    result = SimpleNamespace(matched=False)
    monkeypatch.setattr(cli.compare, "compare", lambda *a, **k: result)
    assert main(["demo"]) == 1
    assert "matched=False" in capsys.readouterr().out


def test_generate_streams_text(model, capsys):
    assert main(["generate", model, "def f", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("def f")


def test_generate_hands_on_every_option(monkeypatch):
    seen = {}
    monkeypatch.setattr(cli.generate, "stream", lambda *a, **k: seen.update(k, a=a))
    options = "--max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3 --dtype float16"
    assert main(["generate", "m", "p", *options.split()]) == 0
    assert seen == {
        "a": ("m", "p"),
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "dtype": "float16",
        "device": "auto",
    }


def test_verify_prints_the_differences(model, capsys):
    assert main(["verify", model, "--device", "cpu"]) == 0
    assert "top-1 agreement 100.00%" in capsys.readouterr().out


def test_verify_prints_what_quantization_costs(model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps(next(iter(corpus.texts(["json"]).values()))[:3000]))
    how = ["--device", "cpu", "--text", str(file)]
    assert main(["verify", model, *how, "--quantization", "int4", "--group-size", "64"]) == 0
    text = capsys.readouterr().out
    assert "1536 positions" in text and "KL " in text and "top-1 agreement" in text
    assert "perplexity " in text and "before quantization (" in text
    assert main(["verify", model, *how]) == 0
    assert "perplexity" not in capsys.readouterr().out
    assert main(["verify", model, "--group-size", "64"]) == 2
    assert "--quantization must be given for group_size" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(cli, "optimize", lambda m, quantization: seen.append(quantization))
    monkeypatch.setattr(cli, "verify", lambda *a: None)
    options = ["--quantization", "int4-gptq", "--calibration", "c", "--zero-points"]
    assert main(["verify", model, *how, *options]) == 0
    assert seen == [QuantConfig("int4-gptq", calibration="c", symmetric=False)]


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_measures_prints_and_writes(kind, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    flags = "--device cpu --input-len 4 --output-len 2 --max-model-len 32 --kv-cache-memory 1048576"
    count = {"throughput": "--num-prompts", "latency": "--batch-size"}[kind]
    words = ["bench", kind, "--random-weights", "tiny", *flags.split(), count, "2"]
    assert main([*words, "--repeats", "1", "--warmup", "0", "--json", str(file)]) == 0
    (record,) = map(json.loads, file.read_text().splitlines())
    assert record["benchmark"] == kind and record["figures"]["tlk"]["output_throughput"] > 0
    assert "output_throughput" in capsys.readouterr().out


def test_bench_kernels_lists_its_cases(capsys):
    assert main(["bench", "kernels", "norm", "--list", "--filter", "^rms_norm-T1-"]) == 0
    assert "rms_norm-T1-N4096  bfloat16 float16 float32" in capsys.readouterr().out.splitlines()


def test_bench_kernels_checks_times_and_writes(tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    words = [
        "rms_norm",
        "--filter",
        "T1-N4096$",
        "--device",
        "cpu",
        "--peers",
        "torch",
        "--repeats",
        "2",
    ]
    assert main(["bench", "kernels", *words, "--json", str(file)]) == 0
    (record,) = map(json.loads, file.read_text().splitlines())
    assert record["op"] == "rms_norm" and record["peers"]["torch"]["median_us"] > 0
    assert main(["bench", "kernels", "no-such-kernel"]) == 2
    assert "no kernel is called no-such-kernel" in capsys.readouterr().err


def test_bench_says_what_it_was_asked_wrongly(capsys):
    assert main(["bench", "latency"]) == 2
    assert capsys.readouterr().err == "tlk: give either a model or random_weights, and not both\n"


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("note", 0), ("fault", 1)])
def test_doctor_fails_on_a_fault(monkeypatch, capsys, state, status):
    monkeypatch.setattr(cli.doctor, "check", lambda: [Check("GPU", state, "said")])
    assert main(["doctor"]) == status
    assert capsys.readouterr().out.split() == [state, "GPU", "said"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UnsupportedError("no kernel\n  for it"), 1, "tlk: no kernel for it\n"),
        (OSError("no such repository"), 1, "tlk: no such repository\n"),
        (ValueError("top_k must be 1"), 2, "tlk: top_k must be 1\n"),
    ],
)
def test_errors_are_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli.generate, "stream", fail)
    assert main(["generate", "m", "p"]) == status
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.generate, "stream", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "m", "p"])


@pytest.mark.parametrize(
    ("command", "status"),
    [(["generate", "/no/such/folder", "x"], 1), (["generate", "MODEL", ""], 2)],
)
def test_bad_input_from_the_outside(model, capsys, command, status):
    assert main([model if c == "MODEL" else c for c in command]) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith("tlk: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"tlk {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nothing"], ["demo", "--device", "tpu"], ["bench"]])
def test_a_command_line_that_does_not_parse(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
