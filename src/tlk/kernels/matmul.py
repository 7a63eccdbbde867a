"""Linear layer with a fused epilogue.

    y = act(x Wᵀ + b) + residual                    x [M, K], W [N, K]

Products are accumulated in float32, the epilogue runs in float32, and y is rounded once. What runs
depends on the shape; tables of measured configurations (tuning.py) come before these defaults:

- M = 1 ("fma"): each program reads 4 whole rows of W with 128-bit loads, multiplies in float32 and
  reduces once at the end, so nothing is staged in shared memory and no split of K meets another.
- M ≤ 16, float16 and bfloat16 ("dot"): tensor cores. Each of 4 warps owns a quarter of every K step
  as one batch of a 3-D dot, and the four sums are added at the end of the program: split-K without a
  workspace, atomics or a second launch, hence the same result on every run.
- larger M: cuBLAS, then one elementwise kernel where there is an activation or a bias and a residual;
  its output is then rounded a second time, which stays within plain PyTorch's own rounding.
- float32 promises IEEE products: cuBLAS only while torch's own matmul precision is IEEE, else "tile".
- "tile": a tiled matmul in grouped order, for tables that found it faster, or `backend="triton"`.

Below sm_80 Triton has no tensor cores: "fma" serves M ≤ 16 and cuBLAS the rest. In float16 cuBLAS
follows torch's allow_fp16_reduced_precision_reduction, as F.linear does.

Cost: N·K·itemsize bytes for small M (W is read once, by `evict_first`), 2·M·N·K flops for large M.
"""

from functools import lru_cache
from typing import Any

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
from tlk.kernels._op import op
from tlk.kernels.activation import _activate
from tlk.kernels.tuning import Config, lookup

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu_squared")

VERSION = 1  # of the kernels: raise it when measured configurations no longer apply

DECODE_ROWS = 16  # up to here a linear layer is a matter of reading W once

CUBLAS: Config = {"backend": "cublas"}


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


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu_squared":
        y = tl.maximum(y, 0.0)
        y = y * y
    elif ACTIVATION is not None:
        y = _activate(y, ACTIVATION)
    return y


