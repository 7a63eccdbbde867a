"""Expand a step from what the host knows of it to what the decoder reads of every token.

    position = seq_len − (cu_seqlens_q[s + 1] − token)        of a token of sequence s
    slot = table[row, position // page_size] · page_size + position % page_size
    id = ids[token], or tokens[−1 − ids[token]] if that is negative

The host sends a few numbers per sequence, and token ids only where it has them: what the last step
drew is taken from where it was drawn. So a step can be planned and launched before the host has read
the one before, and its inputs lie at fixed addresses, as a CUDA graph wants them. One launch per
cache group: a program finds the sequences of 64 tokens by counting the starts before them, or copies
the page table of a sequence as far as it is used. 33·T + 8·Σ pages bytes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous

BLOCK_T = 64  # tokens of a program, and as many sequences at a time
BLOCK_PAGES = 1024


def expand_step_reference(
    ids: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, rows: Tensor, tokens: Tensor,
    table: Tensor, page_size: int, ids_out: Tensor, positions: Tensor, slots: Tensor,
    table_out: Tensor,
) -> None:  # fmt: skip
    token = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    seq = torch.searchsorted(cu_seqlens_q, token, right=True) - 1
    real = seq < seq_lens.shape[0]
    seq = seq.clamp(max=seq_lens.shape[0] - 1)
    position = (seq_lens[seq] - cu_seqlens_q[seq + 1] + token).long().where(real, 0)
    page = table[rows[seq].clamp(min=0).long(), position // page_size].long()
    ids_out.copy_(torch.where(ids >= 0, ids, tokens[(-1 - ids).clamp(min=0)]))
    positions.copy_(position)
    slots.copy_((page * page_size + position % page_size).where(real & (page >= 0), -1))
    used = cdiv(int(seq_lens.max()), page_size)
    table_out[:, :used] = table[:, :used][rows.clamp(min=0).long()]


def _nothing(*_: object) -> None:
    """The shape rule: all outputs are arguments."""


@triton.jit
def _expand_tokens(
    first, ids_ptr, cu_ptr, lens_ptr, rows_ptr, tokens_ptr, table_ptr, ids_out_ptr, positions_ptr,
    slots_ptr, n_tokens, n_seqs, table_row, page_size, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = first + tl.arange(0, BLOCK_T)
    inside = token < n_tokens
    seq = tl.zeros((BLOCK_T,), tl.int32) - 1
    for start in range(0, n_seqs + 1, BLOCK_T):
        s = start + tl.arange(0, BLOCK_T)
        begun = tl.load(cu_ptr + s, mask=s <= n_seqs, other=2147483647)
        seq += tl.sum((begun[None, :] <= token[:, None]).to(tl.int32), 1)
    real = inside & (seq < n_seqs)
    end = tl.load(cu_ptr + seq + 1, mask=real, other=0)
    position = tl.load(lens_ptr + seq, mask=real, other=0) - end + token
    position = tl.where(real, position, 0)
    row = tl.load(rows_ptr + seq, mask=real, other=0).to(tl.int64)
    page = tl.load(table_ptr + row * table_row + position // page_size, mask=real, other=-1)
    slot = page.to(tl.int64) * page_size + position % page_size
    tl.store(slots_ptr + token, tl.where(page >= 0, slot, -1), mask=inside)
    tl.store(positions_ptr + token, position.to(tl.int64), mask=inside)
    known = tl.load(ids_ptr + token, mask=inside, other=0)
    drawn = tl.load(tokens_ptr - 1 - known, mask=inside & (known < 0), other=0)
    tl.store(ids_out_ptr + token, tl.where(known < 0, drawn, known), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "n_seqs"])
def _expand_step_kernel(
    ids_ptr, cu_ptr, lens_ptr, rows_ptr, tokens_ptr, table_ptr, ids_out_ptr, positions_ptr,
    slots_ptr, table_out_ptr, n_tokens, n_seqs, table_row, out_row, page_size,
    BLOCK_T: tl.constexpr, BLOCK_PAGES: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program i copies the pages of sequence i; those after the last expand a block of tokens."""
    allow_next(PDL)
    seq = tl.program_id(0)
    wait_for_previous(PDL)
    if seq < n_seqs:
        pages = tl.cdiv(tl.cdiv(tl.load(lens_ptr + seq), page_size), UNIT) * UNIT
        table_ptr += tl.load(rows_ptr + seq).to(tl.int64) * table_row
        table_out_ptr += seq.to(tl.int64) * out_row
        for start in range(0, pages, BLOCK_PAGES):
            at = start + tl.arange(0, BLOCK_PAGES)
            page = tl.load(table_ptr + at, mask=at < pages, other=0)
            tl.store(table_out_ptr + at, page, mask=at < pages)
    else:
        _expand_tokens(
            (seq - n_seqs) * BLOCK_T, ids_ptr, cu_ptr, lens_ptr, rows_ptr, tokens_ptr, table_ptr,
            ids_out_ptr, positions_ptr, slots_ptr, n_tokens, n_seqs, table_row, page_size, BLOCK_T,
        )  # fmt: skip


