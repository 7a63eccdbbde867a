"""Benchmarks of norm: `pytest bench/bench_norm.py`."""

import pytest

from tlk.bench.cases.norm import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm(case, measure):
    measure(case)
