"""Write the keys and values of new tokens into the pages of the cache.

    cache[slot // page_size, :, slot % page_size] = token        for every token with slot ≥ 0

Pages as in Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", https://arxiv.org/abs/2309.06180

One launch writes keys and values, one program the heads of one token: it reads
T·Hk·(Dk + Dv) elements and writes as many. A negative slot writes nowhere, so padded rows of a
captured batch need no branch on the host.
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
from tlk.kernels._kv_codes import CODES, as_bytes, check_scales, encode, encode_reference, writable
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous


def write_kv_reference_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    real = slots >= 0
    slots = slots[real]
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        page_size = cache.shape[2]
        stored = encode_reference(new[real], scale, cache.dtype)
        as_bytes(cache)[slots // page_size, :, slots % page_size] = as_bytes(stored)


def _nothing(*_: object) -> None:
    """The shape rule: an op in place returns no tensor."""


@triton.jit
def head_scale(scale_ptr, first, some, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """The scales of heads `first` onwards, [BLOCK_HEADS, 1], if `some`; 1 where there are none."""
    scale = 1.0
    if scale_ptr is not None:
        heads = first + tl.arange(0, BLOCK_HEADS)
        scale = tl.load(scale_ptr + heads, (heads < HEADS) & some, other=1.0)[:, None]
    return scale


@triton.jit
def write_heads(
    new_ptr, cache_ptr, scale, token, slot, first, stride_t, stride_h, stride_page,
    HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write heads `first` onwards of a token, BLOCK_HEADS of them, to its slot as `encode` says."""
    heads = (first + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (cols < D)
    new = tl.load(new_ptr + token * stride_t + heads * stride_h + cols, mask, other=0.0)
    cache_ptr += slot // PAGE * stride_page + (heads * PAGE + slot % PAGE) * D
    tl.store(cache_ptr + cols, encode(new.to(tl.float32), scale, cache_ptr.dtype.element_ty), mask)


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, k_stride_page, v_stride_page,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        block = tl.program_id(1)
        first = block // 2 * BLOCK_HEADS
        if block % 2 == 0:
            scale = head_scale(k_scale_ptr, first, True, HEADS, BLOCK_HEADS)
            write_heads(
                k_ptr, k_cache_ptr, scale, token, slot, first,
                k_stride_t, k_stride_h, k_stride_page, HEADS, PAGE, DK, BLOCK_HEADS, BLOCK_DK,
            )  # fmt: skip
        else:
            scale = head_scale(v_scale_ptr, first, True, HEADS, BLOCK_HEADS)
            write_heads(
                v_ptr, v_cache_ptr, scale, token, slot, first,
                v_stride_t, v_stride_h, v_stride_page, HEADS, PAGE, DV, BLOCK_HEADS, BLOCK_DV,
            )  # fmt: skip


def default_config(heads: int, d: int) -> tuple[int, int]:
    """Heads per program and warps: 8 elements a thread, 256 to 2048 a program."""
    block_d = next_power_of_2(d)
    block_heads = min(max(2048 // block_d, 1), next_power_of_2(heads))
    block_heads = max(block_heads, 256 // block_d)  # a warp of 16-byte loads, padded if need be
    return block_heads, min(max(block_heads * block_d // 256, 1), 8)


@op(write_kv_reference_, mutates=("k_cache", "v_cache"), fake=_nothing)
def _write_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    tokens, heads, dk = k.shape
    dv = v.shape[2]
    if tokens == 0:
        return
    block_heads, num_warps = default_config(heads, max(dk, dv))
    dependent = pdl(k.device)
    _write_kv_kernel[(tokens, 2 * cdiv(heads, block_heads))](
        k, v, writable(k_cache), writable(v_cache), slots.contiguous(), k_scale, v_scale,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(0), v_cache.stride(0),
        HEADS=heads, PAGE=k_cache.shape[2], DK=dk, DV=dv, BLOCK_HEADS=block_heads,
        BLOCK_DK=next_power_of_2(dk), BLOCK_DV=next_power_of_2(dv), PDL=dependent,
        num_warps=num_warps, launch_pdl=dependent,
    )  # fmt: skip


def _check_cache(name: str, cache: Tensor) -> None:
    check_dtype(name, cache, *FLOATS, *CODES)
    if not cache[:1].is_contiguous():
        raise ValueError(f"{name} must have contiguous pages, got strides {cache.stride()}")


def check_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """Raise unless the arguments are what `write_kv_` documents."""
    check_dtype("k", k, *FLOATS)
    check_dtype("v", v, *FLOATS)
    check_shape("k", k, None, None, None)
    tokens, heads, dk = k.shape
    check_shape("v", v, tokens, heads, None)
    check_last_dim_contiguous("k", k)
    check_last_dim_contiguous("v", v)
    check_shape("k_cache", k_cache, None, heads, None, dk)
    check_shape("v_cache", v_cache, k_cache.shape[0], heads, k_cache.shape[2], v.shape[2])
    _check_cache("k_cache", k_cache)
    _check_cache("v_cache", v_cache)
    check_dtype("slots", slots, torch.int64)
    check_shape("slots", slots, tokens)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        check_device(name, tensor, k.device)
    if k_scale is not None or v_scale is not None:
        check_dtype("v_cache", v_cache, k_cache.dtype)
        check_scales(k_cache, k_scale, v_scale)


def write_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write `k` [T, Hk, Dk] and `v` [T, Hk, Dv] into their pages, in place.

    `k_cache` is [P, Hk, page_size, Dk], `v_cache` [P, Hk, page_size, Dv], each page contiguous;
    their dtypes may differ from those of `k` and `v` (float32, float16, bfloat16), which are then
    rounded. Token t goes to `slots[t]` (int64, [T]) = page · page_size + offset, below
    P · page_size; a negative slot writes nowhere. `k` and `v` may be views of one fused
    projection. Caches of float8_e4m3fn or int8 hold codes: cast(k / k_scale) and cast(v / v_scale),
    to nearest even and within ±448 or ±127; scales are float32 [Hk], None stands for 1.
    Raises TypeError or ValueError for other dtypes, shapes and strides.
    """
    check_write(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    _write_kv_(k, v, k_cache, v_cache, slots, k_scale, v_scale)
