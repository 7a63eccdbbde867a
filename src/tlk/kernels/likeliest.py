"""The likeliest token of every row of logits, for steps that draw nothing by chance.

    token[s] = argmax over v of logits[s, v],   state[rows[s]] = token[s]

Order is that of `sample`: NaN counts as -inf, +inf as the largest float32, the lowest index wins among
equals, and a row without any logit above -inf gives 0.

A row is cut into pieces, so that one row keeps every SM busy and many rows are read at bandwidth. A
program keeps the best logit of each lane and leaves one int64 of its piece, which orders as (logit,
−index) do; a second launch takes the largest of each row. Both only compare, so a token depends on its
row alone, and not on the batch or the cut. S·V·itemsize bytes, some 6 instructions a logit.
"""

import torch
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
from tlk.kernels._device import sm_count
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels._threshold import LOWEST, cleaned, key_of

BLOCK = 2048  # columns of a tile: two 16-byte loads of 16-bit logits in each thread of 4 warps
PIECES = 128  # of a row, at most


def likeliest_reference(logits: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    tokens = cleaned(logits).argmax(-1)
    state.index_copy_(0, rows, tokens)
    return tokens


@triton.jit(do_not_specialize=["pieces"])
def _pieces_kernel(
    logits_ptr, best_ptr, stride, n_cols, columns, pieces,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best of `columns` columns of a row, as an integer: its logit, then 2³¹ − 1 − its index."""
    allow_next(PDL)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr, lanes = logits_ptr + row * stride, tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    tile = tl.zeros([BLOCK], tl.int32)  # where the tile that holds a lane's best starts
    first = piece * columns
    wait_for_previous(PDL)
    for start in range(first, tl.minimum(first + columns, n_cols), BLOCK):
        cols = start + lanes
        x = tl.load(row_ptr + cols, cols < n_cols, other=float("-inf")).to(tl.float32)
        x = tl.where(x == float("inf"), -LOWEST, x)
        over = x > top  # never so for NaN
        top, tile = tl.where(over, x, top), tl.where(over, start, tile)
    token = tl.where(top > float("-inf"), tile + lanes, 0)
    key = key_of(tl.where(top == 0, 0.0, top), 0)  # -0 equals 0
    best = tl.max((key << 32) | (0x7FFFFFFF - token).to(tl.int64), 0)
    tl.store(best_ptr + row * pieces + piece, best)


@triton.jit(do_not_specialize=["pieces"])
def _likeliest_kernel(
    best_ptr, state_ptr, rows_ptr, tokens_ptr, pieces, PIECES: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.minimum(tl.arange(0, PIECES), pieces - 1)
    wait_for_previous(PDL)
    best = tl.max(tl.load(best_ptr + row * pieces + piece), 0)
    token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(tokens_ptr + row, token)
    tl.store(state_ptr + tl.load(rows_ptr + row), token)


def piece_columns(n_rows: int, n_cols: int, sm_count: int) -> int:
    """Columns of a piece, in whole tiles: 8 programs an SM, which all fit at once, if rows are few.

    However many the rows, a piece has 16 tiles at most: programs left over for a last round are short.
    """
    tiles = cdiv(n_cols, BLOCK)
    pieces = min(max(8 * sm_count // n_rows, cdiv(tiles, 16)), PIECES)
    return cdiv(tiles, pieces) * BLOCK


@op(likeliest_reference, mutates=("state",))
def _likeliest_(logits: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    n_rows, n_cols = logits.shape
    tokens = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    if n_rows:
        columns = piece_columns(n_rows, n_cols, sm_count(logits.device))
        pieces, dependent = cdiv(n_cols, columns), pdl(logits.device)
        best = torch.empty(n_rows, pieces, dtype=torch.int64, device=logits.device)
        _pieces_kernel[(n_rows, pieces)](
            logits, best, logits.stride(0), n_cols, columns, pieces, BLOCK=BLOCK, PDL=dependent,
            num_warps=4, launch_pdl=dependent,
        )  # fmt: skip
        _likeliest_kernel[(n_rows,)](
            best, state, rows, tokens, pieces, PIECES=PIECES, PDL=dependent, num_warps=1,
            launch_pdl=dependent,
        )  # fmt: skip
    return tokens


def likeliest_(logits: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    """The index of the largest logit in every row of `logits` [S, V], also kept in `state`.

    `logits` are float32, float16 or bfloat16; rows may be strided. The lowest index wins among equals,
    NaN counts as -inf, and a row without any logit above -inf gives 0.

    Returns tokens [S] int64. Written: `state[rows[s]] = tokens[s]`, of `state` [R] int64, for `rows` [S]
    int64, which must be different from each other and in [0, R): they are not checked.

    Raises TypeError for other dtypes and ValueError for other shapes, devices or strides.
    """
    check_dtype("logits", logits, *FLOATS)
    check_shape("logits", logits, None, None)
    check_last_dim_contiguous("logits", logits)
    n_rows, n_cols = logits.shape
    if n_cols == 0:
        raise ValueError(f"logits must have at least one column, got {tuple(logits.shape)}")
    for name, vector, n in (("state", state, None), ("rows", rows, n_rows)):
        check_dtype(name, vector, torch.int64)
        check_shape(name, vector, n)
        check_device(name, vector, logits.device)
        check_last_dim_contiguous(name, vector)
    return _likeliest_(logits, state, rows)
