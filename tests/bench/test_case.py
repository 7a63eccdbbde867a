import torch

from tlk.bench.case import Case, Inputs, load_cases


def test_inputs_make_what_the_case_asks_for():
    new = Inputs("cpu", torch.float16)
    assert new.randn(2, 3).dtype == torch.float16 and new.randn(2, 3).shape == (2, 3)
    assert new.randn(4, dtype=torch.float32).dtype == torch.float32
    assert 0.5 < new.randn(1000).float().std() < 1.5
    integers = new.randint(3, 7, 100)
    assert integers.dtype == torch.int32 and set(integers.tolist()) == {3, 4, 5, 6}
    assert new.tensor([1, 2], torch.int64).tolist() == [1, 2]


def test_empty_inputs_are_not_filled():
    new = Inputs("cpu", torch.bfloat16, empty=True)
    assert new.randn(2, 3).isnan().all()  # uninitialized memory is NaN in tests
    assert new.randint(0, 9, 4, dtype=torch.int64).shape == (4,)
    assert new.tensor([5]).tolist() == [5]  # what the host reads is there all the same


def test_a_case_is_called_by_op_and_shape():
    case = Case(
        "add", "N4", lambda new: (new.randn(4),), torch.add, lambda size: 8 * size, torch.add
    )
    assert str(case) == "add-N4" and case.dtypes[0] == torch.bfloat16


def test_every_module_of_cases_is_found():
    modules = load_cases()
    assert {"norm", "matmul", "sampling"} <= modules.keys()
    assert all(isinstance(case, Case) for cases in modules.values() for case in cases)
