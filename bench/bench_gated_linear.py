"""Benchmarks of gated_linear: `pytest bench/bench_gated_linear.py`."""

import pytest

from tlk.bench.cases.gated_linear import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_linear(case, measure):
    measure(case)
