from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret
from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.errors import UnsupportedError
from tlk.kernels import _torch_attention
from tlk.kernels._op import count_ops
from tlk.kernels.flash_attention import default_config, flash_attention

# The package's attribute of this name is the function.
module = import_module("tlk.kernels.flash_attention")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 queries and 16 keys, so that short sequences already span several."""
    monkeypatch.setattr(module, "default_config", lambda *_: SMALL)


def qkv(device, dtype=torch.float32, sq=70, sk=90, heads=4, kv_heads=2, d=32, dv=32, batch=1):
    """Queries of mixed scale make some rows peaked and others flat."""
    scale = 4.0 ** torch.randint(-2, 2, (batch, sq, heads, 1), device=device)
    q = torch.randn(batch, sq, heads, d, device=device) * scale
    k = torch.randn(batch, sk, kv_heads, d, device=device)
    v = torch.randn(batch, sk, kv_heads, dv, device=device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def mask(sq, sk, device, causal=False, window=0):
    """Written out pair by pair, unlike the reference."""
    seen = torch.ones(sq, sk, dtype=torch.bool)
    for i in range(sq):
        for j in range(sk):
            behind = i + sk - sq - j
            if causal and behind < 0:
                seen[i, j] = False
            if window and abs(behind) >= window:
                seen[i, j] = False
    return seen.to(device)


def plain(q, k, v, *, softmax_scale=None, causal=False, window=0, softcap=0.0, sinks=None):
    """What transformers' eager attention does (gemma2's softcap, gpt_oss's sinks), in q's dtype."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    seen = mask(q.shape[2], k.shape[2], q.device, causal, window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    p = (
        torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
        .nan_to_num(0)
        .to(q.dtype)
    )
    return (p[..., : k.shape[2]] @ v).transpose(1, 2)


def reference(q, k, v, **options):
    scale = options.get("softmax_scale") or q.shape[-1] ** -0.5
    order = {"causal": False, "window": 0, "softcap": 0.0, "sinks": None}
    values = [options.get(name, default) for name, default in order.items()]
    return module.flash_attention_reference(
        q, k, v, scale, *values, None, None, q.shape[1], k.shape[1]
    )


def compare(q, k, v, **options):
    check(flash_attention(q, k, v, **options), plain(q, k, v, **options), exact(q, k, v, **options))


def exact(q, k, v, **options):
    """In float64: scores of 16 times e cost float32 as much as the whole error budget."""
    return plain(q.double(), k.double(), v.double(), **options)


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 21},
    "causal window": {"causal": True, "window": 37},
    "softcap": {"causal": True, "softcap": 1.5},
    "sinks": {"causal": True, "window": 40, "sinks": torch.tensor([-1.0, 0.5, 3.0, -torch.inf])},
    "scale": {"softmax_scale": 0.31, "causal": True},
}


