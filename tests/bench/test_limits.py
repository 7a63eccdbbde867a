import pytest
import torch

from tlk.bench.limits import Limits, _copy, _read, bound, kernel_limits

LIMITS = Limits(
    copy=4e12, read=5e12, launch=2e-6, matmul={"bfloat16": 7e14, "float8_e4m3fn": 1.3e15}
)


def test_memory_bounds_what_multiplies_little():
    found = bound(LIMITS, nbytes=8_000_000, flops=0, written=4_000_000, operands="bfloat16")
    assert found.seconds == pytest.approx(4e-6) and (found.by, found.unit) == ("copy", "TB/s")


def test_what_writes_next_to_nothing_is_held_against_reading():
    found = bound(LIMITS, nbytes=10_000_000, flops=0, written=400_000, operands="bfloat16")
    assert found.seconds == pytest.approx(4e-6) and found.by == "read"


@pytest.mark.parametrize(
    ("operands", "rate"), [("bfloat16", 7e14), ("float16", 7e14), ("float8_e4m3fn", 1.3e15)]
)
def test_tensor_cores_bound_what_multiplies_much(operands, rate):
    found = bound(LIMITS, nbytes=1000, flops=10**12, written=500, operands=operands)
    assert found.seconds == pytest.approx(1e12 / rate)
    assert found.unit == "TFLOP/s" and found.by == f"{operands} matmul"


def test_without_a_rate_bytes_are_what_is_known():
    assert bound(LIMITS, 1000, 10**15, 500, "int8").by == "copy"


def test_a_cpu_has_limits_too():
    limits = kernel_limits(torch.device("cpu"))
    assert 1e8 < limits.copy < 1e13 and limits.launch > 0 and set(limits.matmul) == {"float32"}
    assert "copy" in str(limits) and limits.to_dict()["matmul"] == limits.matmul


def test_the_kernel_that_reads_reads_all(device):
    x = torch.arange(20000, dtype=torch.int32, device=device) % 7
    sums = _read(x, False)
    assert sums.tolist() == [int(part.sum()) for part in x.split(8192)]


def test_the_kernel_that_copies_copies_all(device):
    x = torch.arange(5000, dtype=torch.int32, device=device)
    y = torch.zeros_like(x)
    _copy(x, y, 2048)
    assert torch.equal(x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_limits_of_a_gpu_are_plausible():
    limits = kernel_limits(torch.device("cuda"))
    assert 0.1e12 < limits.copy < limits.read * 1.1 < 20e12
    assert 1e-7 < limits.launch < 2e-5 and limits.matmul["float32"] < limits.matmul["bfloat16"]
