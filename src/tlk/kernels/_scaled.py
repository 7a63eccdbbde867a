"""The Triton kernels under `scaled_mm`, and their launcher.

    y = act(Σ x w · s_x s_w + b) + residual          x [M, K] and W [N, K] in 8 bits, scales in float32

Scales of rows multiply the finished sums; scales of blocks (1 × 128 of x, 128 × 128 of W) multiply a
product of 128 columns each, which is then added in float32. Integer sums are exact in int32.

- "dot", few rows: W is the left operand, so that its rows fill the 64 rows of an instruction of sm_90 and
  the few rows of x its 8 or more columns; 1-byte values go through shared memory to the tensor cores and
  are never converted. W streams by once; being a weight, it is asked for before earlier kernels are done.
- "ring", few rows on sm_90: the same in Gluon (_scaled_sm90.py), with tiles brought by the TMA unit.
- "tile", many rows of any shape: a tiled matmul in grouped order.
- "tma", many rows on sm_90 and newer: the same with tiles brought by the TMA unit, in programs that stay.
- "sums", int8 where Triton has no tensor cores (sm_75): products of integers, added at the end.

The tensor cores of sm_90 add products of float8 with about 14 bits; PROMOTE moves their sums to float32
after so many columns, 0 never.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tlk.kernels._device import sm_count
from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _store_outputs
from tlk.kernels._pdl import allow_next, pdl, prefetch, wait_for_previous
from tlk.kernels.tuning import Config

try:
    from tlk.kernels import _scaled_sm90 as hopper
except ImportError as error:  # Gluon moves between versions of Triton
    hopper, _import_error = None, str(error)  # type: ignore[assignment]

IN_BOXES = ("ring", "tma")
"""The kernels that read x and W by the TMA unit."""

BLOCK = tl.constexpr(128)


@triton.jit
def _added(x, w, acc, PROMOTE: tl.constexpr):
    """acc + x w."""
    if acc.dtype == tl.int32:
        return tl.dot(x, w, acc, out_dtype=tl.int32)
    elif PROMOTE == 0:
        return tl.dot(x, w, acc)
    else:
        return tl.dot(x, w, acc, max_num_imprecise_acc=PROMOTE)


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_xs, stride_w, stride_ws, stride_residual,
    ACTIVATION: tl.constexpr, BLOCKWISE: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROMOTE: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """yᵀ = W xᵀ of BLOCK_N rows of W; PREFETCH columns of them are asked for before the wait."""
    allow_next(PDL)
    first = tl.program_id(0) * BLOCK_N
    rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_starts = w_ptr + rows.to(tl.int64)[:, None] * stride_w
    if PDL:
        prefetch(w_starts, K, PREFETCH)
    wait_for_previous(PDL)
    w_ptrs = w_starts + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    xs_ptrs = xs_ptr + m.to(tl.int64) * stride_xs
    in_m = m < M
    if BLOCKWISE:  # scales are loaded a step ahead
        ws_ptr += first // BLOCK * stride_ws
        scale = tl.load(xs_ptrs, in_m, other=0.0) * tl.load(ws_ptr)
    acc = tl.zeros(
        (BLOCK_N, BLOCK_M), tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    )
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m[None, :], other=0.0)
        else:
            in_k = start + k < K
            w = tl.load(w_ptrs + start, in_k[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m[None, :] & in_k[:, None], other=0.0)
        if BLOCKWISE:
            block = tl.minimum(start // BLOCK + 1, (K - 1) // BLOCK)
            next_scale = tl.load(xs_ptrs + block, in_m, other=0.0) * tl.load(ws_ptr + block)
            acc += tl.dot(w, x) * scale[None, :]
            scale = next_scale
        else:
            acc = _added(w, x, acc, PROMOTE)
    y = acc.to(tl.float32)
    if not BLOCKWISE:
        y *= tl.load(xs_ptrs, in_m, other=0.0)[None, :]
        y *= tl.load(ws_ptr + rows * stride_ws)[:, None]
    _store_outputs(
        tl.trans(y), m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, False
    )  # fmt: skip


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; GROUP_M rows of tiles go together, so that L2 keeps what they share."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first_m + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _store_scaled(
    acc, first_m, first_n, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, stride_xs, stride_ws, stride_residual,
    ACTIVATION: tl.constexpr, BLOCKWISE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of sums whose first row and column are given."""
    m = first_m + tl.arange(0, acc.shape[0])
    y = acc.to(tl.float32)
    if not BLOCKWISE:
        n = first_n + tl.arange(0, acc.shape[1])
        y *= tl.load(xs_ptr + m.to(tl.int64) * stride_xs, m < M, other=0.0)[:, None]
        y *= tl.load(ws_ptr + n * stride_ws, n < N, other=0.0)[None, :]
    _store_outputs(
        y, m, first_n, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, False
    )  # fmt: skip


