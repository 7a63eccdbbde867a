"""Rotation and cache write of Llama-3.1 and Qwen3, and of heads that are normalized or turn in part or in interleaved pairs."""

from functools import partial

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.rope import rope_and_write_kv_, rope_and_write_kv_reference_

LENGTH = 8192
PAGE_SIZE = 16


def _torch(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, *_: Tensor,
) -> None:  # fmt: skip
    """What models do in plain torch, with tables rounded to the dtype of the heads."""
    c = cos[positions].repeat(1, 2).to(q.dtype)[:, None]
    s = sin[positions].repeat(1, 2).to(q.dtype)[:, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * c + torch.cat((-b, a), -1) * s

    q.copy_(turned(q))
    k_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = turned(k)
    v_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = v


def _case(
    t: int, heads: int, kv_heads: int, d: int, rotary: int, interleaved: bool = False,
    norm: bool = False, gate: bool = True, codes: torch.dtype | None = None,
) -> Case:  # fmt: skip
    pages = max(t // PAGE_SIZE, 64)

    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        qkv = new.randn(t, heads + 2 * kv_heads, d)
        cos = new.randn(LENGTH, rotary // 2, dtype=torch.float32)
        sin = new.randn(LENGTH, rotary // 2, dtype=torch.float32)
        # a real rotation, so that repeating it in place neither grows nor shrinks the heads
        tables = cos.cos(), sin.sin(), new.randint(0, LENGTH, t, dtype=torch.int64)
        # one page after the other for prefill, one page for every sequence when decoding
        step = PAGE_SIZE if t < pages else 1
        slots = new.tensor([i * step for i in range(t)], dtype=torch.int64)
        shape = pages, kv_heads, PAGE_SIZE, d
        caches = (new.randn(*shape).to(codes or new.dtype) for _ in range(2))
        norms = (new.randn(d) for _ in range(2 * norm))
        scales = (new.tensor([0.03] * kv_heads, torch.float32) for _ in range(2 * bool(codes)))
        heads_of = qkv.split((heads, kv_heads, kv_heads), 1)
        return *heads_of, *tables, *caches, slots, *norms, *scales

    def run(*args: Tensor, run=rope_and_write_kv_) -> None:  # type: ignore[no-untyped-def]
        names = ("q_norm", "k_norm") if norm else ("k_scale", "v_scale")
        run(*args[:9], interleaved=interleaved, **dict(zip(names, args[9:], strict=False)))

    part = f"-R{rotary}" if rotary < d else ""
    kind = f"{'-interleaved' if interleaved else ''}{'-norm' if norm else ''}"
    kind += f"-{str(codes).removeprefix('torch.')}" if codes else ""
    plain = rotary == d and not (interleaved or norm or codes)
    return Case(
        "rope_and_write_kv_", f"T{t}-H{heads}-Hk{kv_heads}-D{d}{part}{kind}",
        inputs, run,
        lambda size: 2 * t * (heads * rotary + 2 * kv_heads * d) * size + 4 * t * rotary,
        partial(run, run=rope_and_write_kv_reference_), peers={"torch": _torch} if plain else {},
        options={"plain": plain}, gate=gate,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_case(t, 32, 8, 128, 128) for t in (1, 16, 128, 8192)),
    *(_case(t, 32, 8, 128, 128, codes=torch.float8_e4m3fn) for t in (1, 8192)),
    _case(8192, 32, 8, 128, 128, codes=torch.int8),
    _case(4096, 14, 2, 64, 64),
    _case(4096, 16, 8, 256, 256),
    _case(4096, 32, 8, 128, 64),
    _case(4096, 32, 8, 128, 128, interleaved=True),
    *(_case(t, 32, 8, 128, 128, norm=True) for t in (1, 4096)),
    _case(4096, 32, 8, 128, 64, interleaved=True, norm=True),
    *(_case(t, 64, 8, 128, 128, gate=False) for t in (1, 128, 8192)),  # Llama-3.1-70B
    *(_case(t, 32, 4, 128, 128, norm=True, gate=False) for t in (1, 128, 8192)),  # Qwen3-30B-A3B
)
