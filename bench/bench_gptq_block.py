"""Benchmarks of gptq_block: `pytest bench/bench_gptq_block.py`."""

import pytest

from tlk.bench.cases.gptq_block import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gptq_block(case, measure):
    measure(case)
