import json

import pytest
import torch

from tests.interpreter import interpret
from tlk.bench import tune, tune_keys, tune_prune, tune_time
from tlk.bench.timing import Spread
from tlk.bench.tune import Options
from tlk.bench.tune_call import Call
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import PARTS, Key, Projection, projections
from tlk.bench.tune_prune import Trial, compiled, spelled
from tlk.bench.tune_time import Timed, verdict, winner
from tlk.cli import main
from tlk.errors import UnsupportedError
from tlk.kernels import tuning
from tlk.kernels.aot import GPUS
from tlk.kernels.matmul import CUBLAS, matmul
from tlk.kernels.tunable import TUNABLE

CPU, BF16 = torch.device("cpu"), torch.bfloat16
LAYER = Projection(64, 128, norm=True, gated=True)


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield
    tuning.forget()


def key(op="matmul", running=1, dims=(64, 128), layer=LAYER):
    return Key(op, BF16, dims, running, layer)


def test_the_layers_of_a_model():
    assert set(projections("llama-3.1-8b")) == {
        Projection(6144, 4096, norm=True),
        Projection(4096, 4096, residual=True),
        Projection(28672, 4096, norm=True, gated=True),
        Projection(4096, 14336, residual=True),
        Projection(128256, 4096, norm=True, head=True),
    }
    tied = [layer for layer in projections("qwen3-0.6b") if layer.head]
    assert tied == [Projection(151936, 1024, norm=True, head=True)]
    assert projections("qwen3-30b-a3b") == list(PARTS["qwen3-30b-a3b"])


def test_the_layers_of_a_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tune_keys.SHAPES["tiny"]))
    assert projections(str(file)) == projections(str(tmp_path)) == projections("tiny")
    with pytest.raises(ValueError, match=r"shapes must be a config\.json.*llama-3\.1-8b.*got nix"):
        projections("nix")


def test_layer_norms_are_no_norm_linears():
    fields = {**tune_keys.SHAPES["tiny"], "model_type": "nemotron", "hidden_act": "relu2"}
    fields |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tune_keys.SHAPES, "it", fields)
        layers = projections("it")
        wanted = Options(shapes=("it",), tokens=(1,)).wanted()
    assert not any(layer.norm or layer.gated for layer in layers)
    assert {k.op for k in wanted} == {"matmul"}


def test_keys_are_few_tokens_first_and_heads_see_few():
    wanted = Options(tokens=(512, 1)).wanted()
    assert [k.running for k in wanted] == sorted(k.running for k in wanted)
    assert [str(k) for k in wanted if k.op != "matmul" and k.running == 1] == [
        "norm_linear 6144×4096 bfloat16 M1",
        "norm_linear 28672×4096 bfloat16 M1",
        "norm_linear 128256×4096 bfloat16 M1",
        "gated_linear 28672×4096 bfloat16 M1",
    ]
    assert not any(k.layer.head for k in wanted if k.running == 512)
    two = Options(tokens=(3, 4), shapes=("llama-3.1-8b", "llama-3.1-8b")).wanted()
    assert len(two) == len(Options(tokens=(4,)).wanted())  # the same bucket, the same layers


def test_a_layer_before_a_residual_is_the_one_measured():
    layers = [Projection(64, 64, norm=True), Projection(64, 64, residual=True)]
    (only,) = tune_keys.keys(["matmul"], layers, [1], Options()._shape)
    assert only.layer.residual
    x, weight, residual = CALLS["matmul"].make(only).inputs(tune_time.Inputs("cpu", BF16))
    assert (x.shape, weight.shape, residual.shape) == ((1, 64), (64, 64), (1, 64))


@pytest.mark.parametrize("op", TUNABLE)
@pytest.mark.parametrize("running", [1, 3, 16, 64, 300])
@pytest.mark.parametrize("arch", GPUS)
def test_search_spaces_are_small_distinct_and_know_the_library(op, running, arch):
    call = TUNABLE[op].candidates
    for dtype in (torch.float16, torch.float32):
        configs = call(arch, GPUS[arch].sm_count, dtype, (28672, 4096), running)
        assert len({spelled(c) for c in configs}) == len(configs) < 120
        assert configs[-1]["backend"] in ("cublas", "unfused", "separate")
        kernels = {c.get("kernel") for c in configs}
        if arch < 80 or dtype == torch.float32:
            assert "dot" not in kernels  # below sm_80 no tensor cores, and none of float32
        if running > 64:
            assert not kernels & {"gemv", "fma", "dot"}
        if running == 1:
            assert {"gemv"} < kernels | {"x"}


