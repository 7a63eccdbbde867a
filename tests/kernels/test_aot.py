import faulthandler
import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from tlk.kernels import aot
from tlk.kernels._device import sm, sm_count
from tlk.kernels._pdl import allow_next, wait_for_previous
from tlk.kernels.aot import Failure, dry_run, forked, isolated, measure, violations
from tlk.kernels.dequant_mm import dequant_mm
from tlk.kernels.norm import rms_norm


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, k, stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, kk = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + m[:, None] * stride + (start + kk)[None, :])
        b = tl.load(b_ptr + n[None, :] * stride + (start + kk)[:, None])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * stride + n[None, :], acc)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i * step, tl.load(x_ptr + i * step))


def matmul(capability, tile, dtype=torch.float16, stride=512, precision="ieee", **options):
    """Compile `_matmul_kernel` in a child; its metrics and violations."""

    def compile_it():
        a = torch.empty(512 * 512, dtype=dtype)
        with dry_run(capability) as launches:
            c = torch.empty(512 * 512)
            _matmul_kernel[(1,)](a, a, c, 512, stride, *tile, precision, **options)
        metrics = measure(launches[0].compiled)
        return metrics, violations(metrics, launches[0].large)

    return isolated(compile_it)


@triton.jit
def _dependent_kernel(x_ptr, y_ptr, PDL: tl.constexpr):
    allow_next(PDL)
    i = tl.arange(0, 128)
    wait_for_previous(PDL)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize(
    "capability, waits, good", [(90, True, True), (90, False, False), (120, True, True)]
)
def test_dependent_launches_wait(capability, waits, good):
    def compile_it():
        x = torch.empty(128)
        with dry_run(capability) as launches:
            _dependent_kernel[(1,)](x, x, waits, launch_pdl=True)
        return measure(launches[0].compiled)

    metrics = isolated(compile_it)
    assert (metrics.dependent, metrics.waits) == (True, int(waits))
    wrong = violations(metrics, large=False)
    assert (wrong == []) == good and (good or "without gdc_wait" in wrong[0])
    assert violations(replace(metrics, sm=89), large=False) != []


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_good_code_passes(capability):
    metrics, wrong = matmul(capability, (64, 64, 32))
    assert wrong == []
    assert metrics.wants_tensor_cores and metrics.tensor_core_ops > 0
    assert metrics.loads_128 > 0 and metrics.registers > 16
    assert 0 < metrics.shared <= aot.GPUS[capability].shared and metrics.sm == capability


def test_shared_memory_is_checked_at_the_launch():
    with pytest.raises(RuntimeError, match="out of resource: shared memory"):
        matmul(86, (128, 256, 64), num_warps=8, num_stages=4)


@pytest.mark.parametrize("m", [1, 16])
def test_shared_memory_of_assembly_is_found(m):
    """dequant_mm declares a table of 33 KiB, beside which a launch gets 15 more without asking."""

    def compile_it():
        x, weight = torch.empty(m, 4096, dtype=torch.bfloat16), torch.empty(4096, 2048).byte()
        with dry_run(90) as launches:
            dequant_mm(
                x, weight, torch.empty(4096, 64), kind="table4", group_size=64, table=torch.empty(1, 16)
            )  # fmt: skip
        return measure(launches[0].compiled)

    metrics = isolated(compile_it)
    assert metrics.declared_shared == 33 * 1024
    assert violations(metrics) == []
    wrong = violations(replace(metrics, shared=16 * 1024))
    assert wrong == ["16384 + 33792 declared bytes of shared memory: a launch gets 49152"]


def test_spills_are_found():
    _, wrong = matmul(80, (128, 256, 32), num_warps=4)
    assert any("bytes spilled" in w for w in wrong)
    assert any("local-memory instructions in the main loop" in w for w in wrong)


def test_scalar_loads_are_found():
    _, wrong = matmul(80, (64, 64, 32), stride=511)
    assert any("loads of at most 32 bits, 0 wider" in w for w in wrong)


def test_scalar_loads_beside_vectors_are_found():
    metrics, wrong = matmul(80, (64, 64, 32))
    assert wrong == [] and metrics.loads_32 == 0
    assert violations(replace(metrics, loads_32=8)) == []  # indices
    one_operand = replace(metrics, loads_32=32, loads_128=4)
    assert violations(one_operand) == ["32 loads of at most 32 bits, 4 wider"]
    assert violations(one_operand, large=False) == []


