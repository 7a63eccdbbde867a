"""Keys of one sequence split over programs: how many share them, and what makes one result of theirs.

Dao et al., "Flash-Decoding for long-context inference", https://pytorch.org/blog/flash-decoding/

A launch has programs for the longest sequence that the page table can hold, because a CUDA graph
keeps its grid. A short one is not cut into so many: the others leave at once, and a sequence of
LEAST_KEYS keys or fewer is done by one program, which writes the result itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._ints import next_power_of_2
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous

LEAST_KEYS = 256  # fewer keys in a split would cost more to combine than they save
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that exp2(-inf - LOWEST) is 0, not NaN


def split_count(programs: int, capacity: int, processors: int) -> int:
    """Programs that share one sequence's keys, of which there are at most `capacity`.

    A program for nearly each of the `processors`: it keeps enough loads in flight, more of them cost
    more to combine, and one that does not run at once runs alone, after the others (H100, TB/s: 8
    programs in 16 splits 2.92, 33 splits 2.81, 44 splits 2.46; 256 programs 2.92, in 2 splits 2.75).
    """
    splits = processors // programs
    if programs * splits < 0.9 * processors:
        splits += 1
    return max(min(capacity // LEAST_KEYS, splits), 1)


@triton.jit
def share_tiles(begin, end, splits, LEAST: tl.constexpr):
    """This split's part of key tiles [begin, end), and how many splits have one: at least 1.

    Splits with fewer than LEAST tiles are avoided, and the tiles dealt out evenly.
    """
    tiles = end - begin
    share = tl.cdiv(tiles, tl.maximum(tl.minimum(splits, tl.cdiv(tiles, LEAST)), 1))
    used = tl.maximum(tl.cdiv(tiles, tl.maximum(share, 1)), 1)
    begin = tl.minimum(begin + share * tl.program_id(2), end)
    return begin, tl.minimum(begin + share, end), used


@triton.jit(do_not_specialize=["n_seqs", "splits"])
def _combine_kernel(
    partial_ptr, lse_ptr, used_ptr, cu_ptr, out_ptr, n_seqs, splits,
    DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row × head: the mean of the splits' results, weighted by exp2(lse); 0 for padding."""
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dv = tl.arange(0, triton.next_power_of_2(DV))
    acc = tl.zeros((triton.next_power_of_2(DV),), tl.float32)
    wait_for_previous(PDL)
    used = tl.load(used_ptr + row)
    used = tl.where(tl.program_id(0) < tl.load(cu_ptr + n_seqs), used, 0)
    if used > 1:
        all_splits = tl.arange(0, BLOCK_SPLITS)
        written = all_splits < used
        lses = tl.load(lse_ptr + row * splits + all_splits, mask=written, other=float("-inf"))
        top = tl.maximum(tl.max(lses, 0), LOWEST)
        total = tl.sum(tl.exp2(lses - top), 0)
        for begin in range(0, used, CHUNK):
            split = begin + tl.arange(0, CHUNK)
            at = row * splits + split
            lse = tl.load(lse_ptr + at, mask=split < used, other=float("-inf"))
            mask = (split < used)[:, None] & (dv < DV)[None, :]
            part = tl.load(partial_ptr + at[:, None] * DV + dv[None, :], mask, other=0.0)
            acc += tl.sum(part * tl.exp2(lse - top)[:, None], 0)
        acc = acc / tl.where(total == 0.0, 1.0, total)
    if used != 1:  # else the one program has written the row
        tl.store(out_ptr + row * DV + dv, acc.to(out_ptr.dtype.element_ty), mask=dv < DV)


class Partials:
    """What the splits of every row and head leave for `combine`: float32 results and their weights.

    `results` [T, H, splits, Dv]; `lse` [T, H, splits], base-2 log-sum-exp of the scores, -inf where a
    row sees no key; `used` [T, H] int32, the splits that wrote, and 1 where `out` is written already.
    """

    def __init__(self, out: Tensor, splits: int) -> None:
        rows = out.shape[:2]
        self.splits = splits
        self.results = out.new_empty(*rows, splits, out.shape[2], dtype=torch.float32)
        self.lse = out.new_empty(*rows, splits, dtype=torch.float32)
        self.used = out.new_empty(rows, dtype=torch.int32)

    def combine(self, out: Tensor, cu_seqlens_q: Tensor) -> None:
        """Finish `out` [T, H, Dv]; rows beyond the last sequence become 0."""
        dependent = pdl(out.device)
        _combine_kernel[tuple(out.shape[:2])](
            self.results, self.lse, self.used, cu_seqlens_q, out, cu_seqlens_q.shape[0] - 1,
            self.splits, DV=out.shape[2], BLOCK_SPLITS=next_power_of_2(self.splits), CHUNK=16,
            PDL=dependent, num_warps=4, launch_pdl=dependent,
        )  # fmt: skip
