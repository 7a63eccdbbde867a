"""Rotary position embedding of queries, in place, and of keys on their way into the cache.

    (a, b) → (a·cos − b·sin, b·cos + a·sin)        for pair i of a head, angle = position · frequency_i
    cache[slot // page_size, :, slot % page_size] = key, value              for tokens with slot ≥ 0

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864

The pairs are (i, i + R/2), the layout of Llama checkpoints, or (2i, 2i + 1), the layout of the
paper; with R < D the last D − R dimensions stay. The tables are float32: rounded to bfloat16 they
would be off by degrees at long positions. Heads may be normalized first (RMSNorm over D).

One launch does all that lies between the projection and attention, a block of heads of q, of k or
of v of one token per program: 2·T·(H·R + Hk·(D + Dv))·itemsize bytes. A negative slot writes
nowhere, so padded rows of a captured batch need no branch on the host.
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
from tlk.kernels._kv_codes import encode, writable
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels.kv_cache import check_write, head_scale, write_heads, write_kv_reference_


def rope_and_write_kv_reference_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, interleaved: bool = False,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    weight_offset: float = 0.0, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    c, s = cos[positions][:, None], sin[positions][:, None]  # [T, 1, R/2]
    turned = []
    for x, weight in ((q, q_norm), (k, k_norm)):
        h = x.float()
        if weight is not None:
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
            h = h * (weight.float() + weight_offset)
        rotary, rest = h.tensor_split((2 * c.shape[-1],), -1)
        a, b = (rotary[..., ::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, -1)
        pair = a * c - b * s, b * c + a * s
        rotary = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        turned.append(torch.cat((rotary, rest), -1))
    q.copy_(turned[0])
    write_kv_reference_(turned[1], v, k_cache, v_cache, slots, k_scale, v_scale)


def _nothing(*_: object) -> None:
    """The shape rule: an op in place returns no tensor."""


@triton.jit
def _factor(norm_ptr, cols, mask, scale, weight_offset):
    """What a norm multiplies columns `cols` by, for heads whose 1 / rms is `scale`; else 1."""
    if norm_ptr is not None:
        scale *= tl.load(norm_ptr + cols, mask, other=0.0).to(tl.float32) + weight_offset
    return scale


@triton.jit
def _turn(
    x_ptr, to_ptr, stored_scale, live, kept, cos_ptr, sin_ptr, row, norm_ptr, eps, weight_offset,
    IN_PLACE: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Read `live` heads at `x_ptr` [BLOCK_HEADS, 1] and write them, turned, to `to_ptr` if `kept`.

    There they are stored as `encode` does it, divided by `stored_scale` if that is 8 bits.
    """
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    cols, inside = pairs, pairs < HALF
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        inside = cols < 2 * HALF
    # the heads first: their loads do not wait for the token's position, those of the tables do
    x = tl.load(x_ptr + cols, live & inside, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 1)
    if not INTERLEAVED:
        b = tl.load(x_ptr + HALF + cols, live & inside, other=0.0).to(tl.float32)
        squares += tl.sum(b * b, 1)
    if D > 2 * HALF:  # what does not turn
        rest_cols = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_in = rest_cols < D
        rest = tl.load(x_ptr + rest_cols, live & rest_in, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    cos = tl.load(cos_ptr + row * HALF + pairs, pairs < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + pairs, pairs < HALF, other=0.0)
    scale = 1.0
    if norm_ptr is not None:
        scale = tl.rsqrt(squares / D + eps)[:, None]
    x *= _factor(norm_ptr, cols, inside, scale, weight_offset)
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(x, (live.shape[0], BLOCK_HALF, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = tl.reshape(turned, (live.shape[0], 2 * BLOCK_HALF))
        tl.store(to_ptr + cols, encode(turned, stored_scale, dtype), kept & inside)
    else:
        b *= _factor(norm_ptr, HALF + cols, inside, scale, weight_offset)
        first = encode(x * cos - b * sin, stored_scale, dtype)
        second = encode(b * cos + x * sin, stored_scale, dtype)
        tl.store(to_ptr + cols, first, kept & inside)
        tl.store(to_ptr + HALF + cols, second, kept & inside)
    if D > 2 * HALF and (not IN_PLACE or norm_ptr is not None):
        rest *= _factor(norm_ptr, rest_cols, rest_in, scale, weight_offset)
        tl.store(to_ptr + rest_cols, encode(rest, stored_scale, dtype), kept & rest_in)


@triton.jit
def _rope_and_write_kv_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    k_scale_ptr, v_scale_ptr, q_norm_ptr, k_norm_ptr, q_stride_t, q_stride_h, k_stride_t,
    k_stride_h, v_stride_t, v_stride_h, k_stride_page, v_stride_page, eps, weight_offset,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token: of q first, then of k, then of v."""
    allow_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    wait_for_previous(PDL)
    values = block >= q_blocks + kv_blocks
    # of keys or of values, in one place: loads of a number a head are not cheap
    scale_ptr = k_scale_ptr
    if k_scale_ptr is not None:
        scale_ptr = tl.where(values, v_scale_ptr, k_scale_ptr)
    kv_block = tl.where(values, block - q_blocks - kv_blocks, block - q_blocks)
    scale = head_scale(scale_ptr, kv_block * BLOCK_HEADS, block >= q_blocks, HEADS, BLOCK_HEADS)
    if values:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            write_heads(
                v_ptr, v_cache_ptr, scale, token, slot, kv_block * BLOCK_HEADS, v_stride_t,
                v_stride_h, v_stride_page, HEADS, PAGE, DV, BLOCK_HEADS, BLOCK_DV,
            )  # fmt: skip
    else:
        row = tl.load(positions_ptr + token).to(tl.int64)
        head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        if block < q_blocks:
            at = token * q_stride_t + head * q_stride_h
            _turn(
                q_ptr + at, q_ptr + at, 1.0, head < Q_HEADS, head < Q_HEADS, cos_ptr, sin_ptr, row,
                q_norm_ptr, eps, weight_offset, True, INTERLEAVED, HALF, D, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        else:
            head -= q_blocks * BLOCK_HEADS
            slot = tl.load(slots_ptr + token)
            at = token * k_stride_t + head * k_stride_h
            to = slot // PAGE * k_stride_page + (head * PAGE + slot % PAGE) * D
            _turn(
                k_ptr + at, k_cache_ptr + to, scale, head < HEADS, (head < HEADS) & (slot >= 0),
                cos_ptr, sin_ptr, row, k_norm_ptr, eps, weight_offset, False, INTERLEAVED, HALF, D,
                BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip


def default_config(heads: int, half: int) -> tuple[int, int, int]:
    """Heads and pairs per program, and warps, for `heads` kv heads: 4 pairs a thread."""
    block_half = next_power_of_2(half)
    block_heads = min(max(1024 // block_half, 1), next_power_of_2(heads))
    block_heads = max(block_heads, 256 // block_half)  # a warp of 16-byte loads, padded if need be
    return block_heads, block_half, min(max(block_heads * block_half // 128, 1), 4)


@op(rope_and_write_kv_reference_, mutates=("q", "k_cache", "v_cache"), fake=_nothing)
def _rope_and_write_kv_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, interleaved: bool = False,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    weight_offset: float = 0.0, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    (tokens, q_heads, d), (heads, dv), half = q.shape, v.shape[1:], cos.shape[1]
    if tokens == 0:
        return
    block_heads, block_half, num_warps = default_config(heads, half)
    blocks = cdiv(q_heads, block_heads) + 2 * cdiv(heads, block_heads)
    dependent = pdl(q.device)
    _rope_and_write_kv_kernel[(tokens, blocks)](
        q, k, v, cos.contiguous(), sin.contiguous(), positions.contiguous(),
        writable(k_cache), writable(v_cache), slots.contiguous(), k_scale, v_scale, q_norm, k_norm,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), k_cache.stride(0), v_cache.stride(0), eps, weight_offset,
        Q_HEADS=q_heads, HEADS=heads, PAGE=k_cache.shape[2], D=d, DV=dv, HALF=half,
        INTERLEAVED=interleaved, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        BLOCK_REST=next_power_of_2(max(d - 2 * half, 1)), BLOCK_DV=next_power_of_2(dv),
        PDL=dependent, num_warps=num_warps, launch_pdl=dependent,
    )  # fmt: skip


def rope_and_write_kv_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, interleaved: bool = False,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    weight_offset: float = 0.0, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Turn `q` [T, H, D] in place, and write turned `k` [T, Hk, D] and `v` [T, Hk, Dv] to pages.

    The first R dimensions of every head of q and k turn. `cos` and `sin` are float32 tables
    [L, R/2]; token t uses their row `positions[t]` (int32 or int64, [T], below L). Pairs are
    (i, i + R/2), or (2i, 2i + 1) if `interleaved`. With `q_norm` and `k_norm` [D] each head is
    divided by its root mean square and multiplied by `weight_offset` + weight before it turns.

    `k_cache`, `v_cache`, `slots`, `k_scale` and `v_scale` are those of `write_kv_`; `k` and `v` stay
    as they are. All of
    q, k and v may be views of one fused projection. Raises TypeError or ValueError for other dtypes
    and shapes, and where the last dimension of q, k or v is not contiguous.
    """
    check_dtype("q", q, *FLOATS)
    check_dtype("k", k, q.dtype)
    check_shape("q", q, None, None, None)
    check_shape("k", k, q.shape[0], None, q.shape[2])
    check_last_dim_contiguous("q", q)
    check_write(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    check_dtype("cos", cos, torch.float32)
    check_dtype("sin", sin, torch.float32)
    check_shape("cos", cos, None, None)
    check_shape("sin", sin, *cos.shape)
    if not 1 <= cos.shape[1] <= q.shape[2] // 2:
        raise ValueError(f"cos must have 1 to {q.shape[2] // 2} columns, got {cos.shape[1]}")
    check_dtype("positions", positions, torch.int32, torch.int64)
    check_shape("positions", positions, q.shape[0])
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        check_device(name, tensor, q.device)
    _check_norms(q, q_norm, k_norm)
    _rope_and_write_kv_(
        q, k, v, cos, sin, positions, k_cache, v_cache, slots, interleaved, q_norm, k_norm, eps,
        weight_offset, k_scale, v_scale,
    )  # fmt: skip


def _check_norms(q: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError(
            f"{'q' if q_norm is None else 'k'}_norm must not be None, the other is not"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_dtype(name, weight, *FLOATS)
            check_shape(name, weight, q.shape[2])
            check_device(name, weight, q.device)
            check_last_dim_contiguous(name, weight)
