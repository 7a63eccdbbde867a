import argparse
import dataclasses
import json
import shlex

import pytest
import torch

from tests.bench.rows import row
from tlk.bench import kernel_command, kernel_page
from tlk.bench.case import Case, load_cases
from tlk.bench.goals import GOALS
from tlk.bench.kernel_command import KernelOptions, add_arguments, run, select
from tlk.bench.kernels import WrongResultError
from tlk.bench.limits import Limits
from tlk.errors import UnsupportedError

LIMITS = Limits(copy=3e12, read=3e12, launch=1e-6, matmul={"bfloat16": 7e14})


def case(op, shape, run=lambda x: x * 2, dtypes=(torch.bfloat16, torch.float32)):
    return Case(
        op, shape, lambda new: (new.randn(64),), run, lambda size: 128 * size, lambda x: x * 2,
        peers={"torch": lambda x: x + x}, dtypes=dtypes,
    )  # fmt: skip


CASES = {
    "norm": (case("rms_norm", "T1"), case("layer_norm", "T1"), case("rms_norm", "T8")),
    "rope": (case("turn", "T1", dtypes=(torch.float32,)),),
}


@pytest.fixture(autouse=True)
def few_cases(monkeypatch):
    monkeypatch.setattr(kernel_command, "load_cases", lambda: CASES)
    monkeypatch.setattr(kernel_command, "kernel_limits", lambda device: LIMITS)


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(words))


def names(**options):
    return [str(c) for c in select(KernelOptions(**options))]


def test_which_cases():
    assert names() == ["rms_norm-T1", "layer_norm-T1", "rms_norm-T8", "turn-T1"]
    assert names(names=["norm"]) == ["rms_norm-T1", "layer_norm-T1", "rms_norm-T8"]
    assert names(names=["rms_norm", "rope"], pattern="T1$") == ["rms_norm-T1", "turn-T1"]
    with pytest.raises(
        ValueError, match="no kernel is called nothing: names are layer_norm, norm, "
    ):
        names(names=["nothing", "norm"])
    with pytest.raises(ValueError, match="filter must match a case, got 'T9'"):
        names(pattern="T9")


