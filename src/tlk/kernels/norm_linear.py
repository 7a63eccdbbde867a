"""RMSNorm fused into the linear layer that follows it.

y = act(rms_norm(x; w, eps) Wᵀ + b) = act(rstd · ((x · w) Wᵀ) + b)
"""

import torch
from torch import Tensor

from tlk.kernels._check import check_device, check_dtype, check_shape
from tlk.kernels._op import op
from tlk.kernels.matmul import check_linear, matmul_reference


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * (norm_weight.float() + weight_offset)
    return matmul_reference(h, weight, bias, activation).to(x.dtype)


@op(norm_linear_reference)
def _norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    return norm_linear_reference(x, norm_weight, weight, bias, eps, weight_offset, activation)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """Return ``matmul(rms_norm(x, norm_weight, eps), weight, bias, activation=activation)``.

    `x` [..., K], `norm_weight` [K], `weight` [N, K] and `bias` [N] are float32, float16 or bfloat16,
    all the same; the result is [..., N]. `weight_offset` 1.0 is the form that scales by 1 + w.
    """
    check_linear(x, weight, bias, activation)
    check_dtype("norm_weight", norm_weight, x.dtype)
    check_shape("norm_weight", norm_weight, x.shape[-1])
    check_device("norm_weight", norm_weight, x.device)
    return _norm_linear(x, norm_weight, weight, bias, eps, weight_offset, activation)
