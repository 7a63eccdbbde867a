"""Benchmarks of rope: `pytest bench/bench_rope.py`."""

import pytest

from tlk.bench.cases.rope import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope(case, measure):
    measure(case)
