import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.models.zoo import Pages
from tlk.models.attention import Attention
from tlk.models.config import AttentionConfig, NormConfig, RopeConfig
from tlk.models.layers import RMSNorm
from tlk.models.rope import RotaryEmbedding
from tlk.quant.format import DENSE, Dense

CONFIG = AttentionConfig(
    heads=4,
    kv_heads=2,
    head_dim=8,
    v_head_dim=6,
    softmax_scale=0.3,
    rope=RopeConfig(rotary_dim=4, theta=100.0, max_position_embeddings=32),
    bias=True,
    out_bias=True,
    qk_norm=NormConfig("rms", 0.5),
    window=5,
    softcap=2.0,
    sinks=True,
)


def build(config, format=DENSE):
    rope = None
    if config.rope is not None:
        rope = RotaryEmbedding(config.rope)
        rope.prepare(32)
    attention, norm = Attention(config, 12, rope, format), RMSNorm(12, 0.5)
    for parameter in (*attention.parameters(), *norm.parameters()):
        parameter.data.normal_()
    return attention, norm


def rotate(x, rope, positions):
    if rope is None:
        return x
    r = rope.config.rotary_dim
    a, b, rest = x.split([r // 2, r // 2, x.shape[-1] - r], dim=-1)
    cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def dense(attention, norm, x):
    """One sequence, in the words of the papers."""
    c, length = attention.config, len(x)
    sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.v_head_dim]
    q, k, v = F.linear(norm(x), attention.qkv.weight, attention.qkv.bias).split(sizes, -1)
    q, k = q.reshape(length, c.heads, -1), k.reshape(length, c.kv_heads, -1)
    if c.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    positions = torch.arange(length)
    q, k = rotate(q, attention.rope, positions), rotate(k, attention.rope, positions)
    k = k.repeat_interleave(c.heads // c.kv_heads, 1)
    v = v.reshape(length, c.kv_heads, -1).repeat_interleave(c.heads // c.kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * c.softmax_scale
    if c.softcap:
        scores = c.softcap * (scores / c.softcap).tanh()
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (c.window or length))
    scores = scores.masked_fill(hidden, -torch.inf)
    if c.sinks:
        sinks = attention.sinks[:, None, None].expand(-1, length, 1)
        scores = torch.cat([scores, sinks], -1)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], v)
    return x + F.linear(y.flatten(1), attention.out.weight, attention.out.bias)


def check_attention(config):
    attention, norm = build(config)
    x = torch.randn(14, 12)
    pages = Pages([attention.cache_spec(torch.float32, 4)], [14], "cpu")
    parts = [
        attention(part, norm, pages.step([(0, len(part))]), pages.cache.layers[0])
        for part in x.split([6, 1, 6, 1])
    ]
    torch.testing.assert_close(torch.cat(parts), dense(attention, norm, x), rtol=1e-4, atol=1e-4)


def test_everything_at_once():
    check_attention(CONFIG)


def test_nothing_optional():
    bare = {"qk_norm": None, "window": 0, "softcap": 0.0, "sinks": False, "rope": None}
    check_attention(dataclasses.replace(CONFIG, bias=False, out_bias=False, **bare))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("rope", [None, CONFIG.rope], ids=["no positions", "rope"])
def test_head_norms(kind, rope):
    check_attention(dataclasses.replace(CONFIG, qk_norm=NormConfig(kind, 0.5, 1.0), rope=rope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    """Bit for bit the same in chunks of any size, beside another sequence and padding or not."""
    attention, norm = (m.to(dtype) for m in build(CONFIG, Dense(deterministic=True)))
    x = torch.randn(2, 14, 12, dtype=dtype)
    outputs = []
    for chunks in ([14], [1] * 14, [3, 7, 1, 3]):
        for padding in (0, 2):
            pages = Pages([attention.cache_spec(dtype, 4)], [14, 14], "cpu")
            done = 0
            parts = []
            for n in chunks:
                both = [(0, n), (1, n)] if padding else [(0, n)]
                rows = torch.cat([x[s, done : done + n] for s, _ in both] + [x[0, :padding]])
                kv = pages.cache.layers[0]
                parts.append(attention(rows, norm, pages.step(both, padding), kv)[:n])
                done += n
            outputs.append(torch.cat(parts))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_padding_writes_nowhere_and_adds_nothing():
    attention, norm = build(dataclasses.replace(CONFIG, out_bias=False))
    pages = Pages([attention.cache_spec(torch.float32, 4)], [3], "cpu")
    kv, batch = pages.cache.layers[0], pages.step([(0, 3)], padding=2)
    kv.k.fill_(7.0)
    x = torch.randn(5, 12)
    y = attention(x, norm, batch, kv)
    assert torch.equal(y[3:], x[3:])
    assert (kv.k != 7.0).any(-1).sum() == 3 * CONFIG.kv_heads


def test_cache_spec_is_what_is_written():
    spec = build(CONFIG)[0].cache_spec(torch.float16, 4)
    assert (spec.kv_heads, spec.k_dim, spec.v_dim, spec.window) == (2, 8, 6, 5)