def test_cases_of_goals(monkeypatch):
    monkeypatch.setattr(kernel_command, "load_cases", load_cases)
    found = names(goals=True)
    assert found == [
        case for case in names() if case in {f"{g.op}-{s}" for g in GOALS for s in g.shapes}
    ]
    assert len(found) == sum(len(goal.shapes) for goal in GOALS)
    with pytest.raises(ValueError, match="filter must match a case"):
        names(goals=True, names=["gptq_block"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"dtype": "int4"}, "dtype must be auto, all, bfloat16, float16, float32, got 'int4'"),
        ({"pattern": "("}, "filter must be a regular expression"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KernelOptions(**options)


def test_a_recorded_command_parses_to_what_was_measured():
    options = KernelOptions(
        names=("norm", "turn"), pattern="T1|T8", goals=True, peers=("flashinfer", "torch"), dtype="float16", repeats=3
    )  # fmt: skip
    words = shlex.split(options.command())
    values = parse(*words[3:])
    assert words[:3] == ["tlk", "bench", "kernels"] and not values.pop("listed")
    values["names"], values["peers"] = tuple(values["names"]), tuple(values["peers"])
    assert KernelOptions(**values) == options
    assert KernelOptions().command() == "tlk bench kernels"
    assert KernelOptions(peers=()).command() == "tlk bench kernels --peers"


def test_which_peers():
    assert KernelOptions().wants("anything")
    some = KernelOptions(peers=("FlashInfer", "torch"))
    assert some.wants("flashinfer fa3") and some.wants("torch cudnn") and not some.wants("liger")
    assert not KernelOptions(peers=()).wants("torch")


def test_cases_are_listed_without_a_gpu(capsys):
    assert run(**parse("rope", "norm", "--filter", "T1", "--list")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rms_norm-T1  bfloat16 float32", "layer_norm-T1  bfloat16 float32", "turn-T1  float32",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_is_possible():
    with pytest.raises(UnsupportedError, match="needs a GPU and torch finds none: --list"):
        run(**parse())


def test_on_a_cpu_it_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    words = ["--device", "cpu", "--repeats", "2", "--peers", "torch", "--commit", "abc"]
    assert run(**parse(*words, "--json", str(file))) == 0
    out = capsys.readouterr().out.splitlines()
    assert "copy 3.00 TB/s" in out[0] and out[1].startswith("op ")
    assert [line.split()[:3] for line in out[2:6]] == [
        ["rms_norm", "T1", "bf16"], ["layer_norm", "T1", "bf16"], ["rms_norm", "T8", "bf16"],
        ["turn", "T1", "fp32"],
    ]  # fmt: skip
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 4 and records[0]["commit"] == "abc" and records[0]["gpu"] is None
    assert records[0]["command"] == "tlk bench kernels --device cpu --peers torch --repeats 2"
    assert records[0]["versions"]["torch"] == torch.__version__
    assert records[0]["peers"]["torch"]["median_us"] > 0
    assert records[0]["limits"]["matmul"] == {"bfloat16": 7e14}


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    file = tmp_path / "lines.jsonl"
    cases = {"norm": (case("a", "T1"), case("b", "T1", interrupted), case("c", "T1"))}
    monkeypatch.setattr(kernel_command, "load_cases", lambda: cases)
    with pytest.raises(KeyboardInterrupt):
        run(**parse("--device", "cpu", "--repeats", "1", "--peers", "--json", str(file)))
    assert [json.loads(x)["op"] for x in file.read_text().splitlines()] == ["a"]


def interrupted(x):
    raise KeyboardInterrupt


def test_every_dtype(capsys):
    assert (
        run(**parse("norm", "--device", "cpu", "--dtype", "all", "--repeats", "1", "--peers")) == 0
    )
    assert capsys.readouterr().out.count("fp32") == 3
    assert run(**parse("--device", "cpu", "--dtype", "float32", "--repeats", "1", "--peers")) == 0
    assert capsys.readouterr().out.count("fp32") == 4


def wrong(x):
    return x * 3


def crashing(x):
    raise RuntimeError("out of\n memory")


def test_a_wrong_result_fails_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    cases = {"norm": (case("a", "T1", wrong), case("b", "T1", crashing), case("c", "T1"))}
    monkeypatch.setattr(kernel_command, "load_cases", lambda: cases)
    file = tmp_path / "lines.jsonl"
    assert run(**parse("--device", "cpu", "--repeats", "1", "--peers", "--json", str(file))) == 1
    said = capsys.readouterr()
    assert "tlk: a-T1 bfloat16: WrongResultError: a-T1: tensor 0 is off by 50.0" in said.err
    assert "tlk: b-T1 bfloat16: RuntimeError: out of memory" in said.err
    assert [json.loads(x)["op"] for x in file.read_text().splitlines()] == ["c"]


def test_what_is_too_large_for_a_cpu_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(kernel_command, "small", lambda case, dtype: case.op != "rms_norm")
    assert run(**parse("norm", "--device", "cpu", "--repeats", "1", "--peers")) == 0
    out = capsys.readouterr().out
    assert "2 cases left out: too large for a CPU" in out and "layer_norm" in out


def test_what_an_old_gpu_cannot_run_is_left_out(monkeypatch):
    monkeypatch.setattr(kernel_command, "sm", lambda device: 80)
    gpu, newer = torch.device("cuda"), dataclasses.replace(case("a", "s"), oldest=89)
    assert kernel_command._beyond(newer, torch.bfloat16, gpu) == "for sm_89 and newer"
    assert kernel_command._beyond(case("a", "s"), torch.bfloat16, gpu) is None


def test_kept_results_refuse_rows_without_their_peers(monkeypatch, capsys, tmp_path):
    made = {
        "rms_norm-T1": row(),
        "rms_norm-T8": row(peers={"flashinfer": 51.0}),
        "layer_norm-T1": row("x"),
    }
    monkeypatch.setattr(kernel_command.Bench, "row", lambda self, case, dtype: made[str(case)])
    monkeypatch.setattr(
        kernel_command, "machine", lambda device: {"gpu": "NVIDIA H100", "cpu": "c", "versions": {}}
    )
    file = tmp_path / "bench/results/h100.jsonl"
    words = ["norm", "--device", "cpu", "--commit", "abc", "--json", str(file)]
    assert run(**parse(*words)) == 1
    said = capsys.readouterr()
    assert "tlk: refused rms_norm-T8192-N4096 bfloat16: has no time of flashinfer" in said.err
    assert len(file.read_text().splitlines()) == 2
    assert "goal rms_norm T=8192: " in said.out


def test_a_folder_gets_everything(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra tlk[bench]")
    for _ in range(2):  # the second run replaces the first
        assert (
            run(**parse("rope", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "o")))
            == 0
        )
    files = {f.name: f for f in (tmp_path / "o").iterdir()}
    assert set(files) == {"kernels.jsonl", "kernels.csv", "turn.png", "index.html"}
    assert len(files["kernels.jsonl"].read_text().splitlines()) == 1
    assert '<h2 id="turn">' in files["index.html"].read_text()


def test_an_earlier_run_is_shown_again(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra tlk[bench]")
    file, out = tmp_path / "lines.jsonl", tmp_path / "o"
    words = ["--device", "cpu", "--repeats", "1", "--peers", "torch"]
    assert run(**parse(*words, "--json", str(file))) == 0
    table = capsys.readouterr().out
    assert run(**parse("--from", str(file), "--out", str(out))) == 0
    assert capsys.readouterr().out == table
    assert len(list(out.glob("*.png"))) == 3 and (out / "index.html").exists()
    assert len((out / "kernels.jsonl").read_text().splitlines()) == 4
    assert run(**parse("rms_norm", "--filter", "T8", "--from", str(file))) == 0
    assert "T8" in (shown := capsys.readouterr().out) and "T1" not in shown
    assert len(file.read_text().splitlines()) == 4
    kept = tmp_path / "bench/results/h100.jsonl"
    assert run(**parse("--from", str(file), "--json", str(kept))) == 1  # measured on no GPU
    assert not kept.exists()


def test_plots_that_cannot_be_drawn_stop_it_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_page, "find_spec", lambda name: None)
    monkeypatch.setattr(kernel_command, "kernel_limits", lambda device: pytest.fail("measured"))
    with pytest.raises(UnsupportedError, match=r"tlk\[bench\]"):
        run(**parse("--device", "cpu", "--out", str(tmp_path)))


def test_wrong_results_are_not_hidden_as_peer_errors():
    assert issubclass(WrongResultError, AssertionError)
