"""The first half of a gated MLP, with the RMSNorm before it where there is one.

    y = act(h Gᵀ + b₁) · (h Uᵀ + b₂)           h = x or rms_norm(x), W = [G; U] [2I, K] as checkpoints have it

Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202

For up to 16 rows, on sm_90 up to 64, one kernel does it all: a program reads the same rows of both
halves, so that the products meet in its registers, and act(g) · u is rounded once. It saves a launch,
and the 2·M·2I elements that would be written and read again. For more rows: rms_norm, cuBLAS and
act_and_mul.

Cost: 2·I·K·itemsize bytes for few rows, 4·M·I·K flops for many.
"""

import torch
from torch import Tensor

from tlk.kernels._device import sm, sm_count
from tlk.kernels._linear import NORMED, launch
from tlk.kernels._linear_configs import decode_candidates
from tlk.kernels._linear_configs import default_config as matmul_default
from tlk.kernels._op import op
from tlk.kernels.activation import gelu_and_mul, silu_and_mul
from tlk.kernels.matmul import (
    activate_reference,
    check_linear,
    choose,
    matmul,
    matmul_reference,
    measured,
    name_of,
)
from tlk.kernels.norm import rms_norm
from tlk.kernels.norm_linear import check_norm_weight, chosen_backend, norm_linear
from tlk.kernels.tuning import Config

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BACKENDS = (None, "invariant")

VERSION = 1  # of the kernels: raise it when measured configurations no longer apply

SEPARATE: Config = {"backend": "separate"}
"""norm_linear or matmul, then act_and_mul."""


def gated_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    h = x.double() if backend == "invariant" else x.float()
    if norm_weight is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        h = h * (norm_weight.to(h.dtype) + weight_offset)
    gate, up = matmul_reference(h, weight, bias, None, None, backend).chunk(2, -1)
    return (activate_reference(gate, activation) * up).to(x.dtype)


def default_config(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> Config:
    """What runs `running` rows of x and a weight [2I, K] = `dims` where no table says anything."""
    config = matmul_default(arch, processors, dtype, dims, running)
    return config if config["backend"] == "triton" else SEPARATE


def candidates(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> list[Config]:
    """What may be fastest for `running` rows of x and a weight [2I, K] = `dims`."""
    found = decode_candidates(arch, processors, dtype, dims, running)
    return [*(c for c in found if c["meta"]["BLOCK_N"] > 1), SEPARATE]  # a row of each half


def _choose(x: Tensor, weight: Tensor, backend: str | None) -> Config:
    if backend == "invariant":
        return SEPARATE
    config = measured("gated_linear", VERSION, x, weight)
    if config is None:
        m, (n, k) = x.shape[:-1].numel(), weight.shape
        return default_config(sm(x.device), sm_count(x.device), x.dtype, (n, k), m)
    return config


def _chosen_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> str:
    config = _choose(x, weight, backend)
    if config["backend"] == "triton":
        separate_norm = norm_weight is not None and config["kernel"] not in NORMED
        return "rms_norm+triton" if separate_norm else "triton"
    if norm_weight is None:
        product = name_of(choose(x, weight, backend), backend)
    else:
        product = chosen_backend(x, norm_weight, weight, bias, eps, weight_offset, None, backend)
    return f"{product}+{'silu' if activation == 'silu' else 'gelu'}_and_mul"


@op(gated_linear_reference, backend=_chosen_backend)
def _gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    config = _choose(x, weight, backend)
    if config["backend"] != "triton":
        if norm_weight is None:
            y = matmul(x, weight, bias, backend=backend)
        else:
            y = norm_linear(
                x, norm_weight, weight, bias, eps=eps, weight_offset=weight_offset, backend=backend
            )
        if activation == "silu":
            return silu_and_mul(y)
        return gelu_and_mul(y, approximate="none" if activation == "gelu" else "tanh")
    norm = None if norm_weight is None else (norm_weight, eps, weight_offset)
    if norm_weight is not None and config["kernel"] not in NORMED:
        x, norm = rms_norm(x, norm_weight, eps, weight_offset=weight_offset), None
    y = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    if y.numel() > 0:
        launch(config, x, weight, bias, activation, y, norm=norm, gated=True)
    return y


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Return ``act(h @ gate.T) * (h @ up.T)`` [..., I] for `weight` [2I, K], gate's rows first.

    `h` is `x` [..., K], normalized as by `rms_norm` where there is a `norm_weight` [K]. `bias` [2I]
    is added before the activation: "silu", "gelu" or "gelu_tanh". All are float32, float16 or
    bfloat16, the same; rows of `x` and `weight` may be strided. `backend` None runs what is fastest
    as far as known, "invariant" gives each row a result independent of the others and their number.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    check_linear(x, weight, bias, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if weight.shape[0] % 2 != 0:
        raise ValueError(f"weight must have an even number of rows, got {weight.shape[0]}")
    if norm_weight is not None:
        check_norm_weight(norm_weight, x)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _gated_linear(x, weight, bias, activation, norm_weight, eps, weight_offset, backend)