def test_rows_too_long_for_registers_and_gates_of_one_row_are_no_candidates():
    def kernels(op, dims):
        return [c for c in TUNABLE[op].candidates(90, 132, BF16, dims, 1) if "kernel" in c]

    assert {c["kernel"] for c in kernels("matmul", (4096, 16385))} == {"fma"}
    assert {c["kernel"] for c in kernels("matmul", (4096, 16384))} == {"gemv"}
    assert min(c["meta"]["BLOCK_N"] for c in kernels("gated_linear", (4096, 8192))) == 2
    assert min(c["meta"]["BLOCK_N"] for c in kernels("matmul", (4096, 8192))) == 1


def test_nothing_to_choose_is_not_measured():
    wanted = Options(tokens=(1024,)).wanted()
    space = tune.candidates(wanted, 90, 132)
    assert {k.op for k in space} == {"matmul"}
    for k, configs in space.items():
        assert TUNABLE["matmul"].default(90, 132, BF16, k.dims, 1024) in configs


def test_bad_machine_code_is_refused_with_its_reason():
    dot = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "PREFETCH": 0, "num_warps": 4}
    configs = [
        CUBLAS,
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 2}},
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 16}},
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 2, "BLOCK_N": 24}},
    ]
    trials = [Trial(key(running=16, dims=(256, 4096)), c) for c in configs]
    gemv = {"BLOCK_N": 8, "PER_SM": 1, "MOST_TILES": 1, "num_warps": 2}
    configs.append({"backend": "triton", "kernel": "gemv", "meta": gemv})
    trials.append(Trial(key(dims=(256, 4096)), configs[-1]))
    found = {spelled(t.config): t.refusal for done in compiled(trials, 90, jobs=2) for t in done}
    fine, small, large, broken, spilling = (found[spelled(c)] for c in configs)
    assert fine is None and small is None
    assert "shared memory" in large and broken and "spilled" in spilling


def test_one_compilation_serves_what_differs_in_its_launch():
    gemv = {"BLOCK_N": 4, "PER_SM": 1, "MOST_TILES": 2, "num_warps": 4}
    trials = [
        Trial(k, {"backend": "triton", "kernel": "gemv", "meta": gemv | {"MOST_TILES": most}})
        for k in (key(), key(dims=(32, 128)))
        for most in (1, 2)
    ]
    (done,) = compiled(trials, 80, jobs=1)
    assert [t.refusal for t in done] == [None] * 4


def test_a_process_that_dies_refuses_its_candidate(monkeypatch):
    monkeypatch.setattr(tune_prune, "_refusals", lambda part, arch: 1 / 0)
    ((trial,),) = compiled([Trial(key(), CUBLAS)], 90, jobs=1)
    assert trial.refusal == "ZeroDivisionError: division by zero"


class Clock:
    """Stands for `time_calls`: microseconds by the name of the configuration in force."""

    def __init__(self, times, spread=0.0):
        self.times, self.spread, self.asked = times, spread, []

    def __call__(self, calls, repeats, device):
        assert len(calls) >= 1
        config = tuning.lookup("matmul", 2, CPU, BF16, (64, 128), 1)
        assert tuning.source_of("matmul", 2, CPU, BF16, (64, 128), 1) == "forced"
        name = config.get("kernel", config["backend"])
        self.asked.append(name)
        us = self.times[name]
        return Spread(us * 1e-6, (us - self.spread) * 1e-6, (us + self.spread) * 1e-6, repeats)


def config(kernel, **meta):
    return {"backend": "triton", "kernel": kernel, "meta": meta}


GEMV = config("gemv", BLOCK_N=4, PER_SM=1, MOST_TILES=9, num_warps=4)
FMA = config("fma", BLOCK_M=1, BLOCK_N=4, BLOCK_K=64, num_warps=4)
TILE = config("tile", BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, GROUP_M=8)


def judged(monkeypatch, times, candidates=(GEMV, FMA, TILE), spread=0.0):
    clock = Clock(times, spread)
    monkeypatch.setattr(tune_time, "time_calls", clock)
    monkeypatch.setattr(tune_time, "copies", lambda nbytes: 2)
    with interpret(sm=90):
        return verdict(key(), candidates, GEMV, CPU), clock


def test_the_fastest_wins_and_all_final_ones_meet_again(monkeypatch):
    found, clock = judged(monkeypatch, {"gemv": 10, "fma": 9, "tile": 12, "cublas": 11})
    assert (found.best.config, found.best.us) == (FMA, pytest.approx(9))
    assert (found.default.config, found.default.us) == (GEMV, pytest.approx(10))
    assert (found.library.config, found.library.us) == (CUBLAS, pytest.approx(11))
    assert clock.asked[:4] == ["gemv", "cublas", "fma", "tile"] and not found.wrong
    assert clock.asked[4:8] == clock.asked[8:12] == clock.asked[12:16]
    assert set(clock.asked[4:8]) == {"gemv", "cublas", "fma", "tile"}


