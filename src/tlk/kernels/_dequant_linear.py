"""The Triton kernels under `dequant_mm` for few rows, and their launcher.

    y = act(x Wᵀ + b) + residual            W [N, K] in packed codes
    y = act(x Gᵀ + b₁) · (x Uᵀ + b₂)        W = [G; U]

"mma", tensor cores from one row of x on: rows of W are the left operand of 16-row instructions, the few
rows of x its 8, 16, … columns. Words of codes go from memory into the registers that multiply them and
are decoded there (_dequant_pairs.py). No code changes its lane: a sum over k may be taken in any order, so
it is x, far smaller, that is read in the order in which the words hold it. A lane reads WORDS words of
a row at once, four lanes a tile of 16 · WORDS bytes.

A warp takes ROWS · 16 rows of W; WARPS_K warps share these, each with every WARPS_K-th TILES tiles, and their
sums meet once at the end. That is a dimension of a batched dot, which Triton lays over the warps. Nothing
splits K between programs, hence the same result on every run.

Scales multiply float32 sums where a group is a row ("row") or fills tiles ("tile"), else pairs ("lane").

"sums", without tensor cores, for float32 and for sm_75: products in float32, reduced once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._dequant import Quantized, _e4m3, _e8m0, _values, as_bytes
from tlk.kernels._dequant_pairs import (
    _less,
    _looked_up,
    _minus,
    _number_pair,
    _pairs,
    _scaled,
    _table,
    _twice,
)
from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _store_outputs, _weight_rows
from tlk.kernels._pdl import allow_next, pdl, prefetch, wait_for_previous
from tlk.kernels.tuning import Config


@triton.jit
def _run_place(
    i, first, N,
    GATED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    WARPS_K: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Row of W and first byte of run i of a lane: lanes (4 of a row, 8 rows), warps, then registers."""
    j = i // 4
    warp = j // 8 % WARPS
    n = first + warp // WARPS_K * (16 * ROWS) + j // (8 * WARPS) % (2 * ROWS) * 8 + j % 8
    tile = warp % WARPS_K * TILES + j // (16 * ROWS * WARPS)
    return _weight_rows(n, N, GATED).to(tl.int64), tile * (16 * WORDS) + i % 4 * (4 * WORDS)


