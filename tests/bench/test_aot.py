from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tlk.bench import aot
from tlk.bench.aot import Job, compile_case, main, plan, run
from tlk.bench.case import Case, load_cases
from tlk.kernels import tuning


@triton.jit
def _copy_kernel(x_ptr, y_ptr, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i * step, tl.load(x_ptr + i * step))


def copies(step, name="copy"):
    """A case that copies 64 Ki elements, of which the compiler knows no more than `step` tells."""

    def run(x):
        _copy_kernel[(64,)](x, torch.empty_like(x), step, 1024)

    return Case(name, "64Ki", lambda new: (new.randn(1 << 16),), run, lambda size: size << 17, run)


def crashing(x):
    raise ValueError("no such shape")


def test_run_reports_kernels_and_violations():
    bad = Case("bad", "64Ki", lambda new: (new.randn(8),), crashing, lambda size: size, crashing)
    jobs = [
        Job(case, torch.bfloat16, 80) for case in (copies(1), copies(3), copies(1, "same"), bad)
    ]
    kernels, wrong = run(jobs, workers=1)
    assert sorted(m.loads_128 > 0 for m in kernels.values()) == [False, True]
    scalar, crashed = wrong
    assert scalar.startswith("copy-64Ki bfloat16 sm_80: _copy_kernel: ") and "0 wider" in scalar
    assert crashed.startswith("bad-64Ki bfloat16 sm_80: ") and "no such shape" in crashed
    table = aot.table(list(kernels.values())).splitlines()
    assert len(table) == 3 and all("_copy_kernel" in line for line in table[1:])


def test_kernels_that_gather_may_load_scalars():
    job = Job(replace(copies(3), gathers=("_copy_kernel",)), torch.bfloat16, 80)
    assert run([job], workers=1)[1] == []


def test_known_kernels_are_not_measured_again():
    job = Job(copies(1), torch.float16, 80)
    (kernel,) = compile_case(job, set())
    assert kernel.large and compile_case(job, {(kernel.hash, True)}) == []


def test_the_table_and_the_heuristic_are_both_compiled(monkeypatch, tmp_path):
    """Of two ops that are consulted one after another, the second only by the first's heuristic."""
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path))

    def configs(op, x):
        found = tuning.lookup(op, 1, x.device, x.dtype, (64,), 64)
        return {} if found is None else found

    def run(x):
        block = configs("outer", x).get("BLOCK", 0) or configs("inner", x).get("BLOCK", 1024)
        _copy_kernel[((1 << 16) // block,)](x, torch.empty_like(x), 1, block)

    for op, block in (("outer", 256), ("inner", 512)):
        entry = tuning.Entry(1, "NVIDIA H100", "bfloat16", (64,), 6, {"BLOCK": block})
        tuning.record(tuning.table_path(op, 90), [entry])
    case = Case(
        "tuned", "64Ki", lambda new: (new.randn(1 << 16),), run, lambda size: size << 17, run
    )
    assert len(compile_case(Job(case, torch.bfloat16, 90), set())) == 3
    assert len(compile_case(Job(case, torch.bfloat16, 80), set())) == 1
    assert len(compile_case(Job(case, torch.float16, 90), set())) == 1


def test_the_shipped_table_does_not_hide_the_heuristic(monkeypatch, tmp_path):
    """At shapes of the table for sm_90, at some of which the two differ."""
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path))
    counts = []
    for shape in ("M1-N4096-K4096", "M16-N6144-K4096", "M32-N6144-K4096"):
        (case,) = (c for c in load_cases()["matmul"] if str(c) == f"matmul-{shape}")
        job = Job(case, torch.bfloat16, 90)
        with tuning.forced("matmul", None):
            plain = {kernel.hash for kernel in compile_case(job, set())}
        kernels = {kernel.hash for kernel in compile_case(job, set())}
        assert plain <= kernels
        counts.append(len(kernels - plain))
    assert max(counts) == 1


def test_plan():
    both = copies(1), copies(3)
    assert len(list(plan(list(both), [80, 90], "all"))) == 2 * 2 * 3
    assert {job.dtype for job in plan(list(both), [80, 90], "fp16")} == {torch.float16}
    rotated = list(plan([copies(1)] * 14, list(aot.GPUS), "rotate"))
    assert len(rotated) == 14 * 7
    on_75 = [job.dtype for job in rotated if job.sm == 75]
    on_90 = [job.dtype for job in rotated if job.sm == 90]
    assert on_75.count(torch.float16) == 12 and on_75.count(torch.float32) == 2
    assert [on_90.count(d) for d in aot.DTYPES.values()] == [10, 2, 2]


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(aot, "load_cases", lambda: {"good": (copies(1),), "bad": (copies(3),)})
    arguments = ["--sm", "90", "--dtype", "bf16", "--jobs", "1"]
    assert main([*arguments, "--only", "good"]) == 0
    assert "1 kernels from 1 cases, 0 violations" in capsys.readouterr().out
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "2 kernels from 2 cases, 1 violations" in captured.out
    assert "0 wider" in captured.err
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "--only must name modules of ['bad', 'good'], got ['nothing']" in capsys.readouterr().err
