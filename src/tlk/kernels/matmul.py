"""Linear layer with a fused epilogue.

    y = act(x Wᵀ + b) + residual

Products are accumulated in float32, the epilogue runs in float32, and y is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._op import op

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu_squared")


def activate_reference(y: Tensor, activation: str | None) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "relu_squared":
        return F.relu(y).square()
    return y


def matmul_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    y = activate_reference(y, activation)
    return (y if residual is None else y + residual.float()).to(x.dtype)


@op(matmul_reference)
def _matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    return matmul_reference(x, weight, bias, activation, residual)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Raise unless act(x @ weight.T + bias) is a call that the kernels can run."""
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, None, x.shape[-1])
    check_last_dim_contiguous("x", x)
    check_last_dim_contiguous("weight", weight)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(name, tensor, x.dtype)
            check_device(name, tensor, x.device)
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
        check_last_dim_contiguous("bias", bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``act(x @ weight.T + bias) + residual`` [..., N], contiguous, in the dtype of `x`.

    `x` [..., K], `weight` [N, K], `bias` [N] and `residual` [..., N] are float32, float16 or
    bfloat16, all the same. `activation` is None, "silu", "gelu", "gelu_tanh" or "relu_squared".
    Rows of `x`, `weight` and `residual` may be strided.
    """
    check_linear(x, weight, bias, activation)
    if residual is not None:
        check_dtype("residual", residual, x.dtype)
        check_shape("residual", residual, *x.shape[:-1], weight.shape[0])
        check_device("residual", residual, x.device)
        check_last_dim_contiguous("residual", residual)
    if backend not in (None, "triton", "cublas"):
        raise ValueError(f"backend must be None, 'triton' or 'cublas', got {backend!r}")
    return _matmul(x, weight, bias, activation, residual, backend)