def on(device, options):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_torch(causal):
    q, k, v = qkv("cpu", sq=33, sk=33)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    got = reference(q, k, v, causal=causal, softmax_scale=0.3)
    torch.testing.assert_close(got, want.transpose(1, 2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_reference_is_eager_attention(options):
    for lengths in ((33, 47), (47, 33)):
        q, k, v = qkv("cpu", sq=lengths[0], sk=lengths[1])
        torch.testing.assert_close(reference(q, k, v, **options), plain(q, k, v, **options))


def test_reference_in_parts_is_the_reference(monkeypatch):
    q, k, v = qkv("cpu", sq=40, sk=50)
    want = reference(q, k, v, causal=True, window=9)
    monkeypatch.setattr(_torch_attention, "REFERENCE_ROWS", 16)
    torch.testing.assert_close(reference(q, k, v, causal=True, window=9), want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_attention(dtype, options, device, small_blocks):
    compare(*qkv(device, dtype), **on(device, options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_more_queries_than_keys(options, device, small_blocks):
    """Under a causal mask or a window the first queries stand before every key."""
    compare(*qkv(device, sq=75, sk=40), **on(device, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_blocks(dtype, device):
    compare(*qkv(device, dtype, sq=150, sk=290, heads=2, kv_heads=1, d=64), causal=True)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 48, 2**31 - 1])
@pytest.mark.parametrize("causal", [False, True])
def test_window_edges(window, causal, device, small_blocks):
    q, k, v = qkv(device, sq=66, sk=80, heads=1, kv_heads=1)  # block 0 ends at key 14
    compare(q, k, v, causal=causal, window=window)


@pytest.mark.parametrize(
    "d, dv", [(16, 16), (20, 36), (80, 80), (96, 40), (192, 128), (72, 160), (256, 256)]
)
def test_head_dims(d, dv, device):
    q, k, v = qkv(device, torch.bfloat16, sq=40, sk=70, heads=2, kv_heads=2, d=d, dv=dv)
    compare(q, k, v, causal=True)
    compare(q.float(), k.float(), v.float())


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (5, 1), (3, 3)])
def test_query_heads_share_key_heads(heads, kv_heads, device, small_blocks):
    compare(*qkv(device, sq=65, sk=33, heads=heads, kv_heads=kv_heads, batch=2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_heads_of_short_queries_share_blocks(options, device, small_blocks, monkeypatch):
    """Three heads of twelve queries, 36 rows in blocks of 32."""
    grids = record_launches(monkeypatch, module, "_flash_attention_kernel")
    options = on(device, options)
    if "sinks" in options:
        options["sinks"] = torch.cat([options["sinks"], torch.tensor([0.3, -2.0], device=device)])
    compare(*qkv(device, sq=12, sk=70, heads=6, kv_heads=2, batch=2), **options)
    assert grids == [(2 * 2 * 2,)]


@pytest.mark.parametrize("sq, sk", [(1, 1), (1, 77), (16, 16), (32, 64), (17, 200)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(sq, sk, causal, device):
    compare(*qkv(device, torch.float16, sq=sq, sk=sk, heads=2), causal=causal)


def test_waves_of_heads_cover_every_block(device, small_blocks, monkeypatch):
    """Five heads of three batches, two heads at a time, so that the last wave is not full."""
    q, k, v = qkv(device, sq=70, sk=33, heads=5, kv_heads=5, batch=3)
    monkeypatch.setattr(module, "L2_BYTES", 2 * 33 * 64 * 4)
    compare(q, k, v, causal=True)


def test_strided_inputs(device, small_blocks):
    """Heads inside a fused row, and a [B, H, S, D] layout."""
    fused = torch.randn(2, 50, 4 * 32 + 2 * 32 + 2 * 32, device=device)
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in fused.split([128, 64, 64], -1))
    compare(q, k, v, causal=True)
    by_head = torch.randn(3, 2, 4, 50, 32, device=device).transpose(2, 3)
    compare(by_head[0], by_head[1], by_head[2], window=20)
    every_other = torch.randn(2, 100, 4, 32, device=device)[:, ::2]
    compare(q, every_other, every_other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_values(dtype, device, small_blocks):
    q, k, v = qkv(device, dtype, heads=2)
    compare(q * 60, k * 60, v * 60, causal=True)
    compare(q * 60, k * 60, v * 60, softcap=20.0)


def test_scores_of_minus_infinity(device, small_blocks):
    """Keys that drive a score to -inf weigh nothing, also while they are all that was seen."""
    q, k, v = qkv(device, heads=2, sq=32, sk=60)
    q = q.abs()
    k[:, :36, :, 0] = -torch.inf
    seen = flash_attention(q, k[:, 36:], v[:, 36:])
    torch.testing.assert_close(flash_attention(q, k, v), seen)
    nothing = flash_attention(q, k[:, :36], v[:, :36])
    assert (nothing == 0).all()


def test_rows_that_see_nothing_are_zero(device, small_blocks):
    q, k, v = qkv(device, sq=50, sk=20)
    out = flash_attention(q, k, v, causal=True)
    assert (out[:, :30] == 0).all() and (out[:, 30:] != 0).any(-1).all()


def test_no_queries_or_no_keys(device):
    q, k, v = qkv(device, dv=24, batch=2)
    assert flash_attention(q[:, :0], k, v).shape == (2, 0, 4, 24)
    assert flash_attention(q[:0], k[:0], v[:0]).shape == (0, 70, 4, 24)
    nothing = flash_attention(q, k[:, :0], v[:, :0], sinks=torch.ones(4, device=device))
    assert nothing.shape == (2, 70, 4, 24) and (nothing == 0).all()


FP8 = torch.float8_e4m3fn


def in_8_bits(*tensors, per_head):
    """Codes and their scales; each is far from 1 and from the next."""
    codes, scales, real = [], [], []
    for i, x in enumerate(tensors):
        heads = x.shape[-2] if per_head else 1
        scale = torch.arange(1, heads + 1, device=x.device) * (0.1 + i) / 3
        codes.append((x / scale[:, None]).clamp(-448, 448).to(FP8))
        scales.append(scale)
        real.append(codes[-1].float() * scale[:, None])
    return codes, dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True)), real


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 30, "softcap": 2.0}])
def test_8_bits(per_head, options, device, small_blocks):
    codes, scales, real = in_8_bits(*qkv(device, sq=40, sk=50, batch=2), per_head=per_head)
    out = flash_attention(*codes, **scales, **options, out_dtype=torch.float16)
    check(out, plain(*(x.half() for x in real), **options), exact(*real, **options))
    like = module.flash_attention_reference(
        *codes, 32**-0.5, options.get("causal", False), options.get("window", 0),
        options.get("softcap", 0.0), None, None, None, 40, 50, **scales,
        out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(like, plain(*real, **options), rtol=1e-4, atol=1e-5)


def test_8_bits_without_scales_stand_for_themselves(device, small_blocks):
    q, k, v = (x.to(FP8) for x in qkv(device, sq=40, sk=50))
    out = flash_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    real = [x.float() for x in (q, k, v)]
    check(out, plain(*(x.bfloat16() for x in real)), exact(*real))
    two = torch.full((1,), 2.0, device=device)
    twice = flash_attention(q, k, v, v_scale=two)
    torch.testing.assert_close(twice.float(), 2 * out.float(), rtol=0, atol=0)


def test_8_bits_of_different_lengths(device, small_blocks):
    codes, scales, real = in_8_bits(*(x[0] for x in qkv(device, sq=60, sk=50)), per_head=True)
    cu_q, cu_k = cumulative([25, 35], device), cumulative([40, 10], device)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_q": 35, "max_k": 40}
    out = flash_attention(*codes, **scales, **lengths, causal=True)
    last = [x[None, n:] for x, n in zip(real, (25, 40, 40), strict=True)]
    check(
        out[None, 25:],
        plain(*(x.bfloat16() for x in last), causal=True),
        exact(*last, causal=True),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="another SM is pretended on CPU tensors only")
@pytest.mark.parametrize("sm", [75, 86])
def test_8_bits_need_sm_89(sm):
    q, k, v = (x.to(FP8) for x in qkv("cpu"))
    with (
        interpret(sm=sm),
        pytest.raises(UnsupportedError, match=f"sm_89 or newer, this is sm_{sm}"),
    ):
        flash_attention(q, k, v)


def test_wrong_scales_are_refused():
    q, k, v = (x.to(FP8) for x in qkv("cpu"))
    for message, wrong in {
        r"q_scale must have shape \(4\)": {"q_scale": torch.ones(2)},
        r"k_scale must have shape \(2\)": {"k_scale": torch.ones(4)},
        "v_scale must be float32": {"v_scale": torch.ones(1).double()},
        "out_dtype must be one of": {"out_dtype": torch.int8},
        "k must be float8_e4m3fn": {"k": k.float()},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            flash_attention(**({"q": q, "k": k, "v": v} | wrong))


LENGTHS_Q = [0, 5, 0, 33, 1, 64, 12]
LENGTHS_K = [4, 5, 0, 50, 70, 64, 0]


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_variable_lengths(options, device, small_blocks):
    options = on(device, options)
    total_q, total_k = sum(LENGTHS_Q) + 3, sum(LENGTHS_K) + 2  # rows of no sequence at the end
    q, k, v = (x[0] for x in qkv(device, sq=total_q, sk=total_k, dv=24))
    cu_q, cu_k = cumulative(LENGTHS_Q, device), cumulative(LENGTHS_K, device)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_q": 70, "max_k": 70}
    got = flash_attention(q, k, v, **lengths, **options)
    assert (got[-3:] == 0).all()
    like, truth = [], []
    for s, (n, m) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        parts = (
            q[None, cu_q[s] : cu_q[s] + n],
            k[None, cu_k[s] : cu_k[s] + m],
            v[None, cu_k[s] : cu_k[s] + m],
        )
        like.append(plain(*parts, **options))
        truth.append(exact(*parts, **options))
    check(got[None, :-3], torch.cat(like, 1), torch.cat(truth, 1))


def test_variable_length_reference(device):
    """Torch's own path for concatenated sequences, as it runs on a CPU, against one by one."""
    q, k, v = (x[0].cpu() for x in qkv(device, sq=sum(LENGTHS_Q), sk=sum(LENGTHS_K)))
    cu_q, cu_k = cumulative(LENGTHS_Q, "cpu"), cumulative(LENGTHS_K, "cpu")
    scale = q.shape[-1] ** -0.5
    arguments = (scale, True, 20, 0.0, None, cu_q, cu_k, 64, 70)
    got = module.flash_attention_reference(q, k, v, *arguments)
    for s, n in enumerate(LENGTHS_Q):
        rows, columns = slice(cu_q[s], cu_q[s] + n), slice(cu_k[s], cu_k[s + 1])
        parts = (q[None, rows], k[None, columns], v[None, columns])
        torch.testing.assert_close(got[None, rows], plain(*parts, causal=True, window=20))


def test_no_sequences(device):
    q, k, v = (x[0] for x in qkv(device))
    none = torch.zeros(1, dtype=torch.int32, device=device)
    out = flash_attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none, max_q=0, max_k=0)
    assert out.shape == q.shape and (out == 0).all()


def test_the_kernel_ran_and_not_its_reference(device, monkeypatch):
    launched = []
    monkeypatch.setattr(module, "_launch", lambda *a: launched.append(a))
    with count_ops() as counts:
        flash_attention(*qkv(device))
    assert len(launched) == 1 and counts == {"flash_attention[triton]": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="another SM is pretended on CPU tensors only")
@pytest.mark.parametrize("name", OPTIONS)
def test_torch_runs_where_triton_has_no_tensor_cores(name, monkeypatch):
    monkeypatch.setattr(module, "_launch", None)
    runner = "torch" if name in ("softcap", "sinks") else "sdpa"
    q, k, v = qkv("cpu", sq=47, sk=33)
    cu_q, cu_k = cumulative([20, 0, 27], "cpu"), cumulative([10, 3, 20], "cpu")
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_q": 27, "max_k": 20}
    with interpret(sm=75), count_ops() as counts:
        dense = flash_attention(q, k, v, **OPTIONS[name])
        variable = flash_attention(q[0], k[0], v[0], **lengths, **OPTIONS[name])
    assert counts == {f"flash_attention[{runner}]": 2}
    torch.testing.assert_close(dense, plain(q, k, v, **OPTIONS[name]))
    last = plain(q[:1, 20:], k[:1, 13:], v[:1, 13:], **OPTIONS[name])
    torch.testing.assert_close(variable[None, 20:], last)


def test_default_blocks_grow_with_the_queries():
    for sm in (80, 86, 89, 90, 100, 120):
        blocks = [default_config(sm, 2, 128, 128, rows)["BLOCK_M"] for rows in (1, 17, 4096)]
        assert blocks == sorted(blocks) and blocks[0] == 16


WRONG = {
    "q must be float32 or float16 or bfloat16 or float8_e4m3fn, got int64": {
        "q": torch.zeros(2, 3, 4, 16).long()
    },
    "k must be float32, got float16": {"k": torch.zeros(2, 5, 2, 16).half()},
    "q must have shape": {"q": torch.zeros(2, 3, 16)},
    r"k must have shape \(2, any, any, 16\), got \(2, 5, 2, 8\)": {"k": torch.zeros(2, 5, 2, 8)},
    r"v must have shape \(2, 5, 2, any\)": {"v": torch.zeros(2, 6, 2, 16)},
    "v must have a head dim of 1 to 256, got 300": {"v": torch.zeros(2, 5, 2, 300)},
    "q must have a multiple of k's 2 heads, got 3": {"q": torch.zeros(2, 3, 3, 16)},
    "k must have stride 1": {"k": torch.zeros(2, 5, 2, 32)[..., ::2]},
    r"sinks must have shape \(4\)": {"sinks": torch.zeros(2)},
    "sinks must be float32": {"sinks": torch.zeros(4).int()},
    "softmax_scale must be > 0, got -1": {"softmax_scale": -1.0},
    "window must be >= 0, got -3": {"window": -3},
    "softcap must be >= 0, got -0.5": {"softcap": -0.5},
    "must be given together": {"max_q": 3},
    "q_scale, k_scale and v_scale are for 8-bit": {"k_scale": torch.ones(1)},
    "out_dtype must be that of q": {"out_dtype": torch.float16},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message):
    q, k, v = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16), torch.zeros(2, 5, 2, 16)
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attention(**({"q": q, "k": k, "v": v} | WRONG[message]))


def test_wrong_sequences_are_refused():
    q, k = torch.zeros(3, 4, 16), torch.zeros(5, 2, 16)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_q": 3, "max_k": 3}
    for message, wrong in {
        "cu_seqlens_k must be int32": {"cu_seqlens_k": cu.long()},
        r"cu_seqlens_k must have shape \(2\)": {"cu_seqlens_k": cu[:1]},
        r"cu_seqlens_q must have shape \(any\)": {"cu_seqlens_q": cu[None]},
        r"q must have shape \(any, any, any\)": {"q": q[None]},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            flash_attention(**({"q": q, "k": k, "v": k} | lengths | wrong))


def test_registration(device):
    q, k, v = qkv(device, sq=9, sk=12, heads=2)
    sinks = torch.randn(2, device=device)
    arguments = (q, k, v, 0.2, True, 5, 2.0, sinks, None, None, 9, 12)
    torch.library.opcheck(torch.ops.tlk.flash_attention.default, arguments)
    codes, scales, _ = in_8_bits(q, k, v, per_head=True)
    arguments = (*codes, *arguments[3:7], None, *arguments[8:], *scales.values(), torch.float16)
    torch.library.opcheck(
        torch.ops.tlk.flash_attention.default, arguments, test_utils="test_faketensor"
    )
    cu_q, cu_k = cumulative([4, 5], device), cumulative([6, 6], device)
    lengths = (cu_q, cu_k, 5, 6)
    arguments = (q[0], k[0], v[0], 0.2, False, 0, 0.0, None, *lengths)
    torch.library.opcheck(torch.ops.tlk.flash_attention.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic, device):
    q, k, v = qkv(device, sq=9, sk=12, heads=2, batch=2)
    compiled = torch.compile(
        lambda q, k, v: flash_attention(q, k, v, causal=True, softcap=2.0) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    want = flash_attention(q, k, v, causal=True, softcap=2.0) + 1
    torch.testing.assert_close(compiled(q, k, v), want)
