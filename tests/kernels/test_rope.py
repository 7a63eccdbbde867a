from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import rope
from tlk.kernels._kv_codes import CODES, encode_reference
from tlk.kernels.rope import default_config, rope_and_write_kv_, rope_and_write_kv_reference_

LENGTH = 50
EPS = 0.5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, H, Hk, D, R: one head, odd head counts, partial rotation, half sizes that are no power of two,
# more query heads than a program takes, more key heads than query heads
SHAPES = [
    (1, 1, 1, 16, 16),
    (5, 7, 3, 24, 24),
    (3, 3, 1, 40, 20),
    (2, 33, 5, 64, 64),
    (2, 2, 9, 256, 256),
    (4, 2, 2, 16, 2),
]


def tables(rotary, device, length=LENGTH):
    frequencies = 100.0 ** -(torch.arange(0, rotary, 2, device=device) / rotary)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def positions_of(tokens, device, dtype=torch.int64):
    """The first and the last position, then others in no order and twice."""
    return torch.tensor([LENGTH - 1, 0, 17, 3, 17][-tokens:], device=device, dtype=dtype)


def plain(x, cos, sin, positions, interleaved):
    """The rotation in torch ops of the dtype of `x`, as models write it."""
    c, s = (t[positions].to(x.dtype)[:, None] for t in (cos, sin))
    rotary, rest = x.split((2 * c.shape[-1], x.shape[-1] - 2 * c.shape[-1]), -1)
    if interleaved:
        a, b = rotary[..., ::2], rotary[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned, rest), -1)


def step(tokens, kv_heads, d, dv, device, dtype=torch.float32, page_size=4, cache_dtype=None):
    """v, empty pages, and slots: both sides of a page boundary in no order, one token nowhere."""
    v = torch.randn(tokens, kv_heads, dv, device=device).to(dtype)
    caches = [
        torch.randn(4, kv_heads, page_size, n, device=device).to(cache_dtype or dtype)
        for n in (d, dv)
    ]
    slots = [4 * page_size - 1, 2 * page_size, -1, 2 * page_size - 1, 0][:tokens]
    return v, caches, torch.tensor(slots, device=device)


def normalized(x, weight, eps=EPS, offset=0.0):
    return F.rms_norm(x, x.shape[-1:], (weight + offset).to(x.dtype), eps)


def kept(cache, slots):
    """The rows that `slots` ≥ 0 name, [T', Hk, D]."""
    slots = slots[slots >= 0]
    return cache[slots // cache.shape[2], :, slots % cache.shape[2]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_transformers(interleaved):
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    cos, sin = tables(16, "cpu")
    positions = positions_of(5, "cpu")
    c, s = cos[positions], sin[positions]
    if interleaved:
        module, c, s = modeling_cohere, c.repeat_interleave(2, 1), s.repeat_interleave(2, 1)
    else:
        module, c, s = modeling_llama, c.repeat(1, 2), s.repeat(1, 2)
    want_q, want_k = module.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], c[None], s[None]
    )
    v, caches, slots = step(5, 2, 16, 16, "cpu")
    rope_and_write_kv_reference_(q, k, v, cos, sin, positions, *caches, slots, interleaved)
    torch.testing.assert_close(q, want_q[0].transpose(0, 1))
    real = slots >= 0
    torch.testing.assert_close(kept(caches[0], slots), want_k[0].transpose(0, 1)[real])
    assert torch.equal(kept(caches[1], slots), v[real])


