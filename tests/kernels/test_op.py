import pytest
import torch

from tlk.errors import UnsupportedError
from tlk.kernels import norm, toolchain
from tlk.kernels._op import count_ops, kernels_on_cpu, pretended_device
from tlk.kernels.norm import rms_norm

X, W = torch.randn(3, 64), torch.randn(64)


def test_counts_name_what_ran():
    with count_ops() as counts:
        rms_norm(X, W)
        rms_norm(X, W)
        X + 1
    assert counts == {"rms_norm[reference]": 2}


def test_kernels_on_cpu_is_scoped():
    assert pretended_device() is None
    with kernels_on_cpu(80):
        assert pretended_device()[0] == 80
    assert pretended_device() is None


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_compiler_is_named(missing, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("something deep inside Triton")

    monkeypatch.setattr(norm, "_launch", fails)
    monkeypatch.setattr(toolchain, "c_compiler", lambda: None if missing else "/usr/bin/cc")
    toolchain.require_c_compiler.cache_clear()
    error = UnsupportedError if missing else RuntimeError
    try:
        with (
            pytest.raises(error, match="apt install gcc" if missing else "inside Triton"),
            kernels_on_cpu(),
        ):
            rms_norm(X, W)
    finally:
        toolchain.require_c_compiler.cache_clear()


def test_backward_through_an_op_is_not_silent():
    x = X.clone().requires_grad_()
    y = rms_norm(x, W)
    with pytest.raises((RuntimeError, UserWarning), match=r"autograd|require grad|backward"):
        y.sum().backward()
