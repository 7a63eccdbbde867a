"""Linear layer with a fused epilogue.

    y = act(x Wᵀ + b) + residual                    x [M, K], W [N, K]

Products are accumulated in float32, the epilogue runs in float32, and y is rounded once. What runs
depends on the shape; tables of measured configurations (tuning.py) come before these defaults:

- M = 1 ("gemv"): a program keeps x in registers and reads whole rows of W with 128-bit loads. x is
  then read once per program: read again for every few rows it took a fifth of the way out of L2.
- M ≤ 16, float16 and bfloat16 ("dot"): tensor cores, with W as the left operand.
- M ≤ 16 otherwise ("fma"): products in float32, reduced once at the end. Nothing of these splits K
  between programs, hence the same result on every run.
- 16 < M ≤ 64 on sm_90: "dot" where it was faster than cuBLAS.
- larger M: cuBLAS, then one elementwise kernel where there is an activation or a bias and a residual;
  its output is then rounded a second time, which stays within plain PyTorch's own rounding.
- float32 promises IEEE products: cuBLAS only while torch's own matmul precision is IEEE, else "tile".
- "tile": a tiled matmul in grouped order, for tables that found it faster, or `backend="triton"`.
- `backend="invariant"` runs "tile" in one configuration whatever M is, so that no row's result depends
  on how many others there are. On a CPU the reference sums in float64, where the order of a sum
  rarely survives the rounding to x's dtype.

Below sm_80 Triton has no tensor cores: "fma" serves M ≤ 16 and cuBLAS the rest. In float16 cuBLAS
follows torch's allow_fp16_reduced_precision_reduction, as F.linear does.

Cost: N·K·itemsize bytes for small M (W is read once, by `evict_first`), 2·M·N·K flops for large M.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._linear import _activated, launch
from tlk.kernels._linear_configs import (
    CUBLAS,
    DECODE_ROWS,
    decode_config,
    default_config,
    fits,
    tile_config,
)
from tlk.kernels._op import op
from tlk.kernels.tuning import Config, lookup

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu_squared")

BACKENDS = (None, "triton", "cublas", "invariant")

VERSION = 2  # of the kernels: raise it when measured configurations no longer apply


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
    wide = torch.float64 if backend == "invariant" else torch.float32
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = activate_reference(y, activation)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


@triton.jit
def _epilogue_kernel(
    y_ptr, residual_ptr, out_ptr, N, stride_residual, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = act(y) + residual, one program per BLOCK columns of a row; out may be either of them."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    y = _activated(y, ACTIVATION)
    if residual_ptr is not None:
        at = residual_ptr + row * stride_residual + n
        y += tl.load(at, n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), n < N)


def choose(x: Tensor, weight: Tensor, backend: str | None) -> Config:
    """The configuration of one call: forced, measured or the default."""
    if backend == "cublas":
        return CUBLAS
    arch = sm(x.device)
    if backend == "invariant":
        return tile_config(arch, x.dtype)
    m, (n, k) = x.shape[:-1].numel(), weight.shape
    if backend is None:
        config = measured("matmul", VERSION, x, weight)
        if config is None:
            config = default_config(arch, sm_count(x.device), x.dtype, (n, k), m)
        if config["backend"] != "cublas" or _cublas_is_exact(x.dtype):
            return config
    if m <= DECODE_ROWS:
        return decode_config(arch, sm_count(x.device), x.dtype, m, n, k)
    return tile_config(arch, x.dtype)


def measured(op: str, version: int, x: Tensor, weight: Tensor) -> Config | None:
    """What tables say of act(x · weightᵀ), or None where it does not suit this shape."""
    m, (n, k) = x.shape[:-1].numel(), weight.shape
    config = lookup(op, version, x.device, x.dtype, (n, k), m)
    if config is not None and fits(config, sm_count(x.device), x.dtype, n, k, m):
        return config
    return None


def name_of(config: Config, backend: str | None) -> str:
    """What a report calls a matmul in `config`."""
    return "invariant" if backend == "invariant" else str(config["backend"])


def _cublas_is_exact(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype without dropping bits; read at every call, as it may change."""
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


