"""Rotary position embedding of queries and keys, in place.

    (a, b) → (a·cos − b·sin, b·cos + a·sin)        for pair i of a head, angle = position · frequency_i

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864

The pairs are (i, i + R/2), the layout of Llama checkpoints, or (2i, 2i + 1), the layout of the
paper; with R < D the last D − R dimensions stay. The tables are float32: rounded to bfloat16 they
would be off by degrees at long positions. One launch turns the heads of q and k, a block of heads
of one token per program: 2·T·(H + Hk)·R·itemsize bytes.
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
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._op import op


def rope_reference_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> None:
    c, s = cos[positions][:, None], sin[positions][:, None]  # [T, 1, R/2]
    rotary = 2 * cos.shape[1]
    for x in (q, k):
        h = x[..., :rotary].float()
        a, b = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        turned = a * c - b * s, b * c + a * s
        x[..., :rotary] = (
            torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        )


def _nothing(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> None:
    """The shape rule: an op in place returns no tensor."""


@triton.jit
def _turn(
    x_ptr, stride_t, stride_h, first, n_heads, token, cos, sin,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    heads = first + tl.arange(0, BLOCK_HEADS)
    x_ptr += token * stride_t + heads.to(tl.int64)[:, None] * stride_h
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = (heads < n_heads)[:, None] & (cols < 2 * HALF)
        x = tl.load(x_ptr + cols, mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_HALF))
        tl.store(x_ptr + cols, turned.to(x_ptr.dtype.element_ty), mask)
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (heads < n_heads)[:, None] & (cols < HALF)
        a = tl.load(x_ptr + cols, mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + HALF + cols, mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + cols, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask)
        tl.store(x_ptr + HALF + cols, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_HEADS
    pairs = tl.arange(0, BLOCK_HALF)
    row = tl.load(positions_ptr + token).to(tl.int64) * HALF
    cos = tl.load(cos_ptr + row + pairs, pairs < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row + pairs, pairs < HALF, other=0.0)[None, :]
    q_end = tl.cdiv(Q_HEADS, BLOCK_HEADS) * BLOCK_HEADS
    if first < q_end:
        _turn(
            q_ptr, q_stride_t, q_stride_h, first, Q_HEADS, token, cos, sin,
            HALF, INTERLEAVED, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    else:
        _turn(
            k_ptr, k_stride_t, k_stride_h, first - q_end, K_HEADS, token, cos, sin,
            HALF, INTERLEAVED, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip


def default_config(heads: int, half: int) -> tuple[int, int, int]:
    """Heads and pairs per program, and warps: 8 pairs a thread, two 16-byte loads in 16 bits."""
    block_half = next_power_of_2(half)
    block_heads = min(max(1024 // block_half, 1), next_power_of_2(heads))
    block_heads = max(block_heads, 256 // block_half)  # a warp of 16-byte loads, padded if need be
    return block_heads, block_half, min(max(block_heads * block_half // 256, 1), 4)


@op(rope_reference_, mutates=("q", "k"), fake=_nothing)
def _rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> None:
    tokens, half = q.shape[0], cos.shape[1]
    q_heads, k_heads = q.shape[1], k.shape[1]
    if tokens == 0 or half == 0:
        return
    block_heads, block_half, num_warps = default_config(max(q_heads, k_heads), half)
    blocks = cdiv(q_heads, block_heads) + cdiv(k_heads, block_heads)
    _rope_kernel[(tokens, blocks)](
        q, k, cos.contiguous(), sin.contiguous(), positions.contiguous(),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, num_warps=num_warps,
    )  # fmt: skip


def rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> None:
    """Turn the first R dimensions of every head of `q` [T, H, D] and `k` [T, Hk, D], in place.

    `cos` and `sin` are float32 tables [L, R/2]; token t uses their row `positions[t]` (int32 or
    int64, [T], below L). Pairs are (i, i + R/2), or (2i, 2i + 1) if `interleaved`. `q` and `k`
    may be views of one fused projection. Raises TypeError or ValueError for other dtypes and
    shapes, and where the last dimension of `q` or `k` is not contiguous.
    """
    check_dtype("q", q, *FLOATS)
    check_dtype("k", k, q.dtype)
    check_shape("q", q, None, None, None)
    check_shape("k", k, q.shape[0], None, q.shape[2])
    check_last_dim_contiguous("q", q)
    check_last_dim_contiguous("k", k)
    check_dtype("cos", cos, torch.float32)
    check_dtype("sin", sin, torch.float32)
    check_shape("cos", cos, None, None)
    check_shape("sin", sin, *cos.shape)
    if 2 * cos.shape[1] > q.shape[2]:
        raise ValueError(f"cos must have at most {q.shape[2] // 2} columns, got {cos.shape[1]}")
    check_dtype("positions", positions, torch.int32, torch.int64)
    check_shape("positions", positions, q.shape[0])
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        check_device(name, tensor, q.device)
    _rope_(q, k, cos, sin, positions, interleaved)
