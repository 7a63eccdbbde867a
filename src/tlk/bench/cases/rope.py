"""Rotary embedding of Llama-3.1-8B, and of heads that rotate in part or in interleaved pairs."""

from functools import partial

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.rope import rope_, rope_reference_

LENGTH = 8192


def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """What models do in plain torch, with tables rounded to the dtype of the heads."""
    c = cos[positions].repeat(1, 2).to(q.dtype)[:, None]
    s = sin[positions].repeat(1, 2).to(q.dtype)[:, None]
    for x in (q, k):
        h = x[..., : c.shape[-1]]
        a, b = h.chunk(2, -1)
        h.copy_(h * c + torch.cat((-b, a), -1) * s)


def _case(
    t: int, heads: int, kv_heads: int, d: int, rotary: int, interleaved: bool = False
) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        qkv = new.randn(t, heads + 2 * kv_heads, d)
        cos = new.randn(LENGTH, rotary // 2, dtype=torch.float32)
        sin = new.randn(LENGTH, rotary // 2, dtype=torch.float32)
        positions = new.randint(0, LENGTH, t, dtype=torch.int64)
        # a real rotation, so that repeating it in place neither grows nor shrinks the heads
        return qkv[:, :heads], qkv[:, heads : heads + kv_heads], cos.cos(), sin.sin(), positions

    part = f"-R{rotary}" if rotary < d else ""
    return Case(
        "rope_", f"T{t}-H{heads}-Hk{kv_heads}-D{d}{part}{'-interleaved' if interleaved else ''}",
        inputs, partial(rope_, interleaved=interleaved),
        lambda size: 2 * t * (heads + kv_heads) * rotary * size + 4 * t * rotary,
        partial(rope_reference_, interleaved=interleaved),
        peers={} if interleaved else {"torch": _torch},
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_case(t, 32, 8, 128, 128) for t in (1, 16, 128, 8192)),
    _case(4096, 14, 2, 64, 64),
    _case(4096, 16, 8, 256, 256),
    _case(4096, 32, 8, 128, 64),
    _case(4096, 32, 8, 128, 128, interleaved=True),
)
