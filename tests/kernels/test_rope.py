import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import rope
from tlk.kernels.rope import default_config, rope_, rope_reference_

LENGTH = 50
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
    rope_reference_(q, k, cos, sin, positions, interleaved)
    torch.testing.assert_close(q, want_q[0].transpose(0, 1))
    torch.testing.assert_close(k, want_k[0].transpose(0, 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(shape, dtype, interleaved, device):
    tokens, heads, kv_heads, d, rotary = shape
    scale = 10.0 ** torch.randint(-2, 3, (tokens, heads + kv_heads, 1), device=device)
    q, k = (
        (torch.randn(tokens, heads + kv_heads, d, device=device) * scale)
        .to(dtype)
        .split((heads, kv_heads), 1)
    )
    cos, sin = tables(rotary, device)
    positions = positions_of(tokens, device)
    like = [plain(x, cos, sin, positions, interleaved) for x in (q, k)]
    exact = [plain(x.float(), cos, sin, positions, interleaved) for x in (q, k)]
    before = q.clone(), k.clone()
    rope_(q, k, cos, sin, positions, interleaved=interleaved)
    for x, old, a, b in zip((q, k), before, like, exact, strict=True):
        check(x[..., :rotary], a[..., :rotary], b[..., :rotary])
        torch.testing.assert_close(x[..., rotary:], old[..., rotary:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_position_dtypes_and_strides(dtype, device):
    q, k = torch.randn(5, 2, 16, device=device), torch.randn(5, 2, 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(5, device, dtype).repeat_interleave(2)[::2]
    want = plain(q, cos, sin, positions, False), plain(k, cos, sin, positions, False)
    rope_(q, k, cos, sin, positions)
    torch.testing.assert_close((q, k), want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_one_projection(interleaved, device):
    """Only the rotated columns of q and k change; so too where each has strides of its own."""
    qkv = torch.randn(5, 7 * 24, device=device)
    q, k, _ = (part.unflatten(1, (-1, 24)) for part in qkv.split((72, 48, 48), 1))
    cos, sin = tables(20, device)
    positions = positions_of(5, device)
    want = qkv.clone()
    want[:, :72] = plain(q, cos, sin, positions, interleaved).flatten(1)
    want[:, 72:120] = plain(k, cos, sin, positions, interleaved).flatten(1)
    swapped, apart = q.transpose(0, 1).contiguous().transpose(0, 1), k.clone()
    rope_(swapped, apart, cos, sin, positions, interleaved=interleaved)
    rope_(q, k, cos, sin, positions, interleaved=interleaved)
    torch.testing.assert_close(qkv, want)
    torch.testing.assert_close((swapped, apart), (q, k))


def test_tables_stay_float32(device):
    """At a position in the ten thousands a table in bfloat16 would be off by tenths."""
    q = torch.randn(1, 1, 16, device=device).bfloat16()
    cos, sin = tables(16, device, 30000)
    positions = torch.tensor([29999], device=device)
    exact = plain(q.float(), cos, sin, positions, False)
    rope_(q, q.clone(), cos, sin, positions)
    torch.testing.assert_close(q.float(), exact, rtol=2**-8, atol=1e-6)


def test_no_tokens(device):
    cos, sin = tables(16, device)
    q = torch.empty(0, 2, 16, device=device)
    rope_(q, q.clone(), cos, sin, torch.empty(0, dtype=torch.int64, device=device))


def test_one_launch_for_q_and_k(device, monkeypatch):
    grids = record_launches(monkeypatch, rope, "_rope_kernel")
    cos, sin = tables(64, device)
    q, k = torch.randn(3, 33, 64, device=device), torch.randn(3, 5, 64, device=device)
    rope_(q, k, cos, sin, positions_of(3, device))
    assert default_config(33, 32)[0] == 32
    assert grids == [(3, 3)]


def test_bad_input_is_refused(device):
    q, k = torch.randn(3, 4, 16, device=device), torch.randn(3, 2, 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(3, device)
    with pytest.raises(ValueError, match=r"k must have shape \(3, any, 16\), got \(2, 2, 16\)"):
        rope_(q, k[:2], cos, sin, positions)
    with pytest.raises(TypeError, match="k must be float32, got bfloat16"):
        rope_(q, k.bfloat16(), cos, sin, positions)
    with pytest.raises(TypeError, match="cos must be float32, got float16"):
        rope_(q, k, cos.half(), sin, positions)
    with pytest.raises(ValueError, match=r"sin must have shape \(50, 8\), got \(49, 8\)"):
        rope_(q, k, cos, sin[1:], positions)
    with pytest.raises(ValueError, match="cos must have at most 8 columns, got 16"):
        rope_(q, k, *tables(32, device), positions)
    with pytest.raises(TypeError, match="positions must be int32 or int64, got float32"):
        rope_(q, k, cos, sin, positions.float())
    with pytest.raises(ValueError, match=r"positions must have shape \(3\), got \(2,\)"):
        rope_(q, k, cos, sin, positions[:2])
    with pytest.raises(ValueError, match="q must have stride 1"):
        rope_(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin, positions)
    with pytest.raises(ValueError, match="positions must be on"):
        rope_(q, k, cos, sin, positions.to("meta"))


def test_registration(device):
    qkv = torch.randn(3, 8 * 16, device=device)
    cos, sin = tables(16, device)
    positions = positions_of(3, device)

    def turned(qkv):
        rows = qkv * 2
        q, k, v = (part.unflatten(1, (-1, 16)) for part in rows.split((64, 32, 32), 1))
        rope_(q, k, cos, sin, positions)
        return q + 1, k + 1, v + 1

    q, k = qkv.clone()[:, :64].unflatten(1, (4, 16)), torch.randn(3, 2, 16, device=device)
    torch.library.opcheck(torch.ops.tlk.rope_.default, (q, k, cos, sin, positions, True))
    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(qkv), turned(qkv))
