"""RMSNorm fused into the linear layer that follows it.

y = act(rms_norm(x; w, eps) Wᵀ + b) = act(rstd · ((x · w) Wᵀ) + b)
"""

import torch
from torch import Tensor

from tlk.kernels._check import check_device, check_dtype, check_last_dim_contiguous, check_shape
from tlk.kernels._device import sm, sm_count
from tlk.kernels._linear import NORMED, launch
from tlk.kernels._linear_configs import decode_candidates
from tlk.kernels._linear_configs import default_config as matmul_default
from tlk.kernels._op import op
from tlk.kernels.matmul import (
    check_linear,
    choose,
    matmul,
    matmul_reference,
    measured,
    name_of,
)
from tlk.kernels.norm import rms_norm
from tlk.kernels.tuning import Config

VERSION = 2  # of the kernels: raise it when measured configurations no longer apply

BACKENDS = (None, "invariant")

UNFUSED: Config = {"backend": "unfused"}


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    h = x.double() if backend == "invariant" else x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * (norm_weight.to(h.dtype) + weight_offset)
    return matmul_reference(h, weight, bias, activation, None, backend).to(x.dtype)


def default_config(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> Config:
    """What runs `running` rows of x and a weight [n, k] = `dims` where no table says anything."""
    config = matmul_default(arch, processors, dtype, dims, running)
    return config if config.get("kernel") in NORMED else UNFUSED


def candidates(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> list[Config]:
    """What may be fastest for `running` rows of x and a weight [n, k] = `dims`.

    UNFUSED always takes part: for one row and 28672 rows of W it has been faster than the norm in "gemv".
    """
    found = decode_candidates(arch, processors, dtype, dims, running)
    return [*(c for c in found if c["kernel"] in NORMED), UNFUSED]


def _choose(x: Tensor, weight: Tensor, backend: str | None) -> Config:
    if backend == "invariant":
        return UNFUSED
    config = measured("norm_linear", VERSION, x, weight)
    if config is None:
        n, k = weight.shape
        m = x.shape[:-1].numel()
        return default_config(sm(x.device), sm_count(x.device), x.dtype, (n, k), m)
    return config if config.get("kernel") in NORMED else UNFUSED


def chosen_backend(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
    backend: str | None = None,
) -> str:
    if _choose(x, weight, backend)["backend"] == "triton":
        return "triton"
    return "rms_norm+" + name_of(choose(x, weight, backend), backend)


@op(norm_linear_reference, backend=chosen_backend)
def _norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    config = _choose(x, weight, backend)
    if config["backend"] != "triton":
        h = rms_norm(x, norm_weight, eps, weight_offset=weight_offset)
        return matmul(h, weight, bias, activation=activation, backend=backend)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel() > 0:
        launch(config, x, weight, bias, activation, y, norm=(norm_weight, eps, weight_offset))
    return y


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``matmul(rms_norm(x, norm_weight, eps), weight, bias, activation=activation)``.

    `x` [..., K], `norm_weight` [K], `weight` [N, K] and `bias` [N] are float32, float16 or bfloat16,
    all the same; the result is [..., N]. `weight_offset` 1.0 is the form that scales by 1 + w.
    Rows of `x` and `weight` may be strided. `backend` None runs what is fastest as far as known,
    "invariant" two kernels that give each row a result independent of the others and their number.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    check_linear(x, weight, bias, activation)
    check_norm_weight(norm_weight, x)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _norm_linear(x, norm_weight, weight, bias, eps, weight_offset, activation, backend)


def check_norm_weight(norm_weight: Tensor, x: Tensor) -> None:
    """Raise unless `norm_weight` can scale the rows of `x`."""
    check_dtype("norm_weight", norm_weight, x.dtype)
    check_shape("norm_weight", norm_weight, x.shape[-1])
    check_device("norm_weight", norm_weight, x.device)
    check_last_dim_contiguous("norm_weight", norm_weight)