@triton.jit
def _store_outputs(
    y, m, n, bias_ptr, residual_ptr, y_ptr, rows, cols, stride_residual, ACTIVATION: tl.constexpr
):
    """The epilogue: y [BLOCK_M, BLOCK_N] is float32 until it is stored."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, n < cols, other=0.0).to(tl.float32)[None, :]
    y = _activated(y, ACTIVATION)
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        y += tl.load(at, inside, other=0.0).to(tl.float32)
    at = y_ptr + m.to(tl.int64)[:, None] * cols + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def _fma_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr,
    M, N, K, stride_x, stride_w, stride_residual, eps, weight_offset,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_N whole rows of the weight: products and sums in float32."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # three dimensions from the pointers on: a load's layout is then the accumulator's
    x_ptrs = x_ptr + m.to(tl.int64)[:, None, None] * stride_x + k[None, None, :]
    w_ptrs = w_ptr + n.to(tl.int64)[None, :, None] * stride_w + k[None, None, :]
    in_m, in_n = (m < M)[:, None, None], (n < N)[None, :, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = (start + k < K)[None, None, :]
        w = tl.load(
            w_ptrs + start,
            in_n if EVEN_K else in_n & in_k,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        x = tl.load(x_ptrs + start, in_m if EVEN_K else in_m & in_k, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            scale = tl.load(norm_ptr + start + k[None, None, :], in_k, other=0.0).to(tl.float32)
            x *= scale + weight_offset
        acc += x * w
    y = tl.sum(acc, 2)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    _store_outputs(y, m, n, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def _sliced_dot_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr,
    M, N, K, stride_x, stride_w, stride_residual, eps, weight_offset,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, RESCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """As `_fma_kernel` with tensor cores: each warp takes a slice of every K step."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :, None] * stride_x + k[:, None, :]
    w_ptrs = w_ptr + n.to(tl.int64)[None, None, :] * stride_w + k[:, :, None]
    in_m, in_n = (m < M)[None, :, None], (n < N)[None, None, :]
    acc = tl.zeros((SLICES, BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((SLICES, BLOCK_M), tl.float32)
    largest = tl.full((SLICES, BLOCK_M), 1e-30, tl.float32)
    for start in range(0, K, SLICES * BLOCK_K):
        in_k = start + k < K
        w = tl.load(
            w_ptrs + start,
            in_n if EVEN_K else in_n & in_k[:, :, None],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptrs + start, in_m if EVEN_K else in_m & in_k[:, None, :], other=0.0)
        if norm_ptr is not None:
            h = x.to(tl.float32)
            squares += tl.sum(h * h, 2)
            scale = tl.load(norm_ptr + start + k, in_k, other=0.0).to(tl.float32)
            h *= (scale + weight_offset)[:, None, :]
            if RESCALE:  # x · w may leave float16's range: keep the row's largest value at 1
                seen = largest
                largest = tl.maximum(seen, tl.max(tl.abs(h), 2))
                acc *= (seen / largest)[:, :, None]
                h *= (1.0 / largest)[:, :, None]
            x = h.to(x_ptr.dtype.element_ty)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if RESCALE:
        acc *= largest[:, :, None]
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
    _store_outputs(y, m, n, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_w, stride_residual,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y; GROUP_M rows of tiles go together, so that L2 keeps what they share."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the end repeat the last one, whose result is not stored: loads stay unmasked
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, (start + k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    _store_outputs(acc, m, n, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION)


@triton.jit
def _epilogue_kernel(
    y_ptr, residual_ptr, N, stride_residual, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = act(y) + residual in place, one program per BLOCK columns of a row."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    y = _activated(y, ACTIVATION)
    if residual_ptr is not None:
        at = residual_ptr + row * stride_residual + n
        y += tl.load(at, n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)


_KERNELS: dict[str, Any] = {
    "fma": _fma_kernel,
    "dot": _sliced_dot_kernel,
    "tile": _tile_kernel,
}


@lru_cache
def decode_config(arch: int, processors: int, dtype: torch.dtype, m: int, n: int) -> Config:
    """The Triton configuration for up to `DECODE_ROWS` rows; fits every SM."""
    if arch < 80 or dtype == torch.float32 or m == 1:
        block_m = min(next_power_of_2(max(m, 1)), 8)
        # 4 warps of 16-byte loads cover BLOCK_K, so that lanes meet only in the last reduction
        meta = {
            "BLOCK_M": block_m,
            "BLOCK_N": {1: 4, 2: 4, 4: 2, 8: 1}[block_m],
            "BLOCK_K": 2048 // dtype.itemsize,
        }
        return {"backend": "triton", "kernel": "fma", "meta": {**meta, "num_warps": 4}}
    meta = {
        "BLOCK_M": 16,
        "BLOCK_N": 32 if cdiv(n, 32) >= 0.9 * processors else 16,
        "BLOCK_K": 64,
        "SLICES": 4,
    }
    return {
        "backend": "triton", "kernel": "dot", "meta": {**meta, "num_warps": 4, "num_stages": 4}
    }  # fmt: skip


@lru_cache
def tile_config(arch: int, dtype: torch.dtype) -> Config:
    """The Triton configuration for many rows; fits every SM."""
    if arch < 80:
        block, warps, stages = (64, 32, 32), 4, 2
    elif dtype == torch.float32:
        block, warps, stages = (64, 64, 16), 8, 3
    elif arch in (90, 100):
        block, warps, stages = (128, 128, 64), 8, 3
    else:
        block, warps, stages = (128, 128, 32), 8, 4
    meta = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    meta |= {"GROUP_M": 8, "num_warps": warps, "num_stages": stages}
    return {"backend": "triton", "kernel": "tile", "meta": meta}


def choose(x: Tensor, weight: Tensor, backend: str | None) -> Config:
    """The configuration of one call: forced, measured or the default."""
    if backend == "cublas":
        return CUBLAS
    m, (n, k) = x.shape[:-1].numel(), weight.shape
    if backend is None:
        config = lookup("matmul", VERSION, x.device, x.dtype, (n, k), m)
        decode = m <= (4 if x.dtype == torch.float32 else DECODE_ROWS)
        if config is None and not decode:
            config = CUBLAS
        if config is not None and (config["backend"] != "cublas" or _cublas_is_exact(x.dtype)):
            return config
    arch = sm(x.device)
    if m <= DECODE_ROWS:
        return decode_config(arch, sm_count(x.device), x.dtype, m, n)
    return tile_config(arch, x.dtype)


def _cublas_is_exact(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype without dropping bits; read at every call, as it may change."""
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


def launch(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float, float] | None = None,
) -> None:
    """Run the Triton kernel that `config` names; `norm` is RMSNorm's weight, eps and weight offset."""
    m, (n, k) = x.shape[:-1].numel(), weight.shape
    x = x.reshape(m, k)
    stride_residual = 0
    if residual is not None:
        residual = residual.reshape(m, n)
        stride_residual = residual.stride(0)
    strides = x.stride(0), weight.stride(0), stride_residual
    kernel, meta = config["kernel"], config["meta"]
    tiles_m, tiles_n = cdiv(m, meta["BLOCK_M"]), cdiv(n, meta["BLOCK_N"])
    even_k = k % (meta["BLOCK_K"] * meta.get("SLICES", 1)) == 0
    if kernel == "tile":
        _tile_kernel[(tiles_m * tiles_n,)](
            x, weight, bias, residual, y, m, n, k, *strides, activation, even_k, **meta
        )
        return
    norm_weight, eps, weight_offset = norm or (None, 0.0, 0.0)
    rescale = (norm is not None and x.dtype == torch.float16,) if kernel == "dot" else ()
    _KERNELS[kernel][(tiles_n, tiles_m)](
        x, weight, bias, residual, norm_weight, y, m, n, k, *strides, eps, weight_offset,
        activation, even_k, *rescale, **meta,
    )  # fmt: skip


def _cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    n, k = weight.shape
    if residual is not None and bias is None and activation is None:
        y = torch.addmm(residual.reshape(-1, n), x.reshape(-1, k), weight.T)
        return y.view(*x.shape[:-1], n)
    y = F.linear(x, weight, bias)
    if activation is not None or residual is not None:
        m = x.shape[:-1].numel()
        stride_residual = 0
        if residual is not None:
            residual = residual.reshape(m, n)
            stride_residual = residual.stride(0)
        block = min(next_power_of_2(n), 1024)
        _epilogue_kernel[(m * cdiv(n, block),)](y, residual, n, stride_residual, activation, block)
    return y


def _chosen_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> str:
    return choose(x, weight, backend)["backend"]


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
    multiplies float32 as precisely as torch is set to.
    Raises TypeError or ValueError naming the argument that does not fit.
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
