"""The Triton kernels under `dequant_mm` for more rows than _dequant_linear.py takes, and their launcher.

x is written once in the order in which words of codes hold their values, with RMSNorm before where there is one:
M·K values, against the N·K codes that then need not move. After that W is again the left operand, decoded in
the registers of the lane that read it, and x the right one, through shared memory; on sm_90 both are what a
wgmma instruction takes. Sums of K split between programs are written in float32 and added in a fixed order
by a second kernel: the same result on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._dequant import Quantized, as_bytes, halves
from tlk.kernels._dequant_pairs import _decoded, _minus, _scale_pair, _stored_scale, _table
from tlk.kernels._device import sm
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._linear import _store_outputs, _weight_rows
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels.tuning import Config

try:
    from tlk.kernels import _dequant_sm90 as hopper
except ImportError as error:  # Gluon moves between versions of Triton
    hopper, _import_error = None, str(error)  # type: ignore[assignment]


@triton.jit
def _order_kernel(
    x_ptr, norm_ptr, out_ptr, K, WIDTH, half, stride_x, stride_out, eps, weight_offset,
    TABLE: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of a row of x, all of them to normalize, in the order of tiles of 64 bytes."""
    allow_next(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # of the codes that share a byte first one, then the other: 8 bytes lie within a group
    byte = i // (64 * HALVES) * 64 + i // 8 % 8 * 8
    if HALVES == 1:
        k = byte + i % 8
    elif GROUP == 0:
        k = byte + i // 64 % 2 * half + i % 8
    elif GROUP == 8:
        k = byte * 2 + i // 64 % 2 * 8 + i % 8
    else:
        k = byte // GROUP * (2 * GROUP) + byte % GROUP + i // 64 % 2 * half + i % 8
    if norm_ptr is not None:
        scale = tl.load(norm_ptr + k, byte < WIDTH, other=0.0).to(tl.float32) + weight_offset
    wait_for_previous(PDL)
    x = tl.load(x_ptr + tl.program_id(1).to(tl.int64) * stride_x + k, byte < WIDTH, other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
        x = (wide * rstd * scale).to(x_ptr.dtype.element_ty)
    # tile, half, lane, run, word, twice byte of a word: to tile, half, which pair, run, word, lane, in pair
    x = tl.reshape(x, (BLOCK // (64 * HALVES), HALVES, 4, 2, 2, 2, 2))
    x = tl.permute(x, (0, 1, 5, 3, 4, 2, 6)) if TABLE else tl.permute(x, (0, 1, 6, 3, 4, 2, 5))
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = out_ptr + tl.program_id(1).to(tl.int64) * stride_out + out
    tl.store(at, tl.reshape(x, (BLOCK,)), out < stride_out)


@triton.jit
def _lane_row(lane, first, N, GATED: tl.constexpr, WARPS: tl.constexpr):
    """Row of W that a lane reads; lanes (4 of a row, 8 rows), then halves of 16 rows, warps, the rest."""
    n = first + lane // (64 * WARPS) * (16 * WARPS) + lane // 32 % WARPS * 16
    return _weight_rows(n + lane // (32 * WARPS) % 2 * 8 + lane // 4 % 8, N, GATED).to(tl.int64)


@triton.jit(do_not_specialize=["M"])
def _wide_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, WIDTH, groups, split_bytes, stride_x, stride_w, stride_residual,
    KIND: tl.constexpr, GROUP: tl.constexpr, LATE: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr, WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, SPLITS: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tile of y, or with SPLITS its sums over a part of K in float32; GROUP is in bytes, 0 for rows."""
    allow_next(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALVES: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8" else 2
    RUNS: tl.constexpr = BLOCK_N * 4
    tiles_n, tiles_m = tl.cdiv(N * (1 + GATED), BLOCK_N), tl.cdiv(M, BLOCK_M)
    # GROUP_N rows of tiles go together, so that L2 keeps what they share
    first_n = tl.program_id(0) // (GROUP_N * tiles_m) * GROUP_N
    height = tl.minimum(tiles_n - first_n, GROUP_N)
    within = tl.program_id(0) % (GROUP_N * tiles_m)
    first = (first_n + within % height) * BLOCK_N
    m = within // height * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * split_bytes
    end = tl.minimum(begin + split_bytes, WIDTH)
    i = tl.arange(0, RUNS * 4)
    byte = i // 4 % 4 * 16
    words = w_ptr.to(tl.pointer_type(tl.int32)) + byte // 4 + i % 4
    words += _lane_row(i // 4, first, N, GATED, WARPS) * (stride_w // 4)
    lane = tl.arange(0, RUNS)
    row = _lane_row(lane, first, N, GATED, WARPS)
    lane_byte = begin + lane % 4 * 16
    group = lane_byte // GROUP if GROUP > 0 else lane_byte * 0
    stored = 0
    table = None
    zero = 0
    if LATE:
        wait_for_previous(PDL)
    if GROUP > 0:
        stored = _stored_scale(scale_ptr, row, group, lane_byte < end, groups, KIND)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + row * groups + group, lane_byte < end, other=0)
    if KIND == "table4":
        table = _table(table_ptr, DTYPE)
    if not LATE:
        wait_for_previous(PDL)
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_x
    x_ptrs += tl.arange(0, 64 * HALVES)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in tl.range(begin, end, 64, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(words + at // 4)
        else:
            w = tl.load(words + at // 4, byte < WIDTH - at, other=0)
        x = tl.load(x_ptrs + at * HALVES)
        factor = None
        minus = None
        # scales a step ahead: 8-bit loads beside a dot change the layout of its operands
        after = lane_byte - begin + at + 64
        group = after // GROUP if GROUP > 0 else after * 0
        if GROUP > 0:
            stored_next = _stored_scale(scale_ptr, row, group, after < end, groups, KIND)
            factor = _scale_pair(stored, KIND, DTYPE)
            factor = tl.reshape(factor, (RUNS, 2 if KIND == "nv4" else 1, 1))
        if zero_ptr is not None:
            zero_next = tl.load(zero_ptr + row * groups + group, after < end, other=0)
            minus = _minus(zero, KIND, DTYPE)[:, None, None]
        a = _decoded(tl.reshape(w, (RUNS, 2, 2)), minus, factor, table, KIND, DTYPE)
        a = tl.reshape(a, (BLOCK_N // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2, HALVES))
        a = tl.reshape(tl.permute(a, (0, 2, 1, 3, 9, 8, 5, 6, 4, 7)), (BLOCK_N, 64 * HALVES))
        acc = tl.dot(a, tl.trans(x), acc)
        if WGMMA:
            # A use of the sums makes the compiler wait for them. Triton 3.6 and 3.7 else let the instructions
            # of a step run on while the next one decodes into registers that they read: wrong on an H100.
            acc = tl.where(end > 0, acc, 0.0)
        if GROUP > 0:
            stored = stored_next
        if zero_ptr is not None:
            zero = zero_next
    if GROUP == 0 or KIND == "nv4":
        n = _weight_rows(first + tl.arange(0, BLOCK_N), N, GATED)
        acc *= tl.load((global_ptr if KIND == "nv4" else scale_ptr) + n).to(tl.float32)[:, None]
    if SPLITS == 1:
        _store_outputs(
            tl.trans(acc), m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual,
            ACTIVATION, GATED,
        )  # fmt: skip
    else:
        n = first + tl.arange(0, BLOCK_N)
        part = tl.program_id(1).to(tl.int64) * M + m
        inside = (m < M)[:, None] & (n < N * (1 + GATED))[None, :]
        tl.store(y_ptr + part[:, None] * (N * (1 + GATED)) + n[None, :], tl.trans(acc), inside)


@triton.jit(do_not_specialize=["M"])
def _add_kernel(
    part_ptr, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of SPLITS parts, finished."""
    allow_next(PDL)
    wait_for_previous(PDL)
    first = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N * (1 + GATED))[None, :]
    at = part_ptr + m.to(tl.int64)[:, None] * (N * (1 + GATED)) + n[None, :]
    y = tl.load(at, inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        y += tl.load(at + tl.cast(M, tl.int64) * (N * (1 + GATED)) * part, inside, other=0.0)
    _store_outputs(
        y, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


def in_order(x: Tensor, w: Quantized, norm: tuple[Tensor, float, float] | None) -> Tensor:
    """The rows of x [m, k] in the order of `w`'s words, zeros up to a whole tile; normalized first."""
    m, k = x.shape
    width = w.weight.shape[1]
    codes = halves(w.kind)
    group = 0 if w.whole_rows else w.group_size // codes
    out = x.new_empty(m, cdiv(width, 64) * 64 * codes)
    norm_weight, eps, weight_offset = norm or (None, 0.0, 0.0)
    block = max(next_power_of_2(out.shape[1]), 128)
    if norm is None:
        block = min(block, 2048)
    dependent = pdl(x.device)
    _order_kernel[(cdiv(out.shape[1], block), m)](
        x, norm_weight, out, k, width, group or k // 2, x.stride(0), out.shape[1], eps, weight_offset,
        w.kind == "table4", group, codes, dependent, block,
        num_warps=min(max(block // 1024, 1), 8), launch_pdl=dependent,
    )  # fmt: skip
    return out


def gluon_missing() -> str | None:
    """Why "wide_sm90" cannot run with this Triton, or None; then "wide" runs."""
    if hopper is None:
        return f"triton {triton.__version__} has another Gluon: {_import_error}"
    return hopper.missing()


def launch_wide(
    config: Config,
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None,
    gated: bool,
    late: bool = False,
    norm: tuple[Tensor, float, float] | None = None,
) -> None:
    """Run "wide" on x [M, K], y and residual [M, N], or on RMSNorm of x: weight, eps and weight offset.

    Or "wide_sm90" (_dequant_sm90.py), which takes x as it lies and no norm.
    `late`: a kernel just launched writes the scales.
    """
    meta = config["meta"]
    gluon = config["kernel"] == "wide_sm90"
    x = x if gluon else in_order(x, w, norm)
    (m, n), (rows, width) = y.shape, w.weight.shape
    dependent, splits = pdl(x.device), meta["SPLITS"]
    stride_residual = 0 if residual is None else residual.stride(0)
    split_bytes = cdiv(cdiv(width, 64), splits) * 64
    out = y if splits == 1 else torch.empty((splits, m, rows), device=x.device)
    flags: tuple[Any, ...] = activation, gated, dependent
    if gluon:
        hopper.launch(meta, x, w, bias, activation, out, m, n, residual, gated, late)
    else:
        _wide_kernel[(cdiv(rows, meta["BLOCK_N"]) * cdiv(m, meta["BLOCK_M"]), splits)](
            x, as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale,
            bias, residual, out,
            m, n, width, w.scale.shape[1], split_bytes, x.stride(0), w.weight.stride(0),
            stride_residual,
            w.kind, 0 if w.whole_rows else w.group_size // halves(w.kind), late, *flags,
            width % 64 == 0, sm(x.device) == 90,
            **meta, num_warps=meta["WARPS"], launch_pdl=dependent,
        )  # fmt: skip
    if splits > 1:
        block_m, block_n = min(next_power_of_2(m), 8), 256
        _add_kernel[(cdiv(rows, block_n), cdiv(m, block_m))](
            out, bias, residual, y, m, n, stride_residual, *flags, splits, block_m, block_n,
            num_warps=4, launch_pdl=dependent,
        )  # fmt: skip
