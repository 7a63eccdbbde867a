"""Which block of queries comes at which place in the grid of `flash_attention_sm90`.

Blocks of all heads in a wave, whose keys and values share the L2, come before the next wave; within it
those that see most keys come first. Of sequences one behind the other a block finds its own by bisection:
a grid of all sequences times the longest would be mostly empty where one is long and the others are not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _find_sequence(at, cu_q_ptr, cu_k_ptr, total, sequences, BLOCK_M: gl.constexpr):
    """First row of block `at` of concatenated sequences, and where its sequence lies.

    Sequence s begins with block cu_q[s] // BLOCK_M + s, which leaves room for all its rows and at most
    a block more. Rows behind the last sequence are one more, which has no keys.
    """
    s = 0
    above = sequences + 1
    while above - s > 1:
        middle = (s + above) // 2
        if gl.load(cu_q_ptr + middle) // BLOCK_M + middle <= at:
            s = middle
        else:
            above = middle
    following = gl.minimum(s + 1, sequences)
    q_start = gl.load(cu_q_ptr + s)
    k_start = gl.load(cu_k_ptr + s)
    len_q = gl.where(s < sequences, gl.load(cu_q_ptr + following), total) - q_start
    len_k = gl.load(cu_k_ptr + following) - k_start
    left = gl.cdiv(len_q, BLOCK_M) - 1 - (at - q_start // BLOCK_M - s)
    row = gl.where(left < 0, len_q, left * BLOCK_M)
    return row, q_start, k_start, len_q, len_k


@gluon.jit
def locate(
    index, cu_q_ptr, cu_k_ptr, len_q, len_k, sequences, heads, pairs, wave,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Sequence, head, first row and number of tiles of a block, and where its sequence lies.

    Of concatenated sequences `len_q` is all of their rows; the first row of a block without any is
    behind its sequence.
    """
    rows = gl.cdiv(len_q, BLOCK_M)
    if VARLEN:
        rows = len_q // BLOCK_M + sequences + 1
    before = index // (wave * rows) * wave
    rank = index - before * rows
    beside = gl.minimum(wave, pairs - before)
    pair = before + rank % beside
    b = pair // heads
    row = (rows - 1 - rank // beside) * BLOCK_M
    q_start = 0
    k_start = 0
    if VARLEN:
        row, q_start, k_start, len_q, len_k = _find_sequence(
            rank // beside, cu_q_ptr, cu_k_ptr, len_q, sequences, BLOCK_M
        )
    end = len_k
    if CAUSAL:
        end = gl.minimum(len_k, gl.minimum(row + BLOCK_M, len_q) + len_k - len_q)
    tiles = gl.cdiv(gl.maximum(end, 0), BLOCK_N)
    return b, pair % heads, row, tiles, q_start, k_start, len_q, len_k
