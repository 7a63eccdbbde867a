"""Benchmarks of matmul: `pytest bench/bench_matmul.py`."""

import pytest

from tlk.bench.cases.matmul import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matmul(case, measure):
    measure(case)
