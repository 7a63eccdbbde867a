from contextlib import nullcontext

import pytest
import torch

from tests.interpreter import interpret
from tests.kernels.launches import record_launches
from tlk.kernels import kv_cache
from tlk.kernels._kv_codes import CODES, encode_reference
from tlk.kernels.kv_cache import default_config, write_kv_, write_kv_reference_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Hk, Dk, Dv, page size: sizes that are no powers of two, keys wider than values and the reverse,
# more heads than a program takes, pages of one token
SHAPES = [(1, 16, 16, 16), (3, 24, 40, 5), (9, 192, 128, 4), (33, 64, 64, 2), (2, 8, 8, 1)]
PAGES = 6


def empty_caches(heads, dk, dv, page_size, device, dtype=torch.float32):
    return (
        torch.randn(PAGES, heads, page_size, dk, device=device).to(dtype),
        torch.randn(PAGES, heads, page_size, dv, device=device).to(dtype),
    )


def slots_of(page_size, device):
    """Both ends of the pool, both sides of a page boundary, in no order; two tokens go nowhere."""
    last = PAGES * page_size - 1
    wanted = [last, 2 * page_size, -1, 2 * page_size - 1, 0, -(2**40)]
    return torch.tensor(wanted, device=device)


def written(new, cache, slots):
    """What the cache must hold, token by token."""
    cache = cache.clone()
    page_size = cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[slot // page_size, :, slot % page_size] = new[token].to(cache.dtype)
    return cache


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_writes_token_by_token(shape):
    heads, dk, dv, page_size = shape
    caches = empty_caches(*shape, "cpu")
    slots = slots_of(page_size, "cpu")
    k, v = torch.randn(6, heads, dk), torch.randn(6, heads, dv)
    want = written(k, caches[0], slots), written(v, caches[1], slots)
    write_kv_reference_(k, v, *caches, slots)
    assert_same(caches, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv(shape, dtype, device):
    heads, dk, dv, page_size = shape
    caches = empty_caches(*shape, device, dtype)
    slots = slots_of(page_size, device)
    k = torch.randn(6, heads, dk, device=device, dtype=dtype)
    v = torch.randn(6, heads, dv, device=device, dtype=dtype)
    want = written(k, caches[0], slots), written(v, caches[1], slots)
    write_kv_(k, v, *caches, slots)
    assert_same(caches, want)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_the_cache_rounds_to_its_dtype(source, target, device):
    caches = empty_caches(3, 24, 40, 5, device, target)
    slots = slots_of(5, device)
    k, v = (torch.randn(6, 3, d, device=device).to(source) for d in (24, 40))
    want = written(k, caches[0], slots), written(v, caches[1], slots)
    write_kv_(k, v, *caches, slots)
    assert_same(caches, want)


@pytest.mark.parametrize("sm", [75, 80, 89, 90])
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_codes(source, codes, sm, device):
    """Divided by the scale of the head, rounded and clamped; untouched slots stay."""
    if device == "cuda" and sm != 90:
        pytest.skip("needs the interpreter of a machine without a GPU, to stand for another one")
    filled = (x.transpose(1, 2) for x in empty_caches(9, 24, 40, 5, device))
    caches = [encode_reference(x, None, codes).transpose(1, 2).contiguous() for x in filled]
    slots = slots_of(5, device)
    k, v = ((9 * torch.randn(6, 9, d, device=device)).to(source) for d in (24, 40))
    scales = [torch.rand(9, device=device) + 0.01 for _ in range(2)]
    want = [
        written(encode_reference(x, scale, codes), cache, slots)
        for x, scale, cache in zip((k, v), scales, caches, strict=True)
    ]
    with interpret(sm=sm) if device == "cpu" else nullcontext():
        write_kv_(k, v, *caches, slots, *scales)
    assert_same([x.view(torch.uint8) for x in caches], [x.view(torch.uint8) for x in want])


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_codes_without_scales(codes, device):
    caches = [x.to(codes) for x in empty_caches(2, 8, 8, 4, device)]
    slots = slots_of(4, device)
    k = 300 * torch.randn(6, 2, 8, device=device)
    want = written(encode_reference(k, None, codes), caches[0], slots).float()
    write_kv_(k, k, *caches, slots)
    assert torch.equal(caches[0].float(), want)


def test_views_of_one_projection_into_views_of_one_pool(device):
    rows = torch.randn(6, 3 * 24 + 7 + 3 * 40, device=device)
    k, v = rows[:, :72].unflatten(1, (3, 24)), rows[:, 79:].unflatten(1, (3, 40))
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    pool = torch.randn(PAGES, 3 * 5 * (24 + 40), device=device)
    k_cache = pool[:, : 3 * 5 * 24].unflatten(1, (3, 5, 24))
    v_cache = pool[:, 3 * 5 * 24 :].unflatten(1, (3, 5, 40))
    slots = slots_of(5, device).repeat_interleave(2)[::2]
    want = written(k, k_cache, slots), written(v, v_cache, slots)
    write_kv_(k, v, k_cache, v_cache, slots)
    assert_same((k_cache, v_cache), want)


def test_nothing_to_write(device):
    caches = empty_caches(2, 16, 16, 4, device)
    want = caches[0].clone(), caches[1].clone()
    k = torch.randn(3, 2, 16, device=device)
    write_kv_(k, k, *caches, torch.full((3,), -1, device=device))
    write_kv_(k[:0], k[:0], *caches, torch.empty(0, dtype=torch.int64, device=device))
    assert_same(caches, want)


def test_one_launch_for_keys_and_values(device, monkeypatch):
    grids = record_launches(monkeypatch, kv_cache, "_write_kv_kernel")
    caches = empty_caches(33, 64, 64, 2, device)
    k = torch.randn(6, 33, 64, device=device)
    write_kv_(k, k, *caches, slots_of(2, device))
    assert default_config(33, 64)[0] == 32
    assert grids == [(6, 4)]


def test_bad_input_is_refused(device):
    k, v = torch.randn(6, 3, 24, device=device), torch.randn(6, 3, 40, device=device)
    k_cache, v_cache = empty_caches(3, 24, 40, 5, device)
    slots = slots_of(5, device)
    with pytest.raises(ValueError, match=r"v must have shape \(6, 3, any\), got \(5, 3, 40\)"):
        write_kv_(k, v[1:], k_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"k_cache must have shape \(any, 3, any, 24\)"):
        write_kv_(k, v, v_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"v_cache must have shape \(6, 3, 5, 40\), got \(5, "):
        write_kv_(k, v, k_cache, v_cache[1:], slots)
    with pytest.raises(ValueError, match="v_cache must have contiguous pages"):
        write_kv_(k, v, k_cache, v_cache.transpose(1, 2).contiguous().transpose(1, 2), slots)
    with pytest.raises(TypeError, match=r"k_cache must be .*, got int16"):
        write_kv_(k, v, k_cache.to(torch.int16), v_cache, slots)
    with pytest.raises(TypeError, match="slots must be int64, got int32"):
        write_kv_(k, v, k_cache, v_cache, slots.int())
    with pytest.raises(ValueError, match=r"slots must have shape \(6\), got \(5,\)"):
        write_kv_(k, v, k_cache, v_cache, slots[1:])
    with pytest.raises(ValueError, match="k must have stride 1"):
        write_kv_(k.expand(6, 3, 24)[..., :1].expand(6, 3, 24), v, k_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"k_scale must be None for a cache of torch\.float32"):
        write_kv_(k, v, k_cache, v_cache, slots, torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match="v_cache must be int8, got float32"):
        write_kv_(k, v, k_cache.to(torch.int8), v_cache, slots, torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="slots must be on"):
        write_kv_(k, v, k_cache, v_cache, slots.to("meta"))


def test_registration(device):
    k_cache, v_cache = empty_caches(3, 24, 40, 5, device)
    slots = slots_of(5, device)
    rows = torch.randn(6, 3 * 24 + 3 * 40, device=device)

    def step(rows, k_cache, v_cache):
        k, v = (part.unflatten(1, (3, -1)) for part in (rows * 2).split((72, 120), 1))
        write_kv_(k, v, k_cache, v_cache, slots)
        return k_cache.sum() + v_cache.sum()

    k, v = torch.randn(6, 3, 24, device=device), torch.randn(6, 3, 40, device=device)
    torch.library.opcheck(torch.ops.tlk.write_kv_.default, (k, v, k_cache, v_cache, slots))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    mine, theirs = (k_cache.clone(), v_cache.clone()), (k_cache.clone(), v_cache.clone())
    torch.testing.assert_close(compiled(rows, *mine), step(rows, *theirs))
    assert_same(mine, theirs)
