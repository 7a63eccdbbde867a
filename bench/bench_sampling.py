"""Benchmarks of sampling: `pytest bench/bench_sampling.py`."""

import pytest

from tlk.bench.cases.sampling import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampling(case, measure):
    measure(case)