def test_full_precision_wants_no_tensor_cores():
    metrics, wrong = matmul(80, (32, 32, 32), torch.float32)
    assert wrong == [] and not metrics.wants_tensor_cores and metrics.tensor_core_ops == 0
    metrics, wrong = matmul(80, (32, 32, 32), torch.float32, precision="tf32")
    assert wrong == [] and metrics.wants_tensor_cores and metrics.tensor_core_ops > 0


def test_missing_tensor_cores_are_found():
    metrics, _ = matmul(75, (32, 32, 16))
    assert metrics.wants_tensor_cores and metrics.tensor_core_ops == 0
    assert violations(metrics) == []  # sm_75: Triton has no tensor-core path
    assert violations(replace(metrics, sm=80)) == ["tl.dot without a tensor-core instruction"]


def test_the_host_path_runs_for_each_sm():
    x, w = torch.empty(5, 64), torch.empty(64)
    hashes = set()
    for capability in (80, 90, 80):
        with dry_run(capability) as launches:
            y = rms_norm(x, w)
            assert (
                sm(x.device) == capability and sm_count(x.device) == aot.GPUS[capability].sm_count
            )
        assert y.shape == x.shape
        (launch,) = launches
        assert launch.sm == launch.compiled.metadata.target.arch == capability
        assert launch.num_warps == launch.compiled.metadata.num_warps
        assert len(launch.grid) == 3 and not launch.large
        hashes.add(launch.compiled.hash)
    assert len(hashes) == 2


def test_large_inputs_are_noted():
    x, y = torch.empty(1 << 16), torch.empty(1 << 16)
    with dry_run(80) as launches:
        _copy_kernel[(64,)](x, y, 1, 1024)
        _copy_kernel[(64,)](x[:100], y[:100], 1, 1024)
    assert [launch.large for launch in launches] == [True, False]


def test_nothing_is_computed():
    x = torch.ones(4, 8)
    with dry_run(80):
        product = torch.matmul(x, x.T)
        assert x.mul_(2).data_ptr() == x.data_ptr() and x[1:].data_ptr() == x[1].data_ptr()
        assert torch.cat([x, x]).shape == (8, 8)
    assert product.shape == (4, 4) and product.isnan().all()
    assert (x == 1).all()


def test_reading_on_the_host_is_refused():
    with dry_run(80), pytest.raises(RuntimeError, match="read on the host"):
        torch.ones(3)[0].item()


def test_autotuning_at_the_call_is_refused():
    tuned = triton.autotune([triton.Config({"BLOCK": b}) for b in (64, 128)], key=[])(_copy_kernel)
    x = torch.empty(128)
    with dry_run(80), pytest.raises(RuntimeError, match="use a table or a heuristic"):
        tuned[(1,)](x, x, 1)


@pytest.mark.parametrize("grid", [(0,), (1, 65536), (1, 1, 65536)])
def test_grid_limits(grid):
    x = torch.empty(64)
    with dry_run(80), pytest.raises(ValueError, match="grid of _copy_kernel must fit"):
        _copy_kernel[grid](x, x, 1, 64)


def test_an_unknown_sm_is_refused():
    with pytest.raises(ValueError, match="sm must be one of"), dry_run(70):
        pass


def test_the_driver_is_given_back():
    before = driver.active if torch.cuda.is_available() else None
    x = torch.empty(1 << 21)
    with pytest.raises(OutOfResources), dry_run(80):
        raise OutOfResources(2, 1, "shared memory")
    if before is None:
        with pytest.raises(RuntimeError, match="0 active drivers"):
            _copy_kernel[(1,)](x, x, 1, 64)
    else:
        assert driver.active is before


def crash():
    faulthandler.disable()  # pytest's would fill the terminal
    os.abort()


def fail():
    print("a whole PTX file")
    raise ValueError("no such thing")


def test_forked_survives_crashes():
    calls = [lambda: 1, crash, fail, lambda: [2] * 100_000]
    results = dict(forked(calls, workers=2))
    assert results[0] == 1 and results[3] == [2] * 100_000
    assert isinstance(results[1], Failure) and "exit code -6" in results[1].message
    assert isinstance(results[2], Failure) and "ValueError: no such thing" in results[2].message


def test_isolated_raises():
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        isolated(fail)
