"""The same measurement as `tlk bench kernels`, for pytest-benchmark: one benchmark a case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from tlk.bench.case import Case, Inputs
from tlk.bench.goals import GOALS, lacking
from tlk.bench.kernels import Bench, seeded
from tlk.bench.limits import Limits, kernel_limits
from tlk.bench.record import to_dict


@pytest.fixture(scope="session")
def limits() -> Limits:
    """What this GPU can do, measured once in the run that is judged by it."""
    if not torch.cuda.is_available():
        pytest.skip("timings need a GPU")
    return kernel_limits(torch.device("cuda"))


@pytest.fixture
def measure(request: pytest.FixtureRequest, limits: Limits) -> Callable[[Case], None]:
    """Check a case against its reference, then time it and its peers in its first dtype.

    pytest-benchmark's own column is wall-clock time with the host in it; what counts is in
    `extra_info` and in the saved JSON: medians in CUDA graphs with a cold L2, for the op and its
    peers alike, the ceiling, and the peers that a goal names and that are not there.
    """
    benchmark = request.getfixturevalue("benchmark")
    bench = Bench(torch.device("cuda"), limits, repeats=10)

    def check_and_time(case: Case) -> None:
        row = bench.row(case, case.dtypes[0])
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        about = {"gpu": torch.cuda.get_device_name(), "versions": versions}
        benchmark.extra_info.update(to_dict(row, about) | {"lacking": lacking(row, GOALS)})
        inputs = seeded(case, Inputs("cuda", case.dtypes[0]), 0)
        benchmark.pedantic(synchronized(case.run), inputs, rounds=5, warmup_rounds=1)
        torch.cuda.empty_cache()

    return check_and_time


def synchronized(run: Callable[..., Any]) -> Callable[..., None]:
    def call(*inputs: Any) -> None:
        run(*inputs)
        torch.cuda.synchronize()

    return call
