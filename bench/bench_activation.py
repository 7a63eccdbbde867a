"""Benchmarks of activation: `pytest bench/bench_activation.py`."""

import pytest

from tlk.bench.cases.activation import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation(case, measure):
    measure(case)