def test_only_the_best_meet_again(monkeypatch):
    monkeypatch.setattr(tune_time, "FINALISTS", 1)
    _, clock = judged(monkeypatch, {"gemv": 10, "fma": 9, "tile": 12, "cublas": 11})
    assert clock.asked[4:7] == ["gemv", "cublas", "fma"]


def test_within_the_noise_the_heuristic_stays(monkeypatch):
    times = {"gemv": 10, "fma": 9.95, "tile": 12, "cublas": 11}
    assert judged(monkeypatch, times)[0].best.config == GEMV
    times["fma"] = 9.5
    assert judged(monkeypatch, times)[0].best.config == FMA
    assert judged(monkeypatch, times, spread=0.5)[0].best.config == GEMV


def test_noise_is_of_both():
    default, best = Timed(GEMV, 10.0, 0.3), Timed(FMA, 9.5, 0.3)
    assert winner(default, [default, best]) is default
    assert winner(default, [default, Timed(FMA, 9.3, 0.3)]).config == FMA


def test_a_wrong_result_never_wins(monkeypatch):
    calls = tune_time.CALLS["matmul"]
    bad = {"BLOCK_N": 2}

    def make(key):
        call = calls.make(key)

        def run(x, weight, residual):
            y = matmul(x, weight, residual=residual)
            forced = tuning.lookup("matmul", 2, CPU, BF16, (64, 128), 1)
            return y * 1.1 if forced.get("meta", {}).get("BLOCK_N") == bad["BLOCK_N"] else y

        return Call(call.inputs, run, call.reference, call.library)

    monkeypatch.setitem(CALLS, "matmul", type(calls)(calls.dims, make))
    wrong = config("fma", BLOCK_M=1, BLOCK_N=2, BLOCK_K=64, num_warps=4)
    times = {"gemv": 10, "fma": 9, "cublas": 11}
    found, _ = judged(monkeypatch, times, (GEMV, wrong))
    assert found.wrong == [wrong] and found.best.config == GEMV
    bad["BLOCK_N"] = 4  # the heuristic's own
    with pytest.raises(RuntimeError, match=r"matmul 64×128 bfloat16 M1: the heuristic's .*wrongly"):
        judged(monkeypatch, times, (GEMV, wrong))


@pytest.mark.parametrize("op", TUNABLE)
@pytest.mark.parametrize("running", [1, 5, 20])
@pytest.mark.parametrize("layer", [LAYER, Projection(64, 128, residual=True)])
def test_every_op_is_called_as_its_layers_do(op, running, layer, monkeypatch):
    """The default and the library pass the check against the reference, on a CPU's interpreter."""
    monkeypatch.setattr(
        tune_time, "time_calls", lambda calls, *_: Spread(len(calls), len(calls), len(calls), 1)
    )
    monkeypatch.setattr(tune_time, "copies", lambda nbytes: 3)
    default = TUNABLE[op].default(90, 8, BF16, (64, 128), running)
    with interpret(sm=90):
        found = verdict(key(op, running, layer=layer), [], default, CPU)
    assert not found.wrong and found.best.us == pytest.approx(3e6)


WIDE = (
    Projection(256, 256, norm=True),
    Projection(256, 256, residual=True),
    Projection(256, 256, norm=True, gated=True),
)


@pytest.mark.parametrize("op", CALLS)
def test_calls_give_what_their_references_say(op):
    """As PyTorch's own ops on a CPU; and compiling them needs the same shapes, of empty tensors."""
    for layer in WIDE:
        if (dims := CALLS[op].dims(layer)) is None:
            continue
        call = CALLS[op].make(Key(op, CALLS[op].dtype or BF16, dims, 5, layer))
        inputs = call.inputs(tune_time.Inputs("cpu", BF16))
        empty = call.inputs(tune_time.Inputs("cpu", BF16, empty=True))
        assert [t is None or (t.shape, t.dtype) for t in inputs] == [
            t is None or (t.shape, t.dtype) for t in empty
        ]
        expected = call.reference(*tune_time._copied(inputs))
        actual = call.run(*inputs)
        assert actual.dtype == BF16 and tune_time._equal(actual, expected, 2**-6)
    assert op.startswith(("norm", "gated")) or CALLS[op].dims(WIDE[1]) is not None


def test_dims_of_quantized_weights_tell_their_groups():
    layer = Projection(256, 512)
    assert CALLS["dequant_mm.int4"].dims(layer) == (256, 512, 128)
    assert CALLS["dequant_mm.int8"].dims(layer) == (256, 512, 512)
    assert CALLS["dequant_mm.nv4"].dims(layer) == (256, 512, 16)
    assert CALLS["scaled_mm.fp8"].dims(layer) == (256, 512)
    assert CALLS["dequant_mm.int4"].dims(Projection(256, 96)) is None  # no whole groups


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
