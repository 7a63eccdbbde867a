import torch

from tlk import __version__
from tlk.bench.ceilings import ceilings, machine, seconds

CPU = torch.device("cpu")


def test_seconds_counts_after_the_warm_up():
    calls = []
    spread = seconds(lambda: calls.append(1), 4, CPU, warmup=3)
    assert len(calls) == 7
    assert 0 <= spread["min"] <= spread["median"] <= spread["max"]


def test_limits_of_this_cpu_are_plausible():
    limits = ceilings(CPU)
    assert 1e8 < limits["copy_bytes_per_s"] < 1e13
    assert 1e8 < limits["matmul_flops"] < 1e14 and limits["matmul_n"] == 512


def test_the_machine_is_named():
    named = machine(CPU)
    assert named["gpu"] is None and named["cpu"]
    assert named["versions"]["torch"] == torch.__version__
    assert named["versions"]["tlk"] == __version__
