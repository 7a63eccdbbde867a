"""Benchmarks of dequantize: `pytest bench/bench_dequantize.py`."""

import pytest

from tlk.bench.cases.dequantize import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize(case, measure):
    measure(case)
