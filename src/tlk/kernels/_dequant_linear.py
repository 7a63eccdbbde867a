"""The Triton kernel under `dequant_mm` for a few rows on tensor cores, and its launcher.

    y = act(x Wᵀ + b) + residual            W [N, K] in packed codes
    y = act(x Gᵀ + b₁) · (x Uᵀ + b₂)        W = [G; U]

Rows of W are the left operand of instructions of 16 rows, the few rows of x their 8 or 16 columns. Words of
codes go from memory into the registers that multiply them and are decoded there (_dequant_pairs.py).
No code changes its lane: a sum over k may be taken in any order, so it is x, far smaller, that is read in the
order in which the words hold it. A lane reads WORDS words of a row at once, four lanes a tile of 16 · WORDS bytes.

A program takes ROWS · 16 rows of W. Its warps share them, each with every WARPS-th TILES tiles, and their sums
meet once at the end: warps are a dimension of a batched dot, which Triton lays over them. Nothing splits K
between programs, hence the same result on every run.

Scales multiply float32 sums where a group is a row ("row") or fills tiles ("tile"), else pairs ("lane").

What costs, for one row and N × K = 28672 × 4096 on an H100: 24 µs for the 61 MB of int4, of which bf16 weights
take 82; 27 for the 66 MB of NF4, as without its lookups (_dequant_table.py).
"""

import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._dequant import Quantized, as_bytes, halves
from tlk.kernels._dequant_pairs import _decoded, _minus, _scale_pair, _stored_scale
from tlk.kernels._dequant_table import _looked_up_bytes, _nested_scale, _tables
from tlk.kernels._ints import cdiv
from tlk.kernels._linear import _store_outputs, _weight_rows
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels.tuning import Config


@triton.jit
def _run_place(
    lane, tile, first, N,
    GATED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Row of W and tile of a run of words: `lane` counts lanes (4 of a row, 8 rows), warps, then registers."""
    j = lane // 4
    n = first + j // (8 * WARPS) % (2 * ROWS) * 8 + j % 8
    return _weight_rows(n, N, GATED).to(tl.int64), j // 8 % WARPS * TILES + tile


@triton.jit
def _scales(
    scale_ptr, zero_ptr, row, tile, byte, mask, groups,
    KIND: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Scale and zero point of each run as they are stored; 0 for what there is none of."""
    if BESIDE > 0:
        group = tile
    elif GROUP > 0:
        group = byte // GROUP
    else:
        group = tile * 0
    stored = 0
    zero = 0
    if SCALES != "row":
        stored = _stored_scale(scale_ptr, row, group, mask, groups, KIND)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + row * groups + group, mask, other=0)
    return stored, zero


