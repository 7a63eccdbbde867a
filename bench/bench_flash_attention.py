"""Benchmarks of flash_attention: `pytest bench/bench_flash_attention.py`."""

import pytest

from tlk.bench.cases.flash_attention import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flash_attention(case, measure):
    measure(case)
