"""Cache writes of Llama-3.1-8B, and of heads whose keys are wider than their values."""

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.kv_cache import write_kv_, write_kv_reference_

PAGE_SIZE = 16


def _torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Indexed assignment, which has no way to leave a token out."""
    k_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = k
    v_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = v


def _case(
    t: int, kv_heads: int, dk: int, dv: int, gate: bool = True, codes: torch.dtype | None = None
) -> Case:
    pages = max(t // PAGE_SIZE, 64)

    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        qkv = new.randn(t, kv_heads * (4 * dk + dk + dv))
        k, v = qkv[:, 4 * kv_heads * dk :].split((kv_heads * dk, kv_heads * dv), 1)
        # one page after the other for prefill, one page for every sequence when decoding
        step = PAGE_SIZE if t * PAGE_SIZE < pages * PAGE_SIZE else 1
        return (
            k.unflatten(1, (kv_heads, dk)),
            v.unflatten(1, (kv_heads, dv)),
            new.randn(pages, kv_heads, PAGE_SIZE, dk).to(codes or new.dtype),
            new.randn(pages, kv_heads, PAGE_SIZE, dv).to(codes or new.dtype),
            new.tensor([i * step for i in range(t)], dtype=torch.int64),
            *(new.tensor([0.03] * kv_heads, torch.float32) for _ in range(2 * bool(codes))),
        )

    name = f"T{t}-Hk{kv_heads}-D{dk}" + (f"-Dv{dv}" if dv != dk else "")
    return Case(
        "write_kv_", f"{name}-{str(codes).removeprefix('torch.')}" if codes else name,
        inputs, write_kv_,
        lambda size: t * kv_heads * (dk + dv) * (size + (codes.itemsize if codes else size)),
        write_kv_reference_, peers={} if codes else {"torch": _torch}, gate=gate,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_case(t, 8, 128, 128) for t in (1, 16, 128, 8192)),
    *(_case(8192, 8, 128, 128, codes=codes) for codes in (torch.float8_e4m3fn, torch.int8)),
    _case(4096, 2, 64, 64),
    _case(4096, 16, 192, 128),
    _case(4096, 8, 256, 256),
    *(_case(t, 4, 128, 128, gate=False) for t in (1, 8192)),  # Qwen3-30B-A3B
)