@triton.jit
def _of_runs(value, BESIDE: tl.constexpr, TILES: tl.constexpr):
    """What the lanes of a tile hold, for the runs of all tiles."""
    NEXT: tl.constexpr = max(BESIDE, 1)
    value = tl.broadcast_to(value[None, :, None], (TILES // NEXT, value.shape[0], NEXT))
    return tl.reshape(value, (TILES * value.shape[1],))


@triton.jit
def _absmax(rows, block, outer):
    """absmax of a block of 256 scales, or the last one of `outer`."""
    return tl.load(rows + tl.minimum(block, outer - 1))


@triton.jit
def _nested_scales(
    code, low, high, offset, start, byte, lane_byte, values,
    GROUP: tl.constexpr, BESIDE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Scales of runs from `byte` on; the rest is of lanes, `low` of the block of their first groups, `high` of the next."""
    first = lane_byte.to(tl.uint32) // GROUP  # a signed division takes three instructions
    beyond = (
        byte.to(tl.uint32) // GROUP + _of_runs((start + first) % 256 - first, BESIDE, TILES) >= 256
    )
    absmax = tl.where(beyond, _of_runs(high, BESIDE, TILES), _of_runs(low, BESIDE, TILES))
    return _nested_scale(code, absmax, _of_runs(offset, BESIDE, TILES), values)


@triton.jit
def _tiles_first(
    stored, BESIDE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Scales in the order of words, where those of BESIDE neighbouring tiles were loaded as neighbours."""
    if BESIDE <= 1:
        return stored
    else:
        apart = tl.reshape(stored, (TILES // BESIDE, 64 * ROWS * WARPS, BESIDE))
        return tl.reshape(tl.permute(apart, (0, 2, 1)), (TILES * 64 * ROWS * WARPS,))


@triton.jit
def _x_in_order(
    x_ptr, stride_x, M, K, half, start,
    TABLE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, SHARE: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """xᵀ in the order of codes in words from byte `start` on: [TILES, WARPS, codes of a tile, columns].

    `half` is the distance of the codes that share a byte. Fewer than 8 rows of x leave columns of the
    instruction free: the columns of SHARE tiles lie side by side, and all these tiles see the same ones.
    """
    RUNS: tl.constexpr = WORDS // 2  # of 8 bytes, each the place of 8 values of x, or of twice 8
    COLUMNS: tl.constexpr = BLOCK_M if BLOCK_M > 8 else 8
    HIGH: tl.constexpr = COLUMNS // 8
    TOGETHER: tl.constexpr = TILES // SHARE
    # a row of them: the compiler gives loads of equal shape one layout, and words come in fours
    i = tl.arange(0, TOGETHER * HALVES * RUNS * HIGH * WARPS * 8 * 32)[None, :]
    j = i // 32
    column = j // (8 * WARPS) % HIGH * 8 + j % 8
    m = tl.program_id(1) * BLOCK_M + column % BLOCK_M
    tile = j // 8 % WARPS * TILES + j // (8 * WARPS * HIGH * RUNS * HALVES) * SHARE
    tile += column // BLOCK_M
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
    if SHARE * BLOCK_M < COLUMNS:
        mask &= column < SHARE * BLOCK_M
    if not EVEN_K:
        mask &= byte * HALVES < K
    row = x_ptr + tl.minimum(m, M - 1).to(tl.int64) * stride_x
    x = tl.load(row + k, mask, other=0.0)
    # a value's place: tile, half, run, high columns, warp, low columns, lane, word, and twice its byte
    x = tl.reshape(x, (TOGETHER, HALVES, RUNS, HIGH, WARPS, 8, 4, 2, 2, 2))
    if TABLE:
        x = tl.permute(x, (0, 4, 8, 9, 2, 6, 7, 1, 3, 5))
    else:
        x = tl.permute(x, (0, 4, 1, 9, 2, 6, 7, 8, 3, 5))
    x = tl.reshape(x, (TOGETHER, 1, WARPS, HALVES * 16 * WORDS, COLUMNS))
    x = tl.broadcast_to(x, (TOGETHER, SHARE, WARPS, HALVES * 16 * WORDS, COLUMNS))
    return tl.reshape(x, (TILES, WARPS, HALVES * 16 * WORDS, COLUMNS))


@triton.jit
def _multiplied(
    a, x, acc, stored,
    SCALES: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, WORDS: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc [WARPS, 16 · ROWS, columns] plus the products of decoded words and x in their order."""
    CODES: tl.constexpr = HALVES * 16 * WORDS
    COLUMNS: tl.constexpr = acc.shape[2]
    # a number's place: tile, rows of 8, warp, row, lane, run, word, in the pair, which pair, half
    a = tl.reshape(a, (TILES, 2 * ROWS, WARPS, 8, 4, WORDS // 2, 2, 2, 2, HALVES))
    if SCALES != "tile" and SHARE == 1:
        a = tl.permute(a, (2, 1, 3, 0, 9, 8, 5, 4, 6, 7))
        a = tl.reshape(a, (WARPS, 16 * ROWS, TILES * CODES))
        x = tl.reshape(tl.permute(x, (1, 0, 2, 3)), (WARPS, TILES * CODES, COLUMNS))
        return tl.dot(a, x, acc)
    else:
        a = tl.permute(a, (0, 2, 1, 3, 9, 8, 5, 4, 6, 7))
        a = tl.reshape(a, (TILES * WARPS, 16 * ROWS, CODES))
        y = tl.dot(a, tl.reshape(x, (TILES * WARPS, CODES, COLUMNS)))
        if SCALES == "tile":
            # four lanes hold the scale of a row's tile, as they hold its sums, two columns each
            factor = tl.reshape(stored.to(tl.float32), (TILES, 2 * ROWS, WARPS, 8, 1, 4, 1))
            factor = tl.broadcast_to(factor, (TILES, 2 * ROWS, WARPS, 8, COLUMNS // 8, 4, 2))
            factor = tl.permute(factor, (0, 2, 1, 3, 4, 5, 6))
            y *= tl.reshape(factor, (TILES * WARPS, 16 * ROWS, COLUMNS))
        if acc.shape[0] == TILES * WARPS:
            return acc + y
        else:
            return acc + _of_tiles(y, TILES, SHARE, BLOCK_M)


@triton.jit
def _of_tiles(y, TILES: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sums [TILES · WARPS, rows, columns] added up over tiles, each of whose columns only its own count."""
    y = tl.reshape(y, (TILES, y.shape[0] // TILES, y.shape[1], y.shape[2]))
    if SHARE > 1:
        own = tl.arange(0, TILES)[:, None, None, None] % SHARE
        y = tl.where((tl.arange(0, y.shape[3]) // BLOCK_M)[None, None, None, :] == own, y, 0.0)
    return tl.sum(y, 0)


@triton.jit
def _of_warps(y, BLOCK_M: tl.constexpr, TABLE: tl.constexpr):
    """Sums [WARPS, rows, columns] added up over warps, and where tiles share columns over these.

    What warps hand over goes through shared memory: halves of it do where a table leaves too little.
    """
    if BLOCK_M < 8:
        y = tl.sum(tl.reshape(y, (y.shape[0], y.shape[1], 8 // BLOCK_M, BLOCK_M)), 2)
    if TABLE and y.numel > 2048:
        halves = tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2, BLOCK_M))
        low, high = tl.split(tl.permute(halves, (0, 2, 3, 1)))
        both = tl.join(tl.sum(low, 0), tl.sum(high, 0))
        return tl.reshape(tl.permute(both, (2, 0, 1)), (y.shape[1], BLOCK_M))
    else:
        return tl.sum(y, 0)


@triton.jit(do_not_specialize=["M", "steps"])
def _mma_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, global_ptr, bias_ptr, residual_ptr, y_ptr,
    absmax_ptr, start_ptr, map_ptr, offset_ptr,
    M, N, K, groups, outer, steps, stride_x, stride_w, stride_residual,
    KIND: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """yᵀ = W xᵀ of 16 · ROWS rows of W; GROUP is in bytes, 0 for whole rows."""
    allow_next(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALVES: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8" else 2
    SHARE: tl.constexpr = min(TILES, max(8 // BLOCK_M, 1))
    TILE: tl.constexpr = 16 * WORDS  # bytes of a row
    STEP: tl.constexpr = WARPS * TILES
    RUNS: tl.constexpr = TILES * 2 * ROWS * WARPS * 8 * 4
    # of scales and zero points those of neighbouring tiles are neighbours, where they are of whole tiles
    WIDE: tl.constexpr = 128 // scale_ptr.dtype.element_ty.primitive_bitwidth
    BESIDE: tl.constexpr = min(TILES, WIDE) if SCALES == "tile" and GROUP == TILE else 0
    LANES: tl.constexpr = 64 * ROWS * WARPS
    first = tl.program_id(0) * (16 * ROWS)
    width = K // HALVES
    i = tl.arange(0, RUNS * WORDS) // WORDS
    row, tile = _run_place(i, i // LANES, first, N, GATED, TILES, ROWS, WARPS)
    byte = tile * TILE + i % 4 * (4 * WORDS)
    words = w_ptr.to(tl.pointer_type(tl.int32)) + row * (stride_w // 4)
    words += byte // 4 + tl.arange(0, RUNS * WORDS) % WORDS
    if EVEN_K:
        w = tl.load(words, eviction_policy="evict_first")
    else:
        w = tl.load(words, byte < width, other=0, eviction_policy="evict_first")
    i = tl.arange(0, RUNS)
    lane = i // BESIDE % LANES if BESIDE > 0 else i
    tile = i // (BESIDE * LANES) * BESIDE + i % BESIDE if BESIDE > 0 else i // LANES
    row, tile = _run_place(lane, tile, first, N, GATED, TILES, ROWS, WARPS)
    run_byte = tile * TILE + lane % 4 * (4 * WORDS)
    stored, zero = _scales(
        scale_ptr, zero_ptr, row, tile, run_byte, width > 0 if EVEN_K else run_byte < width, groups,
        KIND, SCALES, GROUP, BESIDE,
    )  # fmt: skip
    NESTED: tl.constexpr = absmax_ptr is not None and SCALES != "row"
    if NESTED:
        lane = tl.arange(0, LANES)
        lane_row, lane_tile = _run_place(lane, 0, first, N, GATED, TILES, ROWS, WARPS)
        lane_byte = lane_tile * TILE + lane % 4 * (4 * WORDS)
        start, offset = tl.load(start_ptr + lane_row), tl.load(offset_ptr + lane_row)
        absmax = absmax_ptr + lane_row * outer
        block = start + lane_byte // GROUP >> 8
        low, high = _absmax(absmax, block, outer), _absmax(absmax, block + 1, outer)
    if KIND == "table4":
        pairs, inner = _tables(table_ptr, map_ptr, DTYPE)
    wait_for_previous(PDL)
    # sums of tiles stay apart where that saves more instructions than it takes registers
    APART: tl.constexpr = TILES if KIND == "table4" and SCALES == "tile" and SHARE > 1 else 1
    acc = tl.zeros((APART * WARPS, 16 * ROWS, BLOCK_M if BLOCK_M > 8 else 8), tl.float32)
    for step in tl.range(steps, num_stages=1):
        end = (step + 1) * (STEP * TILE)
        # the next step's words and scales are on their way while these are multiplied. Not only for
        # speed: 8-bit loads of the same step as a dot change the layout of its operands
        more = step + 1 < steps if EVEN_K else byte < width - end
        w_next = tl.load(words + end // 4, more, other=0, eviction_policy="evict_first")
        more = step + 1 < steps if EVEN_K else run_byte < width - end
        stored_next, zero_next = _scales(
            scale_ptr, zero_ptr, row, tile + (step + 1) * STEP, run_byte + end, more, groups,
            KIND, SCALES, GROUP, BESIDE,
        )  # fmt: skip
        x = _x_in_order(
            x_ptr, stride_x, M, K, K // 2 if GROUP == 0 else GROUP, end - STEP * TILE,
            KIND == "table4", GROUP, EVEN_K, BLOCK_M, TILES, SHARE, WARPS, WORDS, HALVES,
        )  # fmt: skip
        factor, minus, scales = None, None, stored
        if NESTED:
            at = step * (STEP * TILE)
            scales = _nested_scales(
                stored, low, high, offset, start, run_byte + at, lane_byte + at, inner,
                GROUP, BESIDE, TILES,
            )  # fmt: skip
            next_block = start + (lane_byte + end) // GROUP >> 8
            low = tl.where(next_block == block, low, high)
            block, high = next_block, _absmax(absmax, next_block + 1, outer)
        if SCALES == "lane":
            factor = _scale_pair(scales, KIND, DTYPE)
            factor = tl.reshape(factor, (RUNS, 2 if KIND == "nv4" else 1, 1))
        if zero_ptr is not None:
            minus = _tiles_first(_minus(zero, KIND, DTYPE), BESIDE, TILES, ROWS, WARPS)
            minus = minus[:, None, None]
        a = tl.reshape(w, (RUNS, WORDS // 2, 2))
        if KIND == "table4":
            a = _looked_up_bytes(a, factor, pairs, DTYPE)
        else:
            a = _decoded(a, minus, factor, None, KIND, DTYPE)
        scales = _tiles_first(scales, BESIDE, TILES, ROWS, WARPS)
        acc = _multiplied(
            a, x, acc, scales, SCALES, TILES, SHARE, ROWS, WARPS, WORDS, HALVES, BLOCK_M
        )  # fmt: skip
        w, stored, zero = w_next, stored_next, zero_next
    if APART > 1:
        acc = _of_tiles(acc, TILES, SHARE, BLOCK_M)
    y = _of_warps(acc, BLOCK_M, KIND == "table4")
    if SCALES == "row" or KIND == "nv4":
        n = _weight_rows(first + tl.arange(0, 16 * ROWS), N, GATED).to(tl.int64)
        scale = tl.load((global_ptr if KIND == "nv4" else scale_ptr) + n)
        if absmax_ptr is not None:
            absmax = _absmax(absmax_ptr + n * outer, tl.load(start_ptr + n) >> 8, outer)
            scale = _nested_scale(scale, absmax, tl.load(offset_ptr + n), inner)
        y *= scale.to(tl.float32)[:, None]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    _store_outputs(
        tl.trans(y), m, first, bias_ptr, residual_ptr, y_ptr, M, N, stride_residual, ACTIVATION, GATED
    )  # fmt: skip


def scales_of(w: Quantized, words: int) -> str | None:
    """Where "mma" multiplies the scales of `w` in lanes of `words` words; None if it cannot."""
    if w.whole_rows:
        return "row"
    group = w.group_size // halves(w.kind)
    if w.kind == "nv4":
        return "lane" if words == 4 else None
    if group % (16 * words) == 0:
        return "tile"
    return "lane" if group % (4 * words) == 0 and not w.blocks else None


def launch_mma(
    config: Config,
    x: Tensor,
    w: Quantized,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    residual: Tensor | None,
    gated: bool,
) -> None:
    """Run "mma" on x [M, K], y and residual [M, N]."""
    meta = config["meta"]
    (m, k), (rows, width) = x.shape, w.weight.shape
    dependent = pdl(x.device)
    step = meta["WARPS"] * meta["TILES"] * 16 * meta["WORDS"]
    absmax, start, values, offset = w.nested or (None, None, None, None)
    _mma_kernel[(cdiv(rows, 16 * meta["ROWS"]), cdiv(m, meta["BLOCK_M"]))](
        x, as_bytes(w.weight), as_bytes(w.scale), w.zero, w.table, w.global_scale,
        bias, residual, y, absmax, start, values, offset,
        m, y.shape[1], k, w.scale.shape[1], 0 if absmax is None else absmax.shape[1], cdiv(width, step),
        x.stride(0), w.weight.stride(0), 0 if residual is None else residual.stride(0),
        w.kind, scales_of(w, meta["WORDS"]), 0 if w.whole_rows else w.group_size // halves(w.kind),
        activation, gated, dependent, width % step == 0, **meta,
        num_warps=meta["WARPS"], launch_pdl=dependent,
    )  # fmt: skip
