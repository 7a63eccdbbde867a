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


def test_work_by_hand():
    """Of the shapes that docs/performance.md names: bytes in bf16, and multiply-adds counted twice."""
    kv = 2 * 8 * 128  # values of a token, K and V, of 8 heads
    q = 2 * 32 * 128 * 2  # bytes of a query and its output
    square = 2 * 2 * 32 * 128  # flops of a pair of query and key
    seen = 4096 * 4097 // 2
    rows, half = 8192 * 4096, 8192 * 14336
    packed = 16 * (1024 * 1025 // 2)
    want = {
        "paged_attention-decode-B16-S4096-fp8": (16 * (4096 * kv + q), 16 * 4096 * square),
        "paged_attention-decode-B256-S512-int8": (256 * (512 * kv + q), 256 * 512 * square),
        "paged_attention-decode-B1-S131072-page64": (131072 * kv * 2 + q, 131072 * square),
        "flash_attention-mha-4096-fp8": (32 * 4096 * 128 * (3 + 2), seen * square),
        "flash_attention-mha-full-16384-fp8": (32 * 16384 * 128 * 5, 16384**2 * square),
        "flash_attention-packed-16x1024": (16384 * (q + kv * 2), packed * square),
        "matmul-M32-N128256-K4096": (
            2 * (32 * 4096 + 128256 * 4096 + 32 * 128256), 2 * 32 * 128256 * 4096,
        ),
        "matmul_add_-M4096-N4096-K14336": (
            2 * (4096 * 14336 * 2 + 2 * 4096 * 4096), 2 * 4096 * 4096 * 14336,
        ),
        "scaled_mm-M64-N6144-K4096-fp8-block": (
            (64 + 6144) * 4096 + 64 * 6144 * 2, 2 * 64 * 6144 * 4096,
        ),
        "quantize_act-T8192-N4096-fp8": (rows * 2 + rows + 4 * 8192, 0),
        "quantize_act-T8192-N7168-fp8-G128": (8192 * 7168 * 3 + 4 * 8192 * 56, 0),
        "rms_norm_quant-T8192-N4096-fp8": (rows * 3 + 2 * 4096 + 4 * 8192, 0),
        "gated_quant-T8192-I14336-fp8": (half * 5 + 4 * 8192, 0),
        "sample-S512-V128256-p0.9": (512 * 128256 * 2, 0),
    }  # fmt: skip
    work = {str(case): (case.bytes(2), case.flops) for case in CASES}
    assert {name: work[name] for name in want} == want


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
