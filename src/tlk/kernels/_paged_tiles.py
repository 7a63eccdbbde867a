"""Where the tiles of rows of a batch of sequences lie, found on the device."""

import triton
import triton.language as tl


@triton.jit
def locate(tile, cu_ptr, n_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sequence of `tile`, `n_seqs` standing for the padding, and its first row there.

    Sequence s owns tiles cu[s]·GROUP // BLOCK_M + s onwards, enough for its rows in a grid that
    depends on T and S only: T·GROUP // BLOCK_M + S + 1 tiles.
    """
    s = tl.arange(0, BLOCK_S)
    owned = tl.load(cu_ptr + s, mask=s <= n_seqs, other=0) * GROUP // BLOCK_M + s
    begun = (s <= n_seqs) & (owned <= tile)
    seq = tl.sum(begun.to(tl.int32)) - 1
    return seq, (tile - tl.max(tl.where(begun, owned, 0))) * BLOCK_M
