"""Benchmarks of step: `pytest bench/bench_step.py`."""

import pytest

from tlk.bench.cases.step import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, measure):
    measure(case)
