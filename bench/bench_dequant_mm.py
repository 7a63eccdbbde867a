"""Benchmarks of dequant_mm: `pytest bench/bench_dequant_mm.py`."""

import pytest

from tlk.bench.cases.dequant_mm import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequant_mm(case, measure):
    measure(case)