@op(
    expand_step_reference,
    mutates=("ids_out", "positions", "slots", "table_out"),
    fake=_nothing,
)
def _expand_step(
    ids: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, rows: Tensor, tokens: Tensor,
    table: Tensor, page_size: int, ids_out: Tensor, positions: Tensor, slots: Tensor,
    table_out: Tensor,
) -> None:  # fmt: skip
    n_tokens, n_seqs = ids.shape[0], seq_lens.shape[0]
    # entries are copied in vectors of 16 bytes where rows hold whole ones
    unit = 4 if table.shape[1] % 4 == table.stride(0) % 4 == table_out.stride(0) % 4 == 0 else 1
    dependent = pdl(ids.device)
    _expand_step_kernel[(n_seqs + cdiv(n_tokens, BLOCK_T),)](
        ids, cu_seqlens_q, seq_lens, rows, tokens, table, ids_out, positions, slots, table_out,
        n_tokens, n_seqs, table.stride(0), table_out.stride(0), page_size, BLOCK_T=BLOCK_T,
        BLOCK_PAGES=BLOCK_PAGES, UNIT=unit, PDL=dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip


def expand_step(
    ids: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, rows: Tensor, tokens: Tensor,
    tables: Sequence[Tensor], page_size: int, ids_out: Tensor, positions: Tensor,
    slots: Sequence[Tensor], tables_out: Sequence[Tensor],
) -> None:  # fmt: skip
    """Fill in the rows of a step of T tokens of S ≥ 1 sequences, on the device.

    `ids` [T] int64: a token id; or −1 − row: what was drawn last for state row `row`, in `tokens`
    [R] int64. `cu_seqlens_q` [S + 1] int32: where each sequence's tokens start; those from
    `cu_seqlens_q[S]` on are padding. `seq_lens` [S] int32: tokens of each sequence, those of the step
    included. `rows` [S] int32: the state row of each; anything where a sequence has length 0 and no
    tokens. `tables`: the page table [R, max_pages] int32 of the state rows, one per cache group.

    Written: `ids_out` and `positions` [T] int64, `slots` of each group [T] int64 (−1 for padding,
    whose position is 0, and where the table has a negative page), and the first
    ceil(seq_len / page_size) entries of each row of `tables_out` [S, ≥ max_pages] int32, as they are
    in the table; the others are undefined. No output may overlap an input.

    Raises TypeError or ValueError for other dtypes, shapes, devices and strides.
    """
    groups = len(tables)
    for name, per_group in (("slots", slots), ("tables_out", tables_out)):
        if len(per_group) != groups or not groups:
            raise ValueError(f"{name} must have one tensor for each table, got {len(per_group)}")
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    _check(ids, cu_seqlens_q, seq_lens, rows, tokens, ids_out, positions, *slots)
    for table, out in zip(tables, tables_out, strict=True):
        for name, x, n in (("tables", table, None), ("tables_out", out, seq_lens.shape[0])):
            check_dtype(name, x, torch.int32)
            check_shape(name, x, n, None)
            check_device(name, x, ids.device)
            check_last_dim_contiguous(name, x)
        if out.shape[1] < table.shape[1]:
            raise ValueError(f"tables_out must have {table.shape[1]} columns, got {out.shape[1]}")
    for table, slot, out in zip(tables, slots, tables_out, strict=True):
        _expand_step(
            ids, cu_seqlens_q, seq_lens, rows, tokens, table, page_size, ids_out, positions, slot,
            out,
        )  # fmt: skip


def _check(
    ids: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, rows: Tensor, tokens: Tensor,
    ids_out: Tensor, positions: Tensor, *slots: Tensor,
) -> None:  # fmt: skip
    check_shape("ids", ids, None)
    check_shape("seq_lens", seq_lens, None)
    n_tokens, n_seqs = ids.shape[0], seq_lens.shape[0]
    if n_seqs == 0:
        raise ValueError("seq_lens must have at least one sequence, got none")
    for name, x, dtype, n in (
        ("ids", ids, torch.int64, n_tokens),
        ("cu_seqlens_q", cu_seqlens_q, torch.int32, n_seqs + 1),
        ("seq_lens", seq_lens, torch.int32, n_seqs),
        ("rows", rows, torch.int32, n_seqs),
        ("tokens", tokens, torch.int64, None),
        ("ids_out", ids_out, torch.int64, n_tokens),
        ("positions", positions, torch.int64, n_tokens),
        *(("slots", x, torch.int64, n_tokens) for x in slots),
    ):
        check_dtype(name, x, dtype)
        check_shape(name, x, n)
        check_device(name, x, ids.device)
        check_last_dim_contiguous(name, x)
