"""Linear layer with a quantized weight and activations in the model's own dtype.

    y = act(h Wᵀ + b) + residual                   h = x or rms_norm(x), W dequantized
    y = act(h Gᵀ + b₁) · (h Uᵀ + b₂)               gated: W = [G; U]

What runs, by the rows M of x (_dequant_configs.py; tables of measured configurations come first):

- M ≤ 16 ("mma", _dequant_linear.py): codes are decoded in the registers that tensor cores read.
- M < 1024 ("wide", _dequant_wide.py): the same from wgmma's side, with x in the order of the codes.
- more: the weight is dequantized once and cuBLAS multiplies.
- "sums" (_dequant_sums.py) for M ≤ 16 in float32, below sm_80, and for rows that no words of 16 bytes fit.

Sums are float32. Scales multiply them there where a group fills a lane's tile; else codes times scales are
rounded to x's dtype, as a dequantized weight is. The result is the same on every run.

Cost: the packed weight is read once for few rows; 2·M·N·K flops for many.
"""

import torch
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._dequant import Quantized, check_quantized
from tlk.kernels._dequant_configs import VERSION, candidates, choose, default_config
from tlk.kernels._dequant_linear import launch_mma
from tlk.kernels._dequant_sums import launch_sums
from tlk.kernels._dequant_wide import launch_wide
from tlk.kernels._op import op
from tlk.kernels.activation import gelu_and_mul, silu_and_mul
from tlk.kernels.dequantize import dequantize_reference, dequantize_unchecked, unnested
from tlk.kernels.gated_linear import ACTIVATIONS as GATED_ACTIVATIONS
from tlk.kernels.matmul import ACTIVATIONS, activate_reference, matmul, matmul_reference
from tlk.kernels.norm import rms_norm
from tlk.kernels.norm_linear import check_norm_weight
from tlk.kernels.tuning import Config

__all__ = ["VERSION", "candidates", "default_config", "dequant_mm", "dequant_mm_reference"]

BACKENDS = (None, "triton", "cublas", "invariant")


def dequant_mm_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    global_scale: Tensor | None,
    nested: list[Tensor],
    kind: str,
    group_size: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    h = x.double() if backend == "invariant" else x.float()
    if norm_weight is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        h = h * (norm_weight.to(h.dtype) + weight_offset)
    w = dequantize_reference(
        weight, scale, zero, table, global_scale, nested, kind, group_size, torch.float32
    )
    if not gated:
        return matmul_reference(h, w, bias, activation, residual, backend).to(x.dtype)
    gate, up = matmul_reference(h, w, bias, None, None, backend).chunk(2, -1)
    return (activate_reference(gate, activation) * up).to(x.dtype)


