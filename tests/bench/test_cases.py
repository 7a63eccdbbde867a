"""Every case states its work, and its run, reference and peers agree on arguments and shapes."""

import contextlib

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from tlk.bench.case import Inputs, load_cases

CASES = [case for cases in load_cases().values() for case in cases]


def described(result):
    return [(t.shape, t.dtype) for t in tree_leaves(result) if isinstance(t, Tensor)]


def test_names_are_unique():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    assert 0 < case.bytes(2) <= case.bytes(4)
    assert case.flops >= 0 and case.dtypes
    with FakeTensorMode():  # real shapes, no memory
        inputs = case.inputs(Inputs("cpu", case.dtypes[0], empty=True))
        result = described(case.run(*inputs))
        # A reference that reads its index tensors cannot run without values; its op's tests run it.
        with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
            assert described(case.reference(*inputs)) == result
        for peer in case.peers.values():
            with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
                assert [s for s, _ in described(peer(*inputs))] == [s for s, _ in result]
