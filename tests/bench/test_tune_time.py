import pytest

from tests.bench.tuning import BF16, CPU, FMA, GEMV, TILE, config, key
from tests.interpreter import interpret
from tlk.bench import tune_time
from tlk.bench.timing import Spread
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Call
from tlk.bench.tune_time import Timed, verdict, winner
from tlk.kernels import tuning
from tlk.kernels._linear_configs import CUBLAS
from tlk.kernels.matmul import matmul


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
    bad["BLOCK_N"] = 16  # the heuristic's own
    with pytest.raises(RuntimeError, match=r"matmul 64×128 bfloat16 M1: the heuristic's .*wrongly"):
        judged(monkeypatch, times, (GEMV, wrong))
