"""What a consumer of `flash_attention_sm90` does with the tiles of keys and values of a block.

It starts the scores of tile j + 1 and the output of tile j on the tensor cores, one behind the other, and
computes the softmax of tile j + 1 during the latter. Tiles are visited from the last to the first, so that
those a mask cuts come first. Weights are carried around the loop as two to a register, or four in 8 bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOWEST = gl.constexpr(-3.4028234663852886e38)  # finite, so that exp2(-inf - LOWEST) is 0, not NaN
HALF = gl.constexpr(64)  # rows of a consumer
LIFT = gl.constexpr(8.0)  # 8-bit weights reach 2^8: more of them are normal numbers


@gluon.jit
def _pack(p, dtype: gl.constexpr):
    """Two 16-bit or four 8-bit weights of a row in each int32.

    A loop that carries 16-bit values takes them apart and together again. The four are those that a
    thread holds of sixteen neighbours: keys 8i + 2j + (0, 1) of i = 0, 1.
    """
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    if dtype.primitive_bitwidth == 8:
        by_key = p.reshape([M, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        even, odd = gl.split(by_key)
        a, c = gl.split(even)
        b, d = gl.split(odd)
        packed = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return packed.reshape([M, N // 4])
    elif dtype == gl.bfloat16:
        a, b = gl.split(p.reshape([M, N // 2, 2]))
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        a, b = gl.split(p.reshape([M, N // 2, 2]))
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def _unpack(packed, dtype: gl.constexpr, ACC: gl.constexpr):
    """`_pack` undone, as an operand of a matmul; 8-bit weights are in the order of `_turn_kernel`."""
    M: gl.constexpr = packed.shape[0]
    N: gl.constexpr = packed.shape[1]
    if dtype.primitive_bitwidth == 8:
        a = packed.to(gl.int8).to(dtype, bitcast=True)
        b = (packed >> 8).to(gl.int8).to(dtype, bitcast=True)
        c = (packed >> 16).to(gl.int8).to(dtype, bitcast=True)
        d = (packed >> 24).to(gl.int8).to(dtype, bitcast=True)
        p = gl.join(gl.join(a, c), gl.join(b, d)).reshape([M, N * 4])
        return gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 4))
    else:
        a = packed.to(gl.int16).to(dtype, bitcast=True)
        b = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
        p = gl.join(a, b).reshape([M, N * 2])
        return gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 2))


@gluon.jit
def _values(v, stage, TURNED: gl.constexpr):
    if TURNED:
        return v.index(stage).permute((1, 0))
    else:
        return v.index(stage)


@gluon.jit
def _softmax(
    s, total, top, tile, position, len_k, scale, dtype: gl.constexpr, MASKED: gl.constexpr,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The weights of a tile, and what the sums so far must be multiplied by."""
    if MASKED:
        key = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        if CAUSAL:
            s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
        else:
            s = gl.where((key < len_k)[None, :], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    zero = new_top
    if dtype.primitive_bitwidth == 8:
        zero -= LIFT
    p = gl.exp2(s * scale - zero[:, None])
    decay = gl.exp2(top - new_top)
    return p, decay, total * decay + gl.sum(p, 1), new_top


@gluon.jit
def _attend_tiles(
    acc, total, top, weights, begin, end, tiles, base, q, k, v, k_ready, k_free, v_ready, v_free,
    position, len_k, scale,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, TURNED: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Scores and weights of the tiles [begin, end), outputs of those one before."""
    for i in range(begin, end):
        n = base + i
        stage = n % STAGES
        before = (n - 1) % STAGES
        mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
        zero = gl.zeros((HALF, BLOCK_N), gl.float32, SCORES)
        next_s = warpgroup_mma(
            q, k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), ((n - 1) // STAGES) & 1)
        operand = _unpack(weights, q.dtype, ACC)
        next_acc = warpgroup_mma(operand, _values(v, before, TURNED), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(next_s,))
        mbarrier.arrive(k_free.index(stage), count=1)
        p, decay, total, top = _softmax(
            s, total, top, tiles - 1 - i, position, len_k, scale, q.dtype, MASKED, CAUSAL,
            BLOCK_N, SCORES,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(next_acc,))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
        # Not earlier: the matmul reads its weights until here, and these will take their registers.
        weights = _pack(p, q.dtype)
    return acc, total, top, weights


@gluon.jit
def attend_block(
    acc, skipped, tiles, base, first, q, k, v, q_free, k_ready, k_free, v_ready, v_free, len_q,
    len_k, scale,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, TURNED: gl.constexpr, SHARED: gl.constexpr,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Output and sum of weights of the rows from `first`, which see none of the `skipped` last tiles."""
    position = first + len_k - len_q + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    top = gl.full((HALF,), LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, SCORES))
    whole = len_k // BLOCK_N  # so many first tiles need no mask
    if CAUSAL:
        whole = gl.minimum(whole, gl.maximum(first + len_k - len_q + 1, 0) // BLOCK_N)
    n = base + skipped
    mbarrier.wait(k_ready.index(n % STAGES), (n // STAGES) & 1)
    zero = gl.zeros((HALF, BLOCK_N), gl.float32, SCORES)
    s = warpgroup_mma(q, k.index(n % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(n % STAGES), count=1)
    p, _, total, top = _softmax(
        s, total, top, tiles - 1 - skipped, position, len_k, scale, q.dtype, True, CAUSAL, BLOCK_N,
        SCORES,
    )  # fmt: skip
    weights = _pack(p, q.dtype)
    if VARLEN:
        ragged = (tiles - skipped) * BLOCK_N > len_k
        if ragged:  # a weight of 0 does not make 0 of a NaN of the next sequence
            mbarrier.wait(v_ready.index(n % STAGES), (n // STAGES) & 1)
            V: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
            key = (tiles - 1 - skipped) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, V))
            values = v.index(n % STAGES)
            values.store(gl.where((key < len_k)[:, None], values.load(V), 0.0))
            fence_async_shared()
    middle = gl.maximum(tiles - whole, skipped + 1)
    acc, total, top, weights = _attend_tiles(
        acc, total, top, weights, skipped + 1, middle, tiles, base, q, k, v, k_ready, k_free,
        v_ready, v_free, position, len_k, scale, True, CAUSAL, TURNED, BLOCK_N, STAGES, SCORES, ACC,
    )  # fmt: skip
    acc, total, top, weights = _attend_tiles(
        acc, total, top, weights, middle, tiles, tiles, base, q, k, v, k_ready, k_free, v_ready,
        v_free, position, len_k, scale, False, CAUSAL, TURNED, BLOCK_N, STAGES, SCORES, ACC,
    )  # fmt: skip
    if not SHARED:
        mbarrier.arrive(q_free, count=1)
    n = base + tiles - 1
    mbarrier.wait(v_ready.index(n % STAGES), (n // STAGES) & 1)
    operand = _unpack(weights, q.dtype, ACC)
    acc = warpgroup_mma(operand, _values(v, n % STAGES, TURNED), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_free.index(n % STAGES), count=1)
    return acc, total
