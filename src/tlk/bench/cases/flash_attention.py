"""Attention at the shapes of prefills, encoders, diffusion transformers and short queries."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.flash_attention import flash_attention, flash_attention_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Attention:
    """One sequence after another of `lengths` queries and as many keys, or of `keys` each."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    d: int = 128
    dv: int = 0
    keys: int = 0
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    varlen: bool = False
    eight_bit: bool = False
    gate: bool = True

    def inputs(self, make: Inputs) -> tuple[Any, ...]:
        starts = make.tensor([0, *accumulate(self.lengths)]) if self.varlen else None
        batch = [] if self.varlen else [len(self.lengths)]
        queries = sum(self.lengths) if self.varlen else self.lengths[0]
        lead_q, lead_k = [*batch, queries], [*batch, self.keys or queries]
        q, k, v = (
            make.randn(*lead_q, self.heads, self.d),
            make.randn(*lead_k, self.kv_heads, self.d),
            make.randn(*lead_k, self.kv_heads, self.dv or self.d),
        )
        if self.eight_bit:
            q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
        return q, k, v, make.randn(self.heads) if self.sinks else None, starts

    def run(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu: Tensor | None) -> Any:
        longest = max(self.lengths) if self.varlen else None
        scale = q.new_ones(1, dtype=torch.float32) if self.eight_bit else None
        return flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            sinks=sinks,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_q=longest,
            max_k=longest,
            q_scale=scale,
        )

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu: Tensor | None
    ) -> Any:
        options = (self.d**-0.5, self.causal, self.window, self.softcap, sinks)
        longest = (max(self.lengths), self.keys or max(self.lengths))
        out_dtype = torch.bfloat16 if self.eight_bit else None
        return flash_attention_reference(
            q, k, v, *options, cu, cu, *longest, out_dtype=out_dtype
        )  # fmt: skip

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        shared = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=shared)
        return out.transpose(1, 2)

    def flops(self) -> int:
        pairs = 0
        for n in self.lengths:
            reach = min(self.window, n) if self.window else n
            pairs += n * reach - reach * (reach - 1) // 2 if self.causal else n * (self.keys or n)
        return 2 * pairs * self.heads * (self.d + (self.dv or self.d))

    def bytes(self, itemsize: int) -> int:
        queries = sum(self.lengths) * self.heads
        keys = (self.keys * len(self.lengths) or sum(self.lengths)) * self.kv_heads
        if self.eight_bit:
            return (queries + keys) * self.d + (queries * itemsize + keys) * (self.dv or self.d)
        return (queries + keys) * (self.d + (self.dv or self.d)) * itemsize

    def case(self) -> Case:
        plain = not (self.window or self.softcap or self.sinks or self.varlen or self.eight_bit)
        return Case(
            op="flash_attention",
            shape=self.name,
            inputs=self.inputs,
            run=self.run,
            bytes=self.bytes,
            reference=self.reference,
            flops=self.flops(),
            peers={"sdpa": self.sdpa} if plain else {},
            options={"causal": self.causal, "window": self.window, "softcap": self.softcap},
            gate=self.gate,
            dtypes=DTYPES[:1] if self.eight_bit else DTYPES,
            oldest=89 if self.eight_bit else 75,
            tolerance=0.04 if self.eight_bit else 0.01,  # probabilities of 3 bits: 1.6 % on an H100
        )


LLAMA = (32, 8)
CASES = tuple(
    attention.case()
    for attention in (
        Attention("llama-8b-4096", (4096,), *LLAMA, causal=True),
        Attention("llama-8b-16384", (16384,), *LLAMA, causal=True),
        Attention("mha-4096", (4096,), 32, 32, causal=True),
        Attention("mha-full-4096", (4096,), 32, 32),
        Attention("llama-1b-8192", (8192,), 32, 8, d=64, causal=True),
        Attention("flux-4608", (4608,), 24, 24),
        Attention("encoder-512", (512,) * 32, 12, 12, d=64),
        Attention("sequences-8192", (4096, 1024, 33, 2047, 992), *LLAMA, causal=True, varlen=True),
        Attention("vision-D80", (1024, 256, 1764, 400), 16, 16, d=80, varlen=True),
        Attention("phi-D96-4096", (4096,), 32, 32, d=96, causal=True),
        Attention("mistral-window-8192", (8192,), *LLAMA, causal=True, window=4096),
        Attention("gpt-oss-8192", (8192,), 64, 8, d=64, causal=True, window=128, sinks=True),
        Attention("gemma-4096", (4096,), 16, 8, d=256, causal=True, softcap=50.0),
        Attention("padded-D160", (4096,), 16, 16, d=160, causal=True),
        Attention("vision-D72", (4096,), 16, 16, d=72),
        Attention("full-D256", (4096,), 16, 8, d=256),
        Attention("mla-4096", (4096,), 16, 16, d=192, dv=128, causal=True),
        Attention("short-D64", (16,) * 16, 16, 16, d=64, keys=1500),
        Attention("short-D128", (16,) * 16, *LLAMA, keys=4096),
        Attention("short-D256", (16,) * 16, 16, 8, d=256, keys=4096),
        Attention("short-grouped-512", (48,) * 16, *LLAMA, keys=512),
        Attention("llama-8b-4096-fp8", (4096,), *LLAMA, causal=True, eight_bit=True),
        Attention("mha-full-4096-fp8", (4096,), 32, 32, eight_bit=True),
        Attention("d64-full-4096-fp8", (4096,), 64, 64, d=64, eight_bit=True),
        *(
            Attention(f"{name}-{n}-fp8", (n,), heads, heads, d, eight_bit=True, gate=False)
            for name, heads, d, lengths in (
                ("mha-full", 32, 128, (16384,)),
                ("d64-full", 64, 64, (16384,)),
            )
            for n in lengths
        ),
        *(
            Attention(f"mha-{n}-fp8", (n,), 32, 32, causal=True, eight_bit=True, gate=False)
            for n in (4096, 16384)
        ),
        Attention("packed-16x1024", (1024,) * 16, *LLAMA, causal=True, varlen=True, gate=False),
        Attention("mha-16384", (16384,), 32, 32, causal=True, gate=False),
        Attention("mha-full-16384", (16384,), 32, 32, gate=False),
        *(
            Attention(f"d64-{name}{n}", (n,), 64, 64, d=64, causal=causal, gate=False)
            for name, causal in (("", True), ("full-", False))
            for n in (4096, 16384)
        ),
        Attention("llama-70b-8192", (8192,), 64, 8, causal=True, gate=False),
        Attention("qwen3-30b-4096", (4096,) * 4, 32, 4, causal=True, gate=False),
        Attention("deepseek-v3-4096", (4096,), 128, 128, d=192, dv=128, causal=True, gate=False),
        Attention("sd3.5-4429", (4429,) * 2, 38, 38, d=64, gate=False),
    )
)
