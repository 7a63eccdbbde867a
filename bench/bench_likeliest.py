"""Benchmarks of likeliest: `pytest bench/bench_likeliest.py`."""

import pytest

from tlk.bench.cases.likeliest import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_likeliest(case, measure):
    measure(case)
