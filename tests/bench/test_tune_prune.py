from tests.bench.tuning import GEMV, key
from tlk.bench import tune_prune
from tlk.bench.tune_prune import Trial, compiled, spelled
from tlk.kernels._linear_configs import CUBLAS


def test_bad_machine_code_is_refused_with_its_reason():
    dot = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "PREFETCH": 0, "num_warps": 4}
    configs = [
        CUBLAS,
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 2}},
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 16}},
        {"backend": "triton", "kernel": "dot", "meta": dot | {"num_stages": 2, "BLOCK_N": 24}},
    ]
    trials = [Trial(key(running=16, dims=(8192, 4096)), c) for c in configs]
    found = {spelled(t.config): t.refusal for done in compiled(trials, 90, jobs=2) for t in done}
    fine, small, large, broken = (found[spelled(c)] for c in configs)
    assert fine is None and small is None
    assert "shared memory" in large and broken


def test_what_the_gate_finds_is_the_refusal(monkeypatch):
    monkeypatch.setattr(tune_prune, "violations", lambda metrics, large: ["spills", "and more"])
    ((trial,),) = compiled([Trial(key(), GEMV)], 90, jobs=1)
    assert trial.refusal == "spills"


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