def _cublas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    in_place: bool = False,
) -> Tensor:
    """`in_place`: the result takes the place of `residual`, which is contiguous."""
    n, k = weight.shape
    if residual is not None and bias is None and activation is None:
        rows = residual.reshape(-1, n)
        if in_place:  # else cuBLAS adds to a copy, 20 µs for 4096 rows of 4096
            rows.addmm_(x.reshape(-1, k), weight.T)
            return residual
        return torch.addmm(rows, x.reshape(-1, k), weight.T).view(*x.shape[:-1], n)
    y = F.linear(x, weight, bias)
    if activation is not None or residual is not None:
        m = x.shape[:-1].numel()
        out, stride_residual = y, 0
        if residual is not None:
            out = residual if in_place else y
            residual = residual.reshape(m, n)
            stride_residual = residual.stride(0)
        block = min(next_power_of_2(n), 1024)
        _epilogue_kernel[(m * cdiv(n, block),)](
            y, residual, out, n, stride_residual, activation, block
        )
        return out
    return y


def _chosen_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> str:
    return name_of(choose(x, weight, backend), backend)


@op(matmul_reference, backend=_chosen_backend)
def _matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    y_shape = (*x.shape[:-1], weight.shape[0])
    if 0 in y_shape:
        return x.new_empty(y_shape)
    config = choose(x, weight, backend)
    if config["backend"] == "cublas":
        return _cublas(x, weight, bias, activation, residual)
    y = x.new_empty(y_shape)
    launch(config, x, weight, bias, activation, y, residual)
    return y


def matmul_add_reference_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> None:
    residual.copy_(matmul_reference(x, weight, bias, activation, residual, backend))


def _chosen_backend_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> str:
    return name_of(choose(x, weight, backend), backend)


@op(
    matmul_add_reference_,
    mutates=("residual",),
    fake=lambda *_, **__: None,
    backend=_chosen_backend_,
)
def _matmul_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> None:
    if residual.numel() == 0:
        return
    config = choose(x, weight, backend)
    if config["backend"] == "cublas":
        _cublas(x, weight, bias, activation, residual, in_place=True)
    else:  # every element is read and written by one thread of one program
        launch(config, x, weight, bias, activation, residual, residual)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Raise unless act(x @ weight.T + bias) is a call that the kernels can run."""
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
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
    Rows of `x`, `weight` and `residual` may be strided; their last dimension is contiguous.
    `backend` None runs what is fastest as far as known, "triton" and "cublas" insist; "cublas" then
    multiplies float32 as precisely as torch is set to. "invariant": no row's result depends on the
    number of rows or on the others.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    check_linear(x, weight, bias, activation)
    if residual is not None:
        _check_residual(residual, x, weight)
    _check_backend(backend)
    return _matmul(x, weight, bias, activation, residual, backend)


def matmul_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add ``act(x @ weight.T + bias)`` to `residual` [..., N] in place, and return it.

    What `matmul` returns with the same `residual`, bit for bit, without the copy of it that cuBLAS
    would add to. `residual` is contiguous and shares no memory with the other tensors, which are as
    `matmul` wants them. Raises TypeError or ValueError naming the argument that does not fit.
    """
    check_linear(x, weight, bias, activation)
    _check_residual(residual, x, weight)
    if not residual.is_contiguous():
        raise ValueError(f"residual must be contiguous, got strides {residual.stride()}")
    if residual is x:
        raise ValueError("residual must not be x: rows of x are read while others are written")
    _check_backend(backend)
    _matmul_add_(residual, x, weight, bias, activation, backend)
    return residual


def _check_residual(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    check_dtype("residual", residual, x.dtype)
    check_shape("residual", residual, *x.shape[:-1], weight.shape[0])
    check_device("residual", residual, x.device)
    check_last_dim_contiguous("residual", residual)


def _check_backend(backend: str | None) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
