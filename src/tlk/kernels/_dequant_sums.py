"""The Triton kernel under `dequant_mm` without tensor cores: for float32, for sm_75, and for rows of any length.

Products in float32, reduced once at the end; codes go group by group, so that one load serves each scale.
"""

import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._dequant import Quantized, _values, as_bytes
from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _store_outputs, _weight_rows
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels.tuning import Config


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, groups, stride_x, stride_w, stride_residual,
    KIND: tl.constexpr, WHOLE_ROWS: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_N whole rows of W, RUNS runs of bytes at a time."""
    allow_next(PDL)
    wait_for_previous(PDL)
    HALVES: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8" else 2
    first = tl.program_id(0) * BLOCK_N
    row = _weight_rows(first + tl.arange(0, BLOCK_N), N, GATED).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + m.to(tl.int64)[:, None, None, None] * stride_x
    width = K // HALVES
    acc = tl.zeros((BLOCK_M, BLOCK_N, RUNS, RUN), tl.float32)
    for start in range(0, width, RUNS * RUN):
        run = start // RUN + tl.arange(0, RUNS)[None, None, :]
        byte = run[:, :, :, None] * RUN + tl.arange(0, RUN)
        mask = byte < width
        in_x = mask & (m < M)[:, None, None, None]
        w = tl.load(w_ptr + row[None, :, None, None] * stride_w + byte, mask, other=0)
        low, high = _values(
            w.to(tl.int32), scale_ptr, zero_ptr, table_ptr, global_ptr, row[None, :, None], run,
            run * RUN < width, groups, KIND, WHOLE_ROWS, BLOCKS,
        )  # fmt: skip
        if HALVES == 1:
            acc += tl.load(x_rows + byte, in_x, other=0.0).to(tl.float32) * low
        else:
            k = byte if WHOLE_ROWS else byte + run[:, :, :, None] * RUN
            acc += tl.load(x_rows + k, in_x, other=0.0).to(tl.float32) * low
            k += width if WHOLE_ROWS else RUN
            acc += tl.load(x_rows + k, in_x, other=0.0).to(tl.float32) * high
    y = tl.sum(tl.reshape(acc, (BLOCK_M, BLOCK_N, RUNS * RUN)), 2)
    _store_outputs(
        y, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


def launch_sums(
    config: Config,
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None,
    gated: bool,
) -> None:
    """Run "sums" on x [M, K], y and residual [M, N]."""
    meta = config["meta"]
    m, k = x.shape
    dependent = pdl(x.device)
    _sums_kernel[(cdiv(w.weight.shape[0], meta["BLOCK_N"]), cdiv(m, meta["BLOCK_M"]))](
        x, as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale,
        bias, residual, y,
        m, y.shape[1], k, w.scale.shape[1],
        x.stride(0), w.weight.stride(0), 0 if residual is None else residual.stride(0),
        w.kind, w.whole_rows, w.blocks, activation, gated, dependent, **meta, launch_pdl=dependent,
    )  # fmt: skip
