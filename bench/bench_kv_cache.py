"""Benchmarks of kv_cache: `pytest bench/bench_kv_cache.py`."""

import pytest

from tlk.bench.cases.kv_cache import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kv_cache(case, measure):
    measure(case)
