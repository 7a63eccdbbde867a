"""Benchmarks of paged_attention: `pytest bench/bench_paged_attention.py`."""

import pytest

from tlk.bench.cases.paged_attention import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(case, measure):
    measure(case)