def _chosen_backend(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    global_scale: Tensor | None,
    nested: list[Tensor],
    kind: str,
    group_size: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> str:
    w = Quantized(weight, scale, zero, table, global_scale, nested, kind, group_size)
    config = choose(x, w, backend)
    norm = "rms_norm+" if norm_weight is not None and config.get("kernel") != "wide" else ""
    if config["backend"] == "triton":
        return norm + "triton"
    product = "invariant" if backend == "invariant" else "cublas"
    act = "" if not gated else "+silu_and_mul" if activation == "silu" else "+gelu_and_mul"
    return f"{norm}dequantize+{product}{act}"


def _launch(
    config: Config,
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None,
    gated: bool,
    norm: tuple[Tensor, float, float] | None = None,
) -> None:
    """Run the kernel that `config` names; the norm, in a kernel of its own where "wide" does not take it."""
    kernel = config["kernel"]
    if norm is not None and kernel != "wide":
        norm_weight, eps, weight_offset = norm
        x = rms_norm(x, norm_weight, eps, weight_offset=weight_offset)
    m, n, late = y.shape[:-1].numel(), y.shape[-1], bool(w.nested)
    x, y = x.reshape(m, x.shape[-1]), y.view(m, n)
    residual = None if residual is None else residual.reshape(m, n)
    if kernel == "mma":
        launch_mma(config, x, w, bias, activation, y, residual, gated)
        return
    w = unnested(w)
    if kernel == "sums":
        launch_sums(config, x, w, bias, activation, y, residual, gated)
    else:
        launch_wide(config, x, w, bias, activation, y, residual, gated, late, norm)


@op(dequant_mm_reference, backend=_chosen_backend)
def _dequant_mm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    global_scale: Tensor | None,
    nested: list[Tensor],
    kind: str,
    group_size: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    w = Quantized(weight, scale, zero, table, global_scale, nested, kind, group_size)
    n, _ = w.shape
    y_shape = (*x.shape[:-1], n // 2 if gated else n)
    if 0 in y_shape:
        return x.new_empty(y_shape)
    config = choose(x, w, backend)
    if config["backend"] == "triton":
        y = x.new_empty(y_shape)
        norm = None if norm_weight is None else (norm_weight, eps, weight_offset)
        _launch(config, x, w, bias, activation, y, residual, gated, norm)
        return y
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps, weight_offset=weight_offset)
    return _dense(x, w, bias, activation, residual, gated, backend)


def _dense(
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gated: bool,
    backend: str | None,
) -> Tensor:
    """The weight in full for cuBLAS, or for the kernel that is the same for any number of rows."""
    weight = dequantize_unchecked(w, x.dtype)
    product = "invariant" if backend == "invariant" else "cublas"
    if not gated:
        return matmul(
            x, weight, bias, activation=activation, residual=residual, backend=product
        )  # fmt: skip
    y = matmul(x, weight, bias, backend=product)
    if activation == "silu":
        return silu_and_mul(y)
    return gelu_and_mul(y, approximate="none" if activation == "gelu" else "tanh")


def dequant_mm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    group_size: int,
    table: Tensor | None = None,
    global_scale: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Return ``act(h @ w.T + bias) + residual`` [..., N], or ``act(h @ gate.T) * (h @ up.T)`` [..., N/2].

    `x` [..., K], `bias` [N] and `residual` [..., N] are float32, float16 or bfloat16, the same; h is x,
    or `rms_norm` of it where there is a `norm_weight` [K]. w [N, K] is stored as `kind` says, in groups
    of `group_size` inputs, K for whole rows:

    - "int4": `weight` uint8 [N, K/2], `scale` [N, K/G] of float32, float16 or bfloat16, `zero` uint8
      [N, K/G] or None for 8.
    - "int8": `weight` int8 [N, K], `scale` [N, K/G] or [N, 1] as for int4, `zero` int8 like it or None for 0.
    - "table4": codes of `table` float32 [1, 16], `scale` float32 [N, K/G]; or uint8 and `nested`: absmax
      float32 [N, S], start int32 [N, 1], map float32 [1, 256] and offset float32 [N, 1], where a scale is
      map[scale[n, b]] · absmax[n, (start[n] + b) // 256] + offset[n].
    - "mx4": G = 32, `scale` uint8 [N, K/32], powers of two. "nv4": G = 16, `scale` float8_e4m3fn
      [N, K/16], and `global_scale` float32 [N, 1] that multiplies.
    - "fp8": `weight` float8_e4m3fn [N, K], `scale` float32 [N, 1], or [⌈N/128⌉, ⌈K/128⌉] for G = 128.

    Byte j of a group of 4-bit codes holds code j, and code j + G/2 in its high half. `gated` takes the
    rows [gate; up] and "silu", "gelu" or "gelu_tanh". Rows of `x`, `weight` and `residual` may be strided.
    `backend` None runs what is fastest as far as known; "triton" and "cublas" insist, the latter on
    the dequantized weight; "invariant": no row's result depends on the number of rows.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    w = Quantized(
        weight, scale, zero, table, global_scale, list(nested or ()), kind, group_size
    )  # fmt: skip
    check_quantized(w)
    _check_call(x, w, bias, activation, residual, gated)
    if norm_weight is not None:
        check_norm_weight(norm_weight, x)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _dequant_mm(
        x, weight, scale, zero, table, global_scale, w.nested, kind, group_size, bias, activation,
        residual, gated, norm_weight, eps, weight_offset, backend,
    )  # fmt: skip


def _check_call(
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gated: bool,
) -> None:
    n, k = w.shape
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    check_shape("x", x, *x.shape[:-1], k)
    check_last_dim_contiguous("x", x)
    check_device("weight", w.weight, x.device)
    if bias is not None:
        check_dtype("bias", bias, x.dtype)
        check_shape("bias", bias, n)
        check_device("bias", bias, x.device)
        check_last_dim_contiguous("bias", bias)
    if residual is not None:
        check_dtype("residual", residual, x.dtype)
        check_shape("residual", residual, *x.shape[:-1], n)
        check_device("residual", residual, x.device)
        check_last_dim_contiguous("residual", residual)
    allowed = GATED_ACTIVATIONS if gated else (None, *ACTIVATIONS)
    if activation not in allowed:
        raise ValueError(f"activation must be one of {allowed}, got {activation!r}")
    if gated and (residual is not None or n % 2):
        raise ValueError(
            f"gated takes an even number of rows and no residual, got {n} rows"
            + (" and a residual" if residual is not None else "")
        )