@triton.jit
def _stored_scale(
    scale_ptr, absmax_ptr, start_ptr, map_ptr, offset_ptr,
    row, byte, mask, groups, stride_absmax, KIND: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The scale of GROUP bytes as it is stored, of nested ones the float32; two in an int16 for nv4."""
    group = byte // GROUP
    if KIND == "nv4":
        pairs = scale_ptr.to(tl.pointer_type(tl.int16))
        return tl.load(pairs + row * (groups // 2) + group // 2, mask, other=0)
    if KIND == "fp8":
        return tl.load(scale_ptr + row // 128 * groups + group, mask, other=0.0)
    stored = tl.load(scale_ptr + row * groups + group, mask, other=0)
    if absmax_ptr is None:
        return stored
    block = tl.load(start_ptr + row) + group
    outer = tl.load(absmax_ptr + row * stride_absmax + block // 256, mask, other=0.0)
    return tl.load(map_ptr + stored.to(tl.int32)) * outer + tl.load(offset_ptr + row)


@triton.jit
def _scale_pair(stored, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Scales as pairs of DTYPE; a last dimension of two for nv4."""
    if KIND == "nv4":
        both = stored.to(tl.int32)
        low = _number_pair(_e4m3(both & 0xFF), DTYPE)
        return tl.join(low, _number_pair(_e4m3(both >> 8 & 0xFF), DTYPE))
    elif KIND == "mx4":
        exponent = stored.to(tl.int32)
        if tl.bfloat16 == DTYPE:
            return _twice(tl.where(exponent == 0, 0x40, exponent << 7))
        return _number_pair(_e8m0(exponent), DTYPE)
    elif KIND == "table4":
        return _number_pair(stored, DTYPE)
    else:
        return _twice(stored.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def _numbers(pairs, DTYPE: tl.constexpr):
    """int32 pairs as DTYPE, with a last dimension of two."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _finished(pairs, zero, factor, KIND: tl.constexpr, DTYPE: tl.constexpr):
    pairs = _less(pairs, zero, KIND, DTYPE)
    if factor is not None:
        pairs = _scaled(pairs, factor, tl.float16 == DTYPE)
    return _numbers(pairs, DTYPE)


@triton.jit
def _decoded(w, zero, factor, table, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Words of codes as numbers: two more dimensions of two of a word's pairs, one of its halves."""
    HALF: tl.constexpr = tl.float16 == DTYPE
    if KIND == "table4":
        p0, q0 = _looked_up(w, table)
        p1, q1 = _looked_up(w >> 16, table)
        low = tl.join(
            _finished(p0, zero, factor, KIND, DTYPE), _finished(p1, zero, factor, KIND, DTYPE)
        )
        high = tl.join(
            _finished(q0, zero, factor, KIND, DTYPE), _finished(q1, zero, factor, KIND, DTYPE)
        )
        return tl.join(low, high)
    low = tl.join(
        _finished(_pairs(w, 0, KIND, HALF), zero, factor, KIND, DTYPE),
        _finished(_pairs(w, 8, KIND, HALF), zero, factor, KIND, DTYPE),
    )
    if KIND == "int8" or KIND == "fp8":
        return low
    high = tl.join(
        _finished(_pairs(w, 4, KIND, HALF), zero, factor, KIND, DTYPE),
        _finished(_pairs(w, 12, KIND, HALF), zero, factor, KIND, DTYPE),
    )
    return tl.join(low, high)


@triton.jit
def _x_in_order(
    x_ptr, stride_x, M, K, half, start,
    TABLE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, WARPS_K: tl.constexpr, WORDS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """xᵀ in the order of codes in words from byte `start` on: [TILES, WARPS, codes of a tile, BLOCK_M].

    `half` is the distance of the codes that share a byte.
    """
    RUNS: tl.constexpr = WORDS // 2  # of 8 bytes, each the place of 8 values of x, or of twice 8
    HIGH: tl.constexpr = BLOCK_M // 8
    i = tl.arange(0, TILES * HALVES * RUNS * HIGH * WARPS * 8 * 32)
    j = i // 32
    m = tl.program_id(1) * BLOCK_M + j // (8 * WARPS) % HIGH * 8 + j % 8
    tile = j // 8 % WARPS % WARPS_K * TILES + j // (8 * WARPS * HIGH * RUNS * HALVES)
    byte = start + tile * (16 * WORDS)
    byte += j // (8 * WARPS * HIGH) % RUNS * 8 + i // 8 % 4 * (4 * WORDS)
    k = byte + i % 8
    if HALVES == 2:
        k = j // (8 * WARPS * HIGH * RUNS) % 2 * half + i % 8
        if GROUP == 0:
            k += byte
        else:
            k += byte // GROUP * (2 * GROUP) + byte % GROUP
    mask = m < M
    if not EVEN_K:
        mask &= byte * HALVES < K
    row = x_ptr + tl.minimum(m, M - 1).to(tl.int64) * stride_x
    x = tl.load(row + k, mask, other=0.0)
    # a value's place: tile, half, run, high rows, warp, low rows, lane, word, and twice its byte
    x = tl.reshape(x, (TILES, HALVES, RUNS, HIGH, WARPS, 8, 4, 2, 2, 2))
    if TABLE:
        x = tl.permute(x, (0, 4, 1, 8, 2, 6, 7, 9, 3, 5))
    else:
        x = tl.permute(x, (0, 4, 1, 9, 2, 6, 7, 8, 3, 5))
    return tl.reshape(x, (TILES, WARPS, HALVES * 16 * WORDS, BLOCK_M))


@triton.jit
def _multiplied(
    a, x, acc, stored,
    SCALES: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    WORDS: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc [WARPS, 16 · ROWS, BLOCK_M] plus the products of decoded words and x in their order."""
    CODES: tl.constexpr = HALVES * 16 * WORDS
    # a number's place: tile, rows of 8, warp, row, lane, run, word, in the pair, which pair, half
    a = tl.reshape(a, (TILES, 2 * ROWS, WARPS, 8, 4, WORDS // 2, 2, 2, 2, HALVES))
    if SCALES != "tile":
        a = tl.permute(a, (2, 1, 3, 0, 9, 8, 5, 4, 6, 7))
        a = tl.reshape(a, (WARPS, 16 * ROWS, TILES * CODES))
        x = tl.reshape(tl.permute(x, (1, 0, 2, 3)), (WARPS, TILES * CODES, BLOCK_M))
        return tl.dot(a, x, acc)
    a = tl.permute(a, (0, 2, 1, 3, 9, 8, 5, 4, 6, 7))
    a = tl.reshape(a, (TILES * WARPS, 16 * ROWS, CODES))
    y = tl.dot(a, tl.reshape(x, (TILES * WARPS, CODES, BLOCK_M)))
    # four lanes hold the scale of a row's tile, as they hold its sums, two columns each
    factor = tl.reshape(stored.to(tl.float32), (TILES, 2 * ROWS, WARPS, 8, 1, 4, 1))
    factor = tl.broadcast_to(factor, (TILES, 2 * ROWS, WARPS, 8, BLOCK_M // 8, 4, 2))
    factor = tl.permute(factor, (0, 2, 1, 3, 4, 5, 6))
    y *= tl.reshape(factor, (TILES * WARPS, 16 * ROWS, BLOCK_M))
    if TILES == 1:
        return acc + y
    return acc + tl.sum(tl.reshape(y, (TILES, WARPS, 16 * ROWS, BLOCK_M)), 0)


@triton.jit(do_not_specialize=["M", "steps"])
def _mma_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, absmax_ptr, start_ptr, map_ptr,
    offset_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, groups, steps, stride_x, stride_w, stride_absmax, stride_residual,
    KIND: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, WARPS_N: tl.constexpr, WARPS_K: tl.constexpr,
    TILES: tl.constexpr, WORDS: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """yᵀ = W xᵀ of WARPS_N · 16 · ROWS rows of W; GROUP is in bytes, 0 for whole rows."""
    allow_next(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALVES: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8" else 2
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    STEP: tl.constexpr = WARPS_K * TILES * 16 * WORDS  # bytes of a row
    RUNS: tl.constexpr = TILES * 2 * ROWS * WARPS * 8 * 4
    first = tl.program_id(0) * (WARPS_N * 16 * ROWS)
    width = K // HALVES
    i = tl.arange(0, RUNS * WORDS)
    row, byte = _run_place(i // WORDS, first, N, GATED, TILES, ROWS, WARPS, WARPS_K, WORDS)
    words = w_ptr.to(tl.pointer_type(tl.int32)) + row * (stride_w // 4) + (byte // 4 + i % WORDS)
    if EVEN_K:
        w = tl.load(words, eviction_policy="evict_first")
    else:
        w = tl.load(words, byte < width, other=0, eviction_policy="evict_first")
    run_row, run_byte = _run_place(
        tl.arange(0, RUNS), first, N, GATED, TILES, ROWS, WARPS, WARPS_K, WORDS
    )
    stored = None
    zero = None
    table = None
    if SCALES != "row":
        stored = _stored_scale(
            scale_ptr, absmax_ptr, start_ptr, map_ptr, offset_ptr,
            run_row, run_byte, run_byte < width, groups, stride_absmax, KIND, GROUP,
        )  # fmt: skip
    if PREFETCH > 0:
        at = _weight_rows(first + tl.arange(0, WARPS_N * 16 * ROWS), N, GATED).to(tl.int64)
        prefetch(w_ptr + at[:, None] * stride_w, width, PREFETCH)
    if KIND == "table4":
        table = _table(table_ptr, DTYPE)
    wait_for_previous(PDL)
    acc = tl.zeros((WARPS, 16 * ROWS, BLOCK_M), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        start = step * STEP
        # the next step's words are on their way while these are multiplied
        more = step + 1 < steps if EVEN_K else byte < width - start - STEP
        w_next = tl.load(words + (start + STEP) // 4, more, other=0, eviction_policy="evict_first")
        x = _x_in_order(
            x_ptr, stride_x, M, K, K // 2 if GROUP == 0 else GROUP, start, KIND == "table4", GROUP,
            EVEN_K, BLOCK_M, TILES, WARPS, WARPS_K, WORDS, HALVES,
        )  # fmt: skip
        factor = None
        stored_next = stored
        at = run_byte + start
        if SCALES != "row":
            stored_next = _stored_scale(
                scale_ptr, absmax_ptr, start_ptr, map_ptr, offset_ptr,
                run_row, at + STEP, at + STEP < width, groups, stride_absmax, KIND, GROUP,
            )  # fmt: skip
        if SCALES == "lane":
            factor = tl.reshape(
                _scale_pair(stored, KIND, DTYPE), (RUNS, 2 if KIND == "nv4" else 1, 1)
            )
        if zero_ptr is not None:
            z = zero_ptr + run_row * groups
            if GROUP > 0:
                z += at // GROUP
            zero = _minus(tl.load(z, at < width, other=0), KIND, DTYPE)[:, None, None]
        a = _decoded(tl.reshape(w, (RUNS, WORDS // 2, 2)), zero, factor, table, KIND, DTYPE)
        acc = _multiplied(
            a, x, acc, stored, SCALES, TILES, ROWS, WARPS, WORDS, HALVES, BLOCK_M
        )  # fmt: skip
        w, stored = w_next, stored_next
    y = tl.sum(tl.reshape(acc, (WARPS_N, WARPS_K, 16 * ROWS, BLOCK_M)), 1)
    y = tl.reshape(y, (WARPS_N * 16 * ROWS, BLOCK_M))
    if SCALES == "row" or KIND == "nv4":
        at = _weight_rows(first + tl.arange(0, WARPS_N * 16 * ROWS), N, GATED)
        y *= tl.load((global_ptr if KIND == "nv4" else scale_ptr) + at).to(tl.float32)[:, None]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    _store_outputs(
        tl.trans(y), m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, absmax_ptr, start_ptr, map_ptr,
    offset_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, groups, stride_x, stride_w, stride_absmax, stride_residual,
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
        run = start // RUN + tl.arange(0, RUNS)[None, None, :, None]
        byte = run * RUN + tl.arange(0, RUN)
        mask = byte < width
        in_x = mask & (m < M)[:, None, None, None]
        w = tl.load(w_ptr + row[None, :, None, None] * stride_w + byte, mask, other=0)
        low, high = _values(
            w.to(tl.int32), scale_ptr, zero_ptr, table_ptr, global_ptr, absmax_ptr, start_ptr,
            map_ptr, offset_ptr, row[None, :, None, None], run, run * RUN < width, mask, groups,
            stride_absmax, KIND, WHOLE_ROWS, BLOCKS,
        )  # fmt: skip
        if HALVES == 1:
            acc += tl.load(x_rows + byte, in_x, other=0.0).to(tl.float32) * low
        else:
            k = byte if WHOLE_ROWS else byte + run * RUN
            acc += tl.load(x_rows + k, in_x, other=0.0).to(tl.float32) * low
            k += width if WHOLE_ROWS else RUN
            acc += tl.load(x_rows + k, in_x, other=0.0).to(tl.float32) * high
    y = tl.sum(tl.reshape(acc, (BLOCK_M, BLOCK_N, RUNS * RUN)), 2)
    _store_outputs(
        y, m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


def halves(kind: str) -> int:
    """How many codes share a byte."""
    return 1 if kind in ("int8", "fp8") else 2


def scales_of(w: Quantized, words: int) -> str | None:
    """Where "mma" multiplies the scales of `w` in lanes of `words` words; None if it cannot."""
    if w.whole_rows:
        return "row" if not w.nested else None
    group = w.group_size // halves(w.kind)
    if w.kind == "nv4":
        return "lane" if words == 4 else None
    if group % (16 * words) == 0:
        return "tile"
    return "lane" if group % (4 * words) == 0 and not w.blocks else None


def launch(
    config: Config,
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None = None,
    gated: bool = False,
) -> None:
    """Run the kernel that `config` names."""
    (m, n), k = (y.shape[:-1].numel(), y.shape[-1]), w.shape[1]
    x = x.reshape(m, k)
    stride_residual = 0
    if residual is not None:
        residual = residual.reshape(m, n)
        stride_residual = residual.stride(0)
    meta = dict(config["meta"])
    dependent = pdl(x.device)
    absmax, start, values, offset = w.nested or (None, None, None, None)
    tensors = (
        x, as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale,
        absmax, start, values, offset, bias, residual, y,
    )  # fmt: skip
    rows, groups = w.weight.shape[0], w.scale.shape[1]
    strides = (
        x.stride(0), w.weight.stride(0), 0 if absmax is None else absmax.stride(0), stride_residual
    )  # fmt: skip
    flags: tuple[Any, ...] = activation, gated, dependent
    blocks_m = cdiv(m, meta["BLOCK_M"])
    if config["kernel"] == "sums":
        _sums_kernel[(cdiv(rows, meta["BLOCK_N"]), blocks_m)](
            *tensors, m, n, k, groups, *strides, w.kind, w.whole_rows, w.blocks, *flags, **meta,
            launch_pdl=dependent,
        )  # fmt: skip
        return
    width, words = w.weight.shape[1], meta["WORDS"]
    scales = scales_of(w, words)
    step = meta["WARPS_K"] * meta["TILES"] * 16 * words
    group = 0 if w.whole_rows else w.group_size // halves(w.kind)
    _mma_kernel[(cdiv(rows, meta["WARPS_N"] * 16 * meta["ROWS"]), blocks_m)](
        *tensors, m, n, k, groups, cdiv(width, step), *strides,
        w.kind, scales, group, *flags, width % step == 0, **meta,
        num_warps=meta["WARPS_N"] * meta["WARPS_K"], launch_pdl=dependent,
    )  # fmt: skip
