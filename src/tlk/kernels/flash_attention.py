"""Attention of queries over dense or concatenated keys and values, with no score matrix in memory.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)),   s_ij = scale · q_i · k_j

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453

One program per block of queries and head walks over the keys that the block sees with an online
softmax in base 2. Blocks of keys that every query sees run in a loop without a mask; only those cut
by the diagonal, the window or the end of the keys pay for one. 2·(D + Dv) flops per visible pair of
query and key and head; q, k, v and o move through device memory about once.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._device import sm
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op
from tlk.kernels._torch_attention import attend, by_sequence, sdpa

MAX_HEAD_DIM = 256
L2_BYTES = 32 << 20  # keys and values that blocks running side by side may read
LOG2_E = tl.constexpr(1.4426950408889634)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Attention of `q` [B, Sq, H, D] or [T, H, D] in float32, rounded once; see `flash_attention`."""
    run = partial(
        attend,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    return by_sequence(run, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)


@triton.jit
def _attend_tiles(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    first,
    last,
    positions,
    len_k,
    window,
    scale,
    cap,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One online softmax over the keys [first, last); `top` is the row maximum in base 2."""
    n = tl.arange(0, BLOCK_N)
    dqk = tl.arange(0, triton.next_power_of_2(DQK))
    dv = tl.arange(0, triton.next_power_of_2(DV))
    k_tile = n[:, None] * k_row + dqk[None, :]
    v_tile = n[:, None] * v_row + dv[None, :]
    k_ptr += first.to(tl.int64) * k_row
    v_ptr += first.to(tl.int64) * v_row
    for start in tl.range(first, last, BLOCK_N):
        k_mask = (dqk < DQK)[None, :]
        v_mask = (dv < DV)[None, :]
        if MASKED:
            k_mask = k_mask & (start + n < len_k)[:, None]
            v_mask = v_mask & (start + n < len_k)[:, None]
        k = tl.load(k_ptr + k_tile, mask=k_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        unit = scale
        if SOFTCAP:
            unit = 1.0
            if q.dtype == tl.float32:
                s = cap * libdevice.tanh(scale * s)
            else:  # 1 - 2 / (exp(2x) + 1) is as good as tanh(x) in half precision and half the work
                twice = tl.minimum(s * (scale * 2 * LOG2_E), 64.0)  # far beyond where tanh is 1
                s = cap - cap * 2 / (tl.math.exp2(twice) + 1)
        if MASKED:
            ahead = (start + n)[None, :] - positions[:, None]
            seen = (start + n < len_k)[None, :]
            if CAUSAL:
                seen = seen & (ahead <= 0)
            if WINDOW:
                seen = seen & (ahead > -window) & (ahead < window)
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - new_top[:, None])
        decay = tl.math.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    return acc, total, top


@triton.jit
def _key_ranges(
    row,
    len_q,
    len_k,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Cut the keys of queries [row, row + BLOCK_M) in three: all keys between the inner two are seen by all."""
    first_position = row + len_k - len_q
    last_position = tl.minimum(row + BLOCK_M, len_q) - 1 + len_k - len_q
    begin = 0
    full_begin = 0
    end = len_k
    full_end = len_k
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
        end = tl.minimum(end, last_position + window)
        full_end = tl.minimum(full_end, first_position + window)
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
        full_end = tl.minimum(full_end, first_position + 1)
    end = tl.maximum(end, 0)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=["len_q", "len_k", "heads", "group", "pairs", "wave", "window"])
def _flash_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    sinks_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    len_q,
    len_k,
    heads,
    group,
    pairs,
    wave,
    window,
    scale,
    cap,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    VARLEN: tl.constexpr,
    UNIT: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries × (batch, head) pair; strides count UNIT elements, VARLEN lengths are the longest."""
    # The last, under a causal mask longest, blocks of `wave` pairs start first; then the next pairs.
    blocks = tl.cdiv(len_q, BLOCK_M)
    before = tl.program_id(0) // (wave * blocks) * wave
    rank = tl.program_id(0) - before * blocks
    beside = tl.minimum(wave, pairs - before)
    row = (blocks - 1 - rank // beside) * BLOCK_M
    pair = before + rank % beside
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    q_start = b * 0
    k_start = b * 0
    o_start = b * len_q
    if VARLEN:
        q_start = tl.load(cu_q_ptr + b).to(tl.int64)
        k_start = tl.load(cu_k_ptr + b).to(tl.int64)
        o_start = q_start
        len_q = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
        len_k = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
        if row >= len_q:
            return
    rows = row + tl.arange(0, BLOCK_M)
    dqk = tl.arange(0, triton.next_power_of_2(DQK))
    dv = tl.arange(0, triton.next_power_of_2(DV))
    q_ptr += (b * q_batch + h * q_head + q_start * q_row) * UNIT
    k_ptr += (b * k_batch + (h // group) * k_head + k_start * k_row) * UNIT
    v_ptr += (b * v_batch + (h // group) * v_head + k_start * v_row) * UNIT
    q_mask = (rows < len_q)[:, None] & (dqk < DQK)[None, :]
    q_tile = rows.to(tl.int64)[:, None] * (q_row * UNIT) + dqk[None, :]
    q = tl.load(q_ptr + q_tile, mask=q_mask, other=0.0)

    # Finite before the first key, so that exp2(-inf - top) is 0 and never NaN.
    top = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(DV)), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
        total = tl.math.exp2(sink - top)
    begin, full_begin, full_end, end = _key_ranges(
        row, len_q, len_k, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    positions = rows + len_k - len_q
    if WINDOW:
        acc, total, top = _attend_tiles(
            acc, total, top, q, k_ptr, v_ptr, k_row * UNIT, v_row * UNIT, begin, full_begin, positions,
            len_k, window, scale, cap, True, CAUSAL, WINDOW, SOFTCAP, DQK, DV, BLOCK_N,
        )  # fmt: skip
    acc, total, top = _attend_tiles(
        acc, total, top, q, k_ptr, v_ptr, k_row * UNIT, v_row * UNIT, full_begin, full_end, positions,
        len_k, window, scale, cap, False, CAUSAL, WINDOW, SOFTCAP, DQK, DV, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _attend_tiles(
        acc, total, top, q, k_ptr, v_ptr, k_row * UNIT, v_row * UNIT, full_end, end, positions,
        len_k, window, scale, cap, True, CAUSAL, WINDOW, SOFTCAP, DQK, DV, BLOCK_N,
    )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    o_tile = ((o_start + rows)[:, None] * heads + h) * DV + dv[None, :]
    o_mask = (rows < len_q)[:, None] & (dv < DV)[None, :]
    tl.store(o_ptr + o_tile, acc.to(o_ptr.dtype.element_ty), mask=o_mask)


def default_config(sm: int, itemsize: int, d_qk: int, d_v: int, rows: int) -> dict[str, int]:
    """Blocks that fit the registers and the shared memory of `sm`, for at most `rows` queries.

    Found by compiling: larger ones spill, or exceed the 99 KiB of sm_86, sm_89 and sm_120.
    """
    head_dim, roomy = max(d_qk, d_v), sm in (80, 87, 90, 100, 103)  # roomy: at least 163 KiB
    if itemsize == 4:
        m, n, stages = (64, 16, 2) if head_dim <= 64 else (32, 16, 2)
    elif head_dim <= 64:
        m, n, stages = (128, 128, 2) if sm == 90 else (128, 64, 3)
    elif head_dim <= 128 and (d_qk < 128 or d_v < 128):  # masks of the padding take registers
        m, n, stages = (128, 64, 3) if sm == 90 else (128, 32, 3)
    elif head_dim <= 128:
        m, n, stages = (128, 128, 2) if sm == 90 else (128, 64, 3 if roomy else 2)
    elif d_v <= 128 and sm == 90:
        m, n, stages = 128, 64, 2
    else:
        m, n, stages = (64, 64, 2) if roomy and min(d_qk, d_v) == 256 else (64, 32, 2)
    few = rows <= 16
    warps = 16 if itemsize == 4 and head_dim > 128 else 8
    return {
        "BLOCK_M": 16 if few else m,
        "BLOCK_N": min(n, 64) if few else n,
        "num_warps": warps // 2 if few else warps,
        "num_stages": stages,
    }


def _fake(q, k, v, *_):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _backend(q, k, v, softmax_scale, causal, window, softcap, sinks, *_):
    if sm(q.device) >= 80:
        return "triton"
    return "sdpa" if softcap == 0 and sinks is None else "torch"


@op(flash_attention_reference, fake=_fake, backend=_backend)
def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    options = (softmax_scale, causal, window, softcap, sinks)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    runner = _backend(q, k, v, *options)
    if runner == "torch":
        return flash_attention_reference(q, k, v, *options, *lengths)
    if runner == "sdpa":
        run = partial(sdpa, softmax_scale=softmax_scale, causal=causal, window=window)
        return by_sequence(run, q, k, v, *lengths)
    # Rows of no sequence are written by no program.
    make = q.new_empty if cu_seqlens_q is None else q.new_zeros
    out = make(*q.shape[:-1], v.shape[-1])
    if out.numel() and max_q:
        _launch(q, k, v, out, *options, *lengths)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> None:
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    dqk, dv = q.shape[-1], v.shape[-1]
    dense = cu_seqlens_q is None
    pairs = heads * (q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1)
    wave = group * max(1, L2_BYTES // max(1, max_k * (dqk + dv) * q.element_size()))
    config = default_config(sm(q.device), q.element_size(), dqk, dv, max_q)
    tensors = (q, k, v, out, sinks, cu_seqlens_q, cu_seqlens_k)
    strides = [n for x in (q, k, v) for n in (x.stride()[:3] if dense else (0, *x.stride()[:2]))]
    # Triton knows strides by multiples of 16; D = 72 keeps its 16-byte loads in units of 8.
    unit = 8 if all(n % 8 == 0 for n in strides) else 1
    counts = (heads, group, pairs, min(wave, pairs), min(window, max_q + max_k))
    scale = softmax_scale / softcap if softcap else softmax_scale * LOG2_E.value
    _flash_attention_kernel[(cdiv(max_q, config["BLOCK_M"]) * pairs,)](
        *tensors,
        *(n // unit for n in strides),
        max_q,
        max_k,
        *counts,
        scale,
        softcap * LOG2_E.value,
        CAUSAL=causal,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        VARLEN=not dense,
        UNIT=unit,
        DQK=dqk,
        DV=dv,
        **config,
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
) -> Tensor:
    """Attend from `q` [B, Sq, H, D] to `k` [B, Sk, Hk, D] and `v` [B, Sk, Hk, Dv]: [B, Sq, H, Dv].

    With `cu_seqlens_q` and `cu_seqlens_k` (int32 [S + 1], first 0) the sequences of different
    lengths follow one another instead: `q` [T, H, D], `k` [Tk, Hk, D], `v` [Tk, Hk, Dv] give
    [T, H, Dv], where `max_q` and `max_k` bound the lengths; rows of no sequence give 0.

    All of `q`, `k`, `v` are float32, float16 or bfloat16 alike, with any strides but 1 in the last
    dimension; D and Dv reach 256; query head h reads key head h // (H / Hk). Query i stands at
    position i + Sk - Sq. It sees keys up to its position if `causal`, and if `window` > 0 only keys
    less than `window` away. `softcap` > 0 bounds scores to softcap · tanh(score / softcap). `sinks`
    [H] adds one logit per head to the softmax, without a value. A query that sees no key gives 0.
    `softmax_scale` is 1 / √D unless given.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit.
    """
    _check_tensors(q, k, v, sinks, varlen=cu_seqlens_q is not None)
    _check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _check_options(scale, window, softcap)
    longest = (q.shape[1] if max_q is None else max_q, k.shape[1] if max_k is None else max_k)
    return _flash_attention(
        q, k, v, scale, causal, window, softcap, sinks, cu_seqlens_q, cu_seqlens_k, *longest
    )


def _check_options(softmax_scale: float, window: int, softcap: float) -> None:
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be > 0, got {softmax_scale}")
    if window < 0:
        raise ValueError(f"window must be >= 0, got {window}")
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0, got {softcap}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, varlen: bool) -> None:
    check_dtype("q", q, *FLOATS)
    check_shape("q", q, *([None] * (3 if varlen else 4)))
    check_shape("k", k, *([None] if varlen else [q.shape[0], None]), None, q.shape[-1])
    check_shape("v", v, *k.shape[:-1], None)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, x, q.dtype)
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[-2]} heads, got {q.shape[-2]}")
    if sinks is not None:
        check_dtype("sinks", sinks, *FLOATS)
        check_shape("sinks", sinks, q.shape[-2])
        check_device("sinks", sinks, q.device)


def _check_lengths(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
) -> None:
    given = [x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_q, max_k)]
    if any(given) and not all(given):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k, max_q and max_k must be given together, got only some"
        )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    check_shape("cu_seqlens_q", cu_seqlens_q, None)
    check_shape("cu_seqlens_k", cu_seqlens_k, *cu_seqlens_q.shape)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, x, torch.int32)
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)
