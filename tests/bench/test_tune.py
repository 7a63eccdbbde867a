import json

import pytest
import torch

from tests.bench.tuning import BF16, CPU, FMA, GEMV, TILE, key
from tests.interpreter import interpret
from tlk.bench import tune, tune_time
from tlk.bench.timing import Spread
from tlk.bench.tune import Options
from tlk.bench.tune_keys import Projection
from tlk.bench.tune_prune import Trial
from tlk.bench.tune_time import Timed
from tlk.cli import main
from tlk.errors import UnsupportedError
from tlk.kernels import tuning
from tlk.kernels._linear_configs import CUBLAS
from tlk.kernels.tunable import TUNABLE


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield
    tuning.forget()


def test_nothing_to_choose_is_not_measured():
    wanted = Options(ops=("matmul", "norm_linear", "gated_linear"), tokens=(1024,)).wanted()
    space = tune.candidates(wanted, 90, 132)
    assert {k.op for k in space} == {"matmul"}  # the others have but one way
    for k, configs in space.items():
        assert TUNABLE["matmul"].default(90, 132, BF16, k.dims, 1024) in configs


@pytest.fixture
def quick(monkeypatch):
    """Tuning without compiling or timing: "fma" is always the fastest."""

    def time_calls(calls, repeats, device):
        us = 1.0 if "fma" in json.dumps(tuning.lookup("matmul", 2, CPU, BF16, (1, 1), 1)) else 2.0
        return Spread(us, us, us, repeats)

    monkeypatch.setattr(tune_time, "time_calls", time_calls)
    monkeypatch.setattr(tune_time, "copies", lambda nbytes: 1)
    monkeypatch.setattr(tune, "compiled", lambda trials, arch, jobs: [list(trials)])
    monkeypatch.setattr(
        tune, "candidates", lambda wanted, *_: {k: [FMA, TILE] for k in wanted if k.running == 1}
    )
    monkeypatch.setattr(tune, "projections", lambda model: [Projection(32, 64), Projection(8, 64)])
    with interpret(sm=90):
        yield Options(ops=("matmul",), tokens=(1,), jobs=1)


def test_what_is_measured_is_written_and_used(quick, capsys):
    assert len(tune.tune(quick, CPU)) == 2
    rows = json.loads(tuning.table_path("matmul", 90).read_text())
    assert [row["dims"] for row in rows] == [[8, 64], [32, 64]]
    assert list(rows[0])[:6] == ["version", "device", "dtype", "dims", "bucket", "config"]
    assert rows[0]["config"] == FMA and (rows[0]["us"], rows[0]["default_us"]) == (1e6, 2e6)
    assert rows[0]["library_us"] == 2e6 and rows[0]["triton"] and rows[0]["date"]
    assert tuning.lookup("matmul", 2, CPU, BF16, (8, 64), 1) == FMA
    assert tuning.source_of("matmul", 2, CPU, BF16, (8, 64), 1) == "user cache"
    out = capsys.readouterr().out
    assert "matmul 8×64 bfloat16 M1: 1000000.00 ± 0.00 µs fma BLOCK_M=1" in out
    assert "2 of 2 shapes measured" in out


def test_measured_keys_are_skipped_unless_asked_again(quick):
    assert len(tune.tune(quick, CPU)) == 2
    assert tune.tune(quick, CPU) == []
    again = Options(ops=("matmul",), tokens=(1,), jobs=1, again=True)
    assert len(tune.tune(again, CPU)) == 2
    more = Options(ops=("matmul",), tokens=(1, 2), jobs=1)
    assert tune.tune(more, CPU) == []  # two tokens have no candidates here


def test_entries_of_an_older_version_are_measured_anew(quick, monkeypatch):
    tune.tune(quick, CPU)
    path = tuning.table_path("matmul", 90)
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    assert len(tune.tune(quick, CPU)) == 2
    assert [e.version for e in tuning.read(path)] == [2, 2]


