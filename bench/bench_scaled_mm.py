"""Benchmarks of scaled_mm: `pytest bench/bench_scaled_mm.py`."""

import pytest

from tlk.bench.cases.scaled_mm import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaled_mm(case, measure):
    measure(case)
