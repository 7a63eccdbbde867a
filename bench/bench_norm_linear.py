"""Benchmarks of norm_linear: `pytest bench/bench_norm_linear.py`."""

import pytest

from tlk.bench.cases.norm_linear import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_linear(case, measure):
    measure(case)
