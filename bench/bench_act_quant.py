"""Benchmarks of act_quant: `pytest bench/bench_act_quant.py`."""

import pytest

from tlk.bench.cases.act_quant import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_act_quant(case, measure):
    measure(case)