def test_what_another_process_measured_meanwhile_is_not_measured_again(quick, monkeypatch):
    def compiled(trials, arch, jobs):
        other = Options(ops=("matmul",), tokens=(1,), jobs=1)
        monkeypatch.setattr(tune, "compiled", lambda trials, arch, jobs: [list(trials)])
        assert len(tune.tune(other, CPU)) == 2
        return [list(trials)]

    monkeypatch.setattr(tune, "compiled", compiled)
    assert tune.tune(quick, CPU) == []


def test_the_budget_ends_it_between_shapes(quick, monkeypatch):
    times = iter([0.0, 1.0, 2.0, 30.0])  # start, before compiling, before each shape
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(times))
    budget = Options(ops=("matmul",), tokens=(1,), jobs=1, budget=10.0)
    assert len(tune.tune(budget, CPU)) == 1
    assert len(tuning.read(tuning.table_path("matmul", 90))) == 1


def test_the_shipped_table_is_written_on_request(quick):
    tune.tune(Options(ops=("matmul",), tokens=(1,), jobs=1, table=True), CPU)
    assert not tuning.table_path("matmul", 90).exists()
    path = tuning.table_path("matmul", 90, shipped=True)
    assert len(tuning.read(path)) == 2 and path.parent.parent == tuning.SHIPPED
    found = tuning.source_of("matmul", 2, CPU, BF16, (8, 64), 1)
    assert found == "shipped table for this device"


def test_a_gpu_of_an_unknown_sm_is_refused(quick):
    with interpret(sm=87), pytest.raises(UnsupportedError, match=r"sm_75, .*, not for sm_87"):
        tune.tune(quick, CPU)


def test_options_say_what_is_wrong():
    for wrong, message in (
        ({"ops": ("matmul", "x")}, "ops must be of matmul, .* got x"),
        ({"sm": 91}, r"sm must be one of \[75, .*\], got 91"),
        ({"tokens": (0,)}, "at least 1"),
        ({"jobs": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**wrong)


def test_the_command_hands_on_its_flags(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(tune, "tune", lambda options, device: seen.append(options) or [])
    assert main(["tune"]) == 0 and seen.pop() == Options()
    flags = (
        "--shapes tiny qwen3-0.6b --dtype float16 --tokens 1 8 --table --again --budget 5 --jobs 3"
    )
    assert main(["tune", "matmul", "norm_linear", *flags.split()]) == 0
    assert seen.pop() == Options(
        ops=("matmul", "norm_linear"),
        shapes=("tiny", "qwen3-0.6b"),
        dtype="float16",
        tokens=(1, 8),
        table=True,
        again=True,
        budget=5.0,
        jobs=3,
    )
    assert main(["tune", "nix"]) == 2
    assert capsys.readouterr().err.startswith("tlk: ops must be of matmul, ")


def test_a_wrong_result_fails_the_command(monkeypatch, capsys):
    default = Timed(GEMV, 1.0, 0.0)
    found = tune_time.Verdict(key(), default, default, None, [FMA])
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(tune, "tune", lambda options, device: [found])
    assert main(["tune"]) == 1
    said = "wrong result: matmul 64×128 bfloat16 M1: fma BLOCK_M=1 BLOCK_N=4"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_nothing_to_time(capsys):
    assert main(["tune"]) == 1
    assert "--sm N compiles candidates without one" in capsys.readouterr().err


def test_the_gate_says_what_is_left_of_each_key(monkeypatch, capsys):
    def compiled(trials, arch, jobs):
        assert (arch, jobs) == (89, 2)
        yield [Trial(t.key, t.config, None if t.config == CUBLAS else "bad") for t in trials]

    monkeypatch.setattr(tune, "compiled", compiled)
    assert (
        main(["tune", "matmul", "--sm", "89", "--shapes", "tiny", "--tokens", "64", "--jobs", "2"])
        == 0
    )
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("matmul 256×256 bfloat16 M64: 1 of ")
    assert last.endswith("× bad")