def test_reference_normalizes_first():
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    weights = torch.randn(2, 16)
    cos, sin = tables(12, "cpu")
    positions = positions_of(5, "cpu")
    want = [plain(normalized(x, w, offset=1.0), cos, sin, positions, False)
            for x, w in zip((q, k), weights, strict=True)]  # fmt: skip
    v, caches, slots = step(5, 2, 16, 16, "cpu")
    rope_and_write_kv_reference_(
        q, k, v, cos, sin, positions, *caches, slots, False, *weights, EPS, 1.0
    )
    torch.testing.assert_close(q, want[0])
    torch.testing.assert_close(kept(caches[0], slots), want[1][slots >= 0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_in_codes(dtype, codes, interleaved, norm, device):
    """Rounded once, from float32: at most a rare tie falls to the other side than in the reference."""
    rows = (3 * torch.randn(5, 10, 40, device=device)).to(dtype)
    q, k = rows.split((7, 3), 1)
    cos, sin = tables(20, device)
    v, caches, slots = step(5, 3, 40, 24, device, dtype)
    caches = [
        encode_reference(x.transpose(1, 2), None, codes).transpose(1, 2).contiguous()
        for x in caches
    ]
    scales = {"k_scale": torch.tensor([0.02, 0.3, 0.011], device=device),
              "v_scale": torch.tensor([0.4, 0.017, 0.03], device=device)}  # fmt: skip
    weights = [(1 + torch.rand(40, device=device)).to(dtype) for _ in "qk"] if norm else [None] * 2
    want_q, want = q.clone(), [x.clone() for x in caches]
    rope_and_write_kv_reference_(
        want_q, k, v, cos, sin, positions_of(5, device), *want, slots, interleaved, *weights, EPS,
        **scales,
    )  # fmt: skip
    rope_and_write_kv_(
        q, k, v, cos, sin, positions_of(5, device), *caches, slots, interleaved=interleaved,
        q_norm=weights[0], k_norm=weights[1], eps=EPS, **scales,
    )  # fmt: skip
    assert torch.equal(caches[1].view(torch.uint8), want[1].view(torch.uint8))
    steps = (caches[0].view(torch.uint8).int() - want[0].view(torch.uint8).int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01
    torch.testing.assert_close(q, want_q)


def test_scales_of_more_heads_than_a_program_takes(device):
    q, k = torch.randn(2, 2, 256, device=device), torch.randn(2, 9, 256, device=device)
    v, _, slots = step(2, 9, 256, 256, device)
    caches = [torch.zeros(4, 9, 4, 256, dtype=torch.int8, device=device) for _ in range(2)]
    want = [x.clone() for x in caches]
    scales = [torch.rand(9, device=device) + 0.02 for _ in range(2)]
    options = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    tables_and_places = *tables(256, device), positions_of(2, device)
    rope_and_write_kv_reference_(q.clone(), k, v, *tables_and_places, *want, slots, **options)
    rope_and_write_kv_(q, k, v, *tables_and_places, *caches, slots, **options)
    for cache, codes in zip(caches, want, strict=True):
        assert (cache.int() - codes.int()).abs().max() <= 1


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(shape, dtype, interleaved, norm, device):
    tokens, heads, kv_heads, d, rotary = shape
    scale = 10.0 ** torch.randint(-2, 3, (tokens, heads + kv_heads, 1), device=device)
    rows = (torch.randn(tokens, heads + kv_heads, d, device=device) * scale).to(dtype)
    q, k = rows.split((heads, kv_heads), 1)
    cos, sin = tables(rotary, device)
    positions = positions_of(tokens, device)
    v, caches, slots = step(tokens, kv_heads, d, 24, device, dtype)
    weights = [(1 + torch.rand(d, device=device)).to(dtype) for _ in "qk"] if norm else [None] * 2
    like, exact = [], []
    for x, w in zip((q, k), weights, strict=True):
        like.append(plain(normalized(x, w) if norm else x, cos, sin, positions, interleaved))
        x = normalized(x.float(), w.float()) if norm else x.float()
        exact.append(plain(x, cos, sin, positions, interleaved))
    before = q.clone(), k.clone(), [c.clone() for c in caches]
    rope_and_write_kv_(
        q, k, v, cos, sin, positions, *caches, slots, interleaved=interleaved, q_norm=weights[0],
        k_norm=weights[1], eps=EPS,
    )  # fmt: skip
    real = slots >= 0
    for x, a, b in (
        (q, like[0], exact[0]),
        (kept(caches[0], slots), like[1][real], exact[1][real]),
    ):
        check(x[..., :rotary], a[..., :rotary], b[..., :rotary])
        if rotary < d:
            check(x[..., rotary:], a[..., rotary:], b[..., rotary:])
    assert torch.equal(k, before[1]), "k itself stays"
    assert torch.equal(kept(caches[1], slots), v[real])
    if not norm:
        assert torch.equal(q[..., rotary:], before[0][..., rotary:])
    for cache, old in zip(caches, before[2], strict=True):
        old[slots[real] // 4, :, slots[real] % 4] = kept(cache, slots)
        assert torch.equal(cache, old), "no other token of the cache changes"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_position_dtypes_and_strides(dtype, device):
    q, k = torch.randn(5, 2, 16, device=device), torch.randn(5, 2, 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(5, device, dtype).repeat_interleave(2)[::2]
    v, caches, slots = step(5, 2, 16, 16, device)
    want = plain(q, cos, sin, positions, False), plain(k, cos, sin, positions, False)[slots >= 0]
    rope_and_write_kv_(q, k, v, cos, sin, positions, *caches, slots.repeat_interleave(2)[::2])
    torch.testing.assert_close((q, kept(caches[0], slots)), want)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_the_cache_rounds_once_to_its_dtype(source, target, device):
    q, k = torch.randn(5, 2, 16, device=device).to(source), torch.randn(5, 2, 16, device=device)
    k, positions, (cos, sin) = k.to(source), positions_of(5, device), tables(16, device)
    v, caches, slots = step(5, 2, 16, 16, device, source, cache_dtype=target)
    want = plain(k.float(), cos, sin, positions, False)[slots >= 0]
    rope_and_write_kv_(q, k, v, cos, sin, positions, *caches, slots)
    rounding = torch.finfo(target).eps / 2
    torch.testing.assert_close(kept(caches[0], slots).float(), want, rtol=rounding, atol=1e-6)
    assert torch.equal(kept(caches[1], slots), v[slots >= 0].to(target))


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_one_projection_into_views_of_one_pool(interleaved, device):
    """Only the rotated columns of q change; so too where each has strides of its own."""
    qkv = torch.randn(5, 7 * 24, device=device)
    q, k, v = (part.unflatten(1, (-1, 24)) for part in qkv.split((72, 48, 48), 1))
    cos, sin = tables(20, device)
    positions = positions_of(5, device)
    _, _, slots = step(5, 2, 24, 24, device)
    pool = torch.randn(4, 2 * 4 * 48, device=device)
    caches = [part.unflatten(1, (2, 4, 24)) for part in pool.split(2 * 4 * 24, 1)]
    want = qkv.clone()
    want[:, :72] = plain(q, cos, sin, positions, interleaved).flatten(1)
    want_k = plain(k, cos, sin, positions, interleaved)[slots >= 0]
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    others = [c.contiguous() for c in caches]
    apart = k.clone(), v.transpose(0, 1).contiguous().transpose(0, 1)
    run = partial(rope_and_write_kv_, interleaved=interleaved)
    run(swapped, *apart, cos, sin, positions, *others, slots)
    run(q, k, v, cos, sin, positions, *caches, slots)
    torch.testing.assert_close(qkv, want)
    torch.testing.assert_close(kept(caches[0], slots), want_k)
    torch.testing.assert_close(kept(caches[1], slots), v[slots >= 0])
    torch.testing.assert_close((swapped, *others), (q, *caches))


def test_tables_stay_float32(device):
    """At a position in the ten thousands a table in bfloat16 would be off by tenths."""
    q = torch.randn(1, 1, 16, device=device).bfloat16()
    cos, sin = tables(16, device, 30000)
    positions = torch.tensor([29999], device=device)
    v, caches, slots = step(1, 1, 16, 16, device, torch.bfloat16)
    exact = plain(q.float(), cos, sin, positions, False)
    rope_and_write_kv_(q, q.clone(), v, cos, sin, positions, *caches, slots)
    torch.testing.assert_close(q.float(), exact, rtol=2**-8, atol=1e-6)


def test_no_tokens(device):
    q = torch.empty(0, 2, 16, device=device)
    v, caches, slots = step(0, 2, 16, 16, device)
    before = [c.clone() for c in caches]
    rope_and_write_kv_(q, q.clone(), v, *tables(16, device), slots.long(), *caches, slots.long())
    assert torch.equal(caches[0], before[0]) and torch.equal(caches[1], before[1])


def test_one_launch(device, monkeypatch):
    grids = record_launches(monkeypatch, rope, "_rope_and_write_kv_kernel")
    q, k = torch.randn(3, 37, 64, device=device), torch.randn(3, 5, 64, device=device)
    v, caches, slots = step(3, 5, 64, 64, device)
    rope_and_write_kv_(q, k, v, *tables(64, device), positions_of(3, device), *caches, slots)
    assert default_config(5, 32)[0] == 8
    assert grids == [(3, 5 + 1 + 1)]


def test_bad_input_is_refused(device):
    q, k = torch.randn(3, 4, 16, device=device), torch.randn(3, 2, 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(3, device)
    v, caches, slots = step(3, 2, 16, 16, device)
    rest = v, cos, sin, positions, *caches, slots
    rope_ = rope_and_write_kv_
    with pytest.raises(ValueError, match=r"k must have shape \(3, any, 16\), got \(2, 2, 16\)"):
        rope_(q, k[:2], *rest)
    with pytest.raises(TypeError, match="k must be float32, got bfloat16"):
        rope_(q, k.bfloat16(), *rest)
    with pytest.raises(ValueError, match=r"v must have shape \(3, 2, any\), got \(3, 1, 16\)"):
        rope_(q, k, v[:, :1], *rest[1:])
    with pytest.raises(TypeError, match="cos must be float32, got float16"):
        rope_(q, k, v, cos.half(), sin, *rest[3:])
    with pytest.raises(ValueError, match=r"sin must have shape \(50, 8\), got \(49, 8\)"):
        rope_(q, k, v, cos, sin[1:], *rest[3:])
    for columns in (32, 0):
        with pytest.raises(ValueError, match=f"cos must have 1 to 8 columns, got {columns // 2}"):
            rope_(q, k, v, *tables(columns, device), *rest[3:])
    with pytest.raises(TypeError, match="positions must be int32 or int64, got float32"):
        rope_(q, k, v, cos, sin, positions.float(), *rest[4:])
    with pytest.raises(ValueError, match=r"positions must have shape \(3\), got \(2,\)"):
        rope_(q, k, v, cos, sin, positions[:2], *rest[4:])
    with pytest.raises(ValueError, match="q must have stride 1"):
        rope_(q.transpose(1, 2).contiguous().transpose(1, 2), k, *rest)
    with pytest.raises(ValueError, match="positions must be on"):
        rope_(q, k, v, cos, sin, positions.to("meta"), *rest[4:])
    with pytest.raises(ValueError, match="k_cache must have contiguous pages"):
        strided = caches[0].transpose(1, 2).contiguous().transpose(1, 2)
        rope_(q, k, v, cos, sin, positions, strided, *rest[5:])
    with pytest.raises(ValueError, match="k_norm must not be None"):
        rope_(q, k, *rest, q_norm=cos[0].repeat(2))
    with pytest.raises(ValueError, match=r"q_norm must have shape \(16\), got \(8,\)"):
        rope_(q, k, *rest, q_norm=cos[0], k_norm=cos[0])


def test_registration(device):
    qkv = torch.randn(3, 8 * 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(3, device)
    _, caches, slots = step(3, 2, 16, 16, device)

    def turned(qkv, k_cache, v_cache):
        rows = qkv * 2
        q, k, v = (part.unflatten(1, (-1, 16)) for part in rows.split((64, 32, 32), 1))
        rope_and_write_kv_(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
        return q + 1, k + 1, v + 1

    q, k = qkv.clone()[:, :64].unflatten(1, (4, 16)), torch.randn(3, 2, 16, device=device)
    args = (
        q,
        k,
        k.clone(),
        cos,
        sin,
        positions,
        *caches,
        slots,
        True,
        cos[0].repeat(2),
        sin[0].repeat(2),
    )
    torch.library.opcheck(torch.ops.tlk.rope_and_write_kv_.default, args)
    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager", dynamic=True)
    mine, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
    torch.testing.assert_close(compiled(qkv, *mine), turned(qkv, *theirs))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