@triton.jit
def _block_scales(
    start, first_m, first_n, xs_ptr, ws_ptr, M, N, stride_xs, stride_ws,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales of a product of 128 columns from `start` on: [BLOCK_M], and [BLOCK_N] or 1 for all."""
    m = first_m + tl.arange(0, BLOCK_M)
    sx = tl.load(xs_ptr + m.to(tl.int64) * stride_xs + start // BLOCK, m < M, other=0.0)
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N if BLOCK_N > BLOCK else 1), N - 1)
    return sx, tl.load(ws_ptr + n // BLOCK * stride_ws + start // BLOCK)


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_xs, stride_w, stride_ws, stride_residual,
    ACTIVATION: tl.constexpr, BLOCKWISE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PROMOTE: tl.constexpr,
):  # fmt: skip
    """One tile of y, by pointers: any strides and any K."""
    first_m, first_n = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    k = tl.arange(0, BLOCK_K)
    # rows past the end repeat the last one, whose result is not stored: loads stay unmasked
    m = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + n[None, :] * stride_w + k[:, None]
    acc = tl.zeros(
        (BLOCK_M, BLOCK_N), tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    )
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs + start), tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, (start + k < K)[:, None], other=0.0)
        if BLOCKWISE:
            sx, sw = _block_scales(
                start, first_m, first_n, xs_ptr, ws_ptr, M, N, stride_xs, stride_ws, BLOCK_M, BLOCK_N
            )  # fmt: skip
            acc += tl.dot(x, w) * (sx[:, None] * sw[None, :])
        else:
            acc = _added(x, w, acc, PROMOTE)
    _store_scaled(
        acc, first_m, first_n, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, M, N,
        stride_xs, stride_ws, stride_residual, ACTIVATION, BLOCKWISE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _tma_kernel(
    x_boxes, xs_ptr, w_boxes, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_xs, stride_ws, stride_residual,
    ACTIVATION: tl.constexpr, BLOCKWISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PROMOTE: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Every so many-th tile of y; its sums leave in PARTS pieces, which take less shared memory."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = tl.int32 if w_boxes.dtype == tl.int8 else tl.float32
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_m, first_n = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype)
        for start in range(0, K, BLOCK_K):
            x = x_boxes.load([first_m, start])
            w = w_boxes.load([first_n, start])
            if BLOCKWISE:
                sx, sw = _block_scales(
                    start, first_m, first_n, xs_ptr, ws_ptr, M, N, stride_xs, stride_ws,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
                acc += tl.dot(x, w.T) * (sx[:, None] * sw[None, :])
            else:
                acc = _added(x, w.T, acc, PROMOTE)
        if PARTS == 2:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _store_scaled(
                left, first_m, first_n, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, M, N,
                stride_xs, stride_ws, stride_residual, ACTIVATION, BLOCKWISE,
            )  # fmt: skip
            _store_scaled(
                right, first_m, first_n + BLOCK_N // 2, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
                M, N, stride_xs, stride_ws, stride_residual, ACTIVATION, BLOCKWISE,
            )  # fmt: skip
        else:
            _store_scaled(
                acc, first_m, first_n, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, M, N,
                stride_xs, stride_ws, stride_residual, ACTIVATION, BLOCKWISE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_xs, stride_w, stride_ws, stride_residual,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_N whole rows of W: products and sums of integers."""
    allow_next(PDL)
    wait_for_previous(PDL)
    first = tl.program_id(0) * BLOCK_N
    rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # three dimensions from the pointers on: a load's layout is then the accumulator's
    x_ptrs = x_ptr + m.to(tl.int64)[:, None, None] * stride_x + k[None, None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :, None] * stride_w + k[None, None, :]
    in_m = (m < M)[:, None, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m, other=0)
        else:
            in_k = (start + k < K)[None, None, :]
            w = tl.load(w_ptrs + start, in_k, other=0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, in_m & in_k, other=0)
        acc += x.to(tl.int32) * w.to(tl.int32)
    y = tl.sum(acc, 2).to(tl.float32)
    y *= tl.load(xs_ptr + m.to(tl.int64) * stride_xs, m < M, other=0.0)[:, None]
    y *= tl.load(ws_ptr + rows * stride_ws)[None, :]
    _store_outputs(
        y, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, False
    )  # fmt: skip


def launch(
    config: Config, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, activation: str | None, y: Tensor, residual: Tensor | None, blockwise: bool,
) -> None:  # fmt: skip
    """Run the kernel that `config` names; those `IN_BOXES` want what `in_boxes` says, "sums" int8."""
    (m, n), k = (y.shape[:-1].numel(), y.shape[-1]), weight.shape[1]
    x, x_scale, y = x.reshape(m, k), x_scale.reshape(m, x_scale.shape[-1]), y.view(m, n)
    stride_residual = 0
    if residual is not None:
        residual = residual.reshape(m, n)
        stride_residual = residual.stride(0)
    kernel, meta = config["kernel"], dict(config["meta"])
    tensors = x, x_scale, weight, weight_scale, bias, residual, y
    if kernel in IN_BOXES:
        run: Any = hopper.launch if kernel == "ring" else _launch_tma
        run(meta, *tensors, stride_residual, activation, blockwise)
        return
    tiles_m, tiles_n = cdiv(m, meta["BLOCK_M"]), cdiv(n, meta["BLOCK_N"])
    strides = x.stride(0), x_scale.stride(0), weight.stride(0), weight_scale.stride(0)
    numbers = m, n, k, *strides, stride_residual
    even_k = k % meta["BLOCK_K"] == 0
    if kernel == "tile":
        _tile_kernel[(tiles_m * tiles_n,)](
            *tensors, *numbers, activation, blockwise, even_k, **meta
        )  # fmt: skip
        return
    dependent = pdl(x.device)
    flags: tuple[Any, ...] = (activation, blockwise) if kernel == "dot" else (activation,)
    run = _dot_kernel if kernel == "dot" else _sums_kernel
    run[(tiles_n, tiles_m)](
        *tensors, *numbers, *flags, even_k, dependent, **meta, launch_pdl=dependent
    )


def _launch_tma(
    meta: dict[str, Any], x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, y: Tensor, stride_residual: int,
    activation: str | None, blockwise: bool,
) -> None:  # fmt: skip
    (m, n), k = y.shape, weight.shape[1]
    block_m, block_n, block_k = meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]
    programs = meta.pop("PER_SM") * sm_count(x.device)
    _tma_kernel[(min(programs, cdiv(m, block_m) * cdiv(n, block_n)),)](
        _boxes(x, block_m, block_k), x_scale, _boxes(weight, block_n, block_k), weight_scale,
        bias, residual, y, m, n, k, x_scale.stride(0), weight_scale.stride(0), stride_residual,
        activation, blockwise, **meta,
    )  # fmt: skip


def _boxes(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def in_boxes(t: Tensor) -> bool:
    """Whether the TMA unit can read the matrix `t` [rows, columns] of 1-byte values where it lies."""
    return t.shape[-1] % 16 == 0 and t.stride(-2) % 16 == 0 and t.data_ptr() % 16 == 0


def ring_missing() -> str | None:
    """Why "ring" cannot run with this Triton, or None; then "dot" runs."""
    if hopper is None:
        return f"triton {triton.__version__} has another Gluon: {_import_error}"
    return hopper.missing()
