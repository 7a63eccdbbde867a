"""Attention of queries over dense or concatenated keys and values, with no score matrix in memory.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)),   s_ij = scale · q_i · k_j

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453

One program per block of queries and head walks over the keys that the block sees with an online
softmax in base 2. Blocks of keys that every query sees run in a loop without a mask; only those cut
by the diagonal, the window or the end of the keys pay for one. Short queries of the heads that share
keys form one block. 8-bit q, k and v become float16 in registers. 2·(D + Dv) flops per visible pair of
query and key and head; q, k, v and o move through device memory about once. On sm_90 most dense
attention runs in `flash_attention_sm90` instead.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tlk.errors import UnsupportedError
from tlk.kernels._device import sm
from tlk.kernels._flash_checks import (
    FP8,
    check_lengths,
    check_options,
    check_scales,
    check_tensors,
)
from tlk.kernels._ints import cdiv
from tlk.kernels._op import op
from tlk.kernels._torch_attention import attend, by_sequence, sdpa

try:
    from tlk.kernels import flash_attention_sm90 as hopper
except ImportError as error:  # Gluon moves between versions of Triton
    hopper, _import_error = None, str(error)  # type: ignore[assignment]

L2_BYTES = 32 << 20  # keys and values that blocks running side by side may read
PACKED_QUERIES = 64  # up to so many queries, heads that share keys share blocks
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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
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
    dtype = out_dtype or q.dtype
    if q.dtype == FP8:
        q, k, v = (
            x.float() if scale is None else x.float() * scale[:, None]
            for x, scale in ((q, q_scale), (k, k_scale), (v, v_scale))
        )
    return by_sequence(run, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k).to(dtype)


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
        k = tl.load(k_ptr + k_tile, mask=k_mask, other=0.0).to(q.dtype)
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
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0).to(q.dtype)
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
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Cut the keys of rows [row, row + BLOCK_M) in three: all keys between the inner two are seen by all."""
    first_position = row // PACK + len_k - len_q
    last_position = tl.minimum((row + BLOCK_M - 1) // PACK, len_q - 1) + len_k - len_q
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


@triton.jit(
    do_not_specialize=[
        "len_q", "len_k", "heads", "group", "pairs", "wave", "window", "q_step", "k_step", "v_step",
    ]
)  # fmt: skip
def _flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, len_q,
    len_k, heads, group, pairs, wave, window, scale, cap, q_step, k_step, v_step,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    VARLEN: tl.constexpr, SCALED: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(Query, one of PACK heads) rows × (batch, PACK heads) pair.

    Strides count UNIT elements, `heads` and `group` are in units of PACK, VARLEN lengths are the longest.
    """
    # The last, under a causal mask longest, blocks of `wave` pairs start first; then the next pairs.
    blocks = tl.cdiv(len_q * PACK, BLOCK_M)
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
        if row >= len_q * PACK:
            return
    rows = row + tl.arange(0, BLOCK_M)
    queries = rows // PACK
    head = h * PACK + rows % PACK
    dqk = tl.arange(0, triton.next_power_of_2(DQK))
    dv = tl.arange(0, triton.next_power_of_2(DV))
    q_ptr += (b * q_batch + h * PACK * q_head + q_start * q_row) * UNIT
    k_ptr += (b * k_batch + (h // group) * k_head + k_start * k_row) * UNIT
    v_ptr += (b * v_batch + (h // group) * v_head + k_start * v_row) * UNIT
    q_mask = (queries < len_q)[:, None] & (dqk < DQK)[None, :]
    q_tile = queries.to(tl.int64)[:, None] * (q_row * UNIT) + dqk[None, :]
    if PACK > 1:
        q_tile += (rows % PACK)[:, None] * (q_head * UNIT)
    q = tl.load(q_ptr + q_tile, mask=q_mask, other=0.0)
    if q.dtype.primitive_bitwidth == 8:
        q = q.to(tl.float16)  # holds every 8-bit value
    if SCALED:
        kv = h // group
        scale *= tl.load(q_scale_ptr + h * q_step) * tl.load(k_scale_ptr + kv * k_step)

    # Finite before the first key, so that exp2(-inf - top) is 0 and never NaN.
    top = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(DV)), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
        total = tl.math.exp2(sink - top)
    begin, full_begin, full_end, end = _key_ranges(
        row, len_q, len_k, window, CAUSAL, WINDOW, PACK, BLOCK_M, BLOCK_N
    )
    positions = queries + len_k - len_q
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
    if SCALED:
        acc *= tl.load(v_scale_ptr + h // group * v_step)
    o_tile = ((o_start + queries) * (heads * PACK) + head)[:, None] * DV + dv[None, :]
    o_mask = (queries < len_q)[:, None] & (dv < DV)[None, :]
    tl.store(o_ptr + o_tile, acc.to(o_ptr.dtype.element_ty), mask=o_mask)


def default_config(
    sm: int, itemsize: int, d_qk: int, d_v: int, rows: int, pack: int = 1
) -> dict[str, int]:
    """Blocks that fit the registers and the shared memory of `sm`, for at most `rows` rows.

    With `pack` heads to a block, a row is a query of one of them.
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
    if pack > 1 and m == 128:
        m, n, warps = 64, min(n, 64 if roomy else 32), 8 if few else 4
    return {
        "BLOCK_M": 16 if few else m,
        "BLOCK_N": min(n, 64) if few else n,
        "num_warps": warps // 2 if few else warps,
        "num_stages": stages,
    }


def _fake(q, k, v, *rest):
    return q.new_empty(*q.shape[:-1], v.shape[-1], dtype=rest[12] if len(rest) > 12 else None)


def portable_reason(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, max_q: int,
) -> str | None:  # fmt: skip
    """Why such a call runs the portable kernel and not that for sm_90, or None where it does not."""
    if sm(q.device) != 90:
        return f"the other kernel is for sm_90, this is sm_{sm(q.device)}"
    if (reason := gluon_missing()) is not None:
        return reason
    if window or softcap or sinks is not None:
        return "windows, soft caps and sinks are left to the portable kernel"
    if max_q <= PACKED_QUERIES:
        return f"at most {PACKED_QUERIES} queries"
    return hopper.refused(q, k, v, varlen=cu_seqlens_q is not None)


def gluon_missing() -> str | None:
    """Why the kernel for sm_90 cannot run with this Triton, or None; then the portable one runs."""
    if hopper is None:
        return f"triton {triton.__version__} has another Gluon: {_import_error}"
    return hopper.missing()


def _backend(
    q, k, v, softmax_scale, causal, window, softcap, sinks, cu_seqlens_q=None, cu_seqlens_k=None,
    max_q=0, *_,
):  # fmt: skip
    arch = sm(q.device)
    if arch >= 80:
        reason = portable_reason(q, k, v, window, softcap, sinks, cu_seqlens_q, max_q)
        return "gluon" if reason is None else "triton"
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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    options = (softmax_scale, causal, window, softcap, sinks)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    scales = (q_scale, k_scale, v_scale)
    if q.dtype == FP8 and sm(q.device) < 89:
        raise UnsupportedError(
            f"q, k and v of 8 bits need sm_89 or newer, this is sm_{sm(q.device)}: give 16-bit ones"
        )
    runner = _backend(q, k, v, *options, *lengths)
    if runner == "torch":
        return flash_attention_reference(q, k, v, *options, *lengths)
    if runner == "sdpa":
        run = partial(sdpa, softmax_scale=softmax_scale, causal=causal, window=window)
        return by_sequence(run, q, k, v, *lengths)
    # Rows of no sequence are written by no program of the portable kernel.
    make = q.new_empty if cu_seqlens_q is None or runner == "gluon" else q.new_zeros
    out = make(*q.shape[:-1], v.shape[-1], dtype=out_dtype)
    if out.numel() and max_q:
        if runner == "gluon":
            hopper.launch(out, q, k, v, softmax_scale, causal, *lengths, *scales)
        else:
            _launch(q, k, v, out, *options, *lengths, *scales)
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
    *scales: Tensor | None,
) -> None:
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    dqk, dv = q.shape[-1], v.shape[-1]
    dense = cu_seqlens_q is None
    pack = group if max_q <= PACKED_QUERIES and q.element_size() > 1 else 1
    heads, group = heads // pack, group // pack
    pairs = heads * (q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1)
    wave = group * max(1, L2_BYTES // max(1, max_k * (dqk + dv) * q.element_size()))
    config = default_config(sm(q.device), q.element_size(), dqk, dv, max_q * pack, pack)
    tensors = (q, k, v, out, sinks, cu_seqlens_q, cu_seqlens_k, *scales)
    strides = [n for x in (q, k, v) for n in (x.stride()[:3] if dense else (0, *x.stride()[:2]))]
    # Triton knows strides by multiples of 16; D = 72 keeps its 16-byte loads in units of 8.
    unit = 8 if all(n % 8 == 0 for n in strides) else 1
    counts = (heads, group, pairs, min(wave, pairs), min(window, max_q + max_k))
    scale = softmax_scale / softcap if softcap else softmax_scale * LOG2_E.value
    _flash_attention_kernel[(cdiv(max_q * pack, config["BLOCK_M"]) * pairs,)](
        *tensors,
        *(n // unit for n in strides),
        max_q,
        max_k,
        *counts,
        scale,
        softcap * LOG2_E.value,
        *(0 if s is None or s.shape[0] == 1 else 1 for s in scales),
        CAUSAL=causal,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        VARLEN=not dense,
        SCALED=scales[0] is not None,
        UNIT=unit,
        PACK=pack,
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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
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

    In 8 bits, `q`, `k` and `v` are float8_e4m3fn alike and stand for themselves times float32
    `q_scale` [H], `k_scale` [Hk] and `v_scale` [Hk] (or [1] for all heads; 1 unless given). The
    output is `out_dtype`, bfloat16 unless given, as it is q's dtype otherwise.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit,
    UnsupportedError for 8 bits on a GPU below sm_89.
    """
    check_tensors(q, k, v, sinks, varlen=cu_seqlens_q is not None)
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    scales, dtype = check_scales(q, k, (q_scale, k_scale, v_scale), out_dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    check_options(scale, window, softcap)
    longest = (q.shape[1] if max_q is None else max_q, k.shape[1] if max_k is None else max_k)
    lengths = (cu_seqlens_q, cu_seqlens_k, *longest)
    return _flash_attention(
        q, k, v, scale, causal, window, softcap, sinks, *lengths, *scales, dtype
    )
