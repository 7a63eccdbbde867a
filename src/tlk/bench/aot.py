"""Compile every kernel of every benchmark case for every GPU, and refuse bad machine code.

    python -m tlk.bench.aot                       # one dtype per case and SM: the check of each change
    python -m tlk.bench.aot --dtype all --sm 90   # every dtype

Needs no GPU: the host path of each case runs on uninitialized CPU tensors, kernels are compiled and
disassembled. Where a tuned table answers, the heuristic behind it is compiled, too. Prints one line per distinct kernel; exits with 1 and the list of violations if a
launch does not fit its GPU, spills, misses the tensor cores or loads large tensors in scalars.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from tlk.bench.case import Case, Inputs, load_cases
from tlk.kernels import tuning
from tlk.kernels.aot import GPUS, Failure, Metrics, dry_run, forked, measure, violations

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ["kernel", "sm", "warps", "shared", "regs", "spill", "mma", "ld128", "ld64", "ld32"]


@dataclass(frozen=True, slots=True)
class Job:
    """Compile one case in one dtype for one SM."""

    case: Case
    dtype: torch.dtype
    sm: int

    def __str__(self) -> str:
        return f"{self.case} {str(self.dtype).removeprefix('torch.')} sm_{self.sm}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One distinct kernel, and whether the launch it was seen in had large tensors."""

    hash: str
    large: bool
    metrics: Metrics


def compile_case(job: Job, known: set[tuple[str, bool]]) -> list[Kernel]:
    """Dry-run `job` and measure the kernels it launches, leaving out the (hash, large) `known`."""
    inputs = job.case.inputs(Inputs("cpu", job.dtype, empty=True))
    with dry_run(job.sm) as launches:
        _run_each_way(partial(job.case.run, *inputs))
    gathers = job.case.gathers
    new = {(x.compiled.hash, x.large and x.kernel not in gathers): x.compiled for x in launches}
    return [Kernel(*key, measure(new[key])) for key in new.keys() - known]


def _run_each_way(run: Callable[[], object]) -> None:
    """Run with what the tables say and, where one answers, with what the heuristics say instead."""
    untold: set[str] = set()
    while True:
        with contextlib.ExitStack() as stack:
            for op in untold:
                stack.enter_context(tuning.forced(op, None))
            seen = stack.enter_context(tuning.consulted())
            run()
        measured = {op for op, source in seen if source in tuning.SOURCES}
        if not measured:
            return
        untold |= measured


def plan(cases: list[Case], sms: list[int], dtype: str) -> Iterator[Job]:
    """The jobs of a run; `dtype` is a name in `DTYPES`, "all", or "rotate".

    "rotate" takes one dtype per case and SM: mostly bf16 (fp16 on sm_75, which has no bf16
    arithmetic), and fp16 or fp32 in turn for two of seven.
    """
    for i, case in enumerate(cases):
        for j, sm in enumerate(sms):
            if sm < case.oldest:
                continue
            usual = "fp16" if sm < 80 else "bf16"
            turn = {5: "fp16", 6: "fp32"}.get((i + j) % 7, usual)
            wanted = (
                DTYPES.values()
                if dtype == "all"
                else [DTYPES[turn if dtype == "rotate" else dtype]]
            )
            chosen = [d for d in case.dtypes if d in wanted]
            if not chosen and dtype == "rotate":
                chosen = [case.dtypes[0]]
            yield from (Job(case, d, sm) for d in chosen)


def run(jobs: list[Job], workers: int) -> tuple[dict[str, Metrics], list[str]]:
    """Compile all `jobs`; the distinct kernels by hash, and the violations."""
    known: set[tuple[str, bool]] = set()
    kernels: dict[str, Metrics] = {}
    wrong: list[str] = []
    calls = (partial(compile_case, job, known) for job in jobs)
    for index, result in tqdm(forked(calls, workers), total=len(jobs), unit="case", mininterval=1):
        if isinstance(result, Failure):
            wrong.append(f"{jobs[index]}: {result.message}")
            continue
        for kernel in result:
            if (kernel.hash, kernel.large) not in known:
                found = violations(kernel.metrics, kernel.large)
                wrong += [f"{jobs[index]}: {kernel.metrics.kernel}: {what}" for what in found]
            known.add((kernel.hash, kernel.large))
            kernels[kernel.hash] = kernel.metrics
    return kernels, wrong


def table(kernels: list[Metrics]) -> str:
    """One line per kernel, sorted by name and SM."""
    rows = [COLUMNS]
    for m in sorted(kernels, key=lambda m: (m.kernel, m.sm)):
        values = (m.num_warps, m.shared, m.registers, m.spill_bytes, m.tensor_core_ops)
        loads = (m.loads_128, m.loads_64, m.loads_32)
        rows.append([m.kernel, *(str(v) for v in (m.sm, *values, *loads))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tlk.bench.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--sm", type=int, nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--dtype", default="rotate", choices=["rotate", "all", *DTYPES])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", nargs="+", help="modules of tlk.bench.cases")
    args = parser.parse_args(argv)
    modules = load_cases()
    if unknown := set(args.only or ()) - modules.keys():
        parser.error(f"--only must name modules of {sorted(modules)}, got {sorted(unknown)}")
    cases = [case for name in args.only or modules for case in modules[name] if case.gate]
    kernels, wrong = run(list(plan(cases, args.sm, args.dtype)), args.jobs)
    print(table(list(kernels.values())))
    print(f"{len(kernels)} kernels from {len(cases)} cases, {len(wrong)} violations")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
