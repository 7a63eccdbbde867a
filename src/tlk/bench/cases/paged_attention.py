"""Attention over a paged cache: decode, a few queries each, prefill, chunks and mixed steps."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels._kv_codes import encode_reference
from tlk.kernels.paged_attention import paged_attention, paged_attention_reference

HALF = (torch.bfloat16, torch.float16)
ANY = (*HALF, torch.float32)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
SCALE = 0.03  # of 8-bit codes


@dataclass(frozen=True, slots=True)
class Step:
    """`queries[s]` new tokens of a sequence that has `length` of them, for each s."""

    name: str
    queries: tuple[int, ...]
    length: int
    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    deterministic: bool = False
    codes: torch.dtype | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    gate: bool = True

    def inputs(self, make: Inputs) -> tuple[Any, ...]:
        seqs, pages = len(self.queries), -(-self.length // self.page)
        q = make.randn(sum(self.queries), self.heads, self.d)
        sinks = make.randn(self.heads) if self.sinks else None
        lens = make.tensor([self.length] * seqs)
        cu_seqlens = make.tensor([0, *accumulate(self.queries)])
        table = make.randint(0, 1, seqs, pages)
        if make.empty:  # to compile for, a few pages are as good as all
            dense = [make.randn(1, self.kv_heads, 4 * self.page, self.d) for _ in range(2)]
            shape = 64, self.kv_heads, self.page, self.d
            caches = [make.randn(*shape, dtype=self.codes) for _ in range(2)]
        else:
            table.copy_(torch.randperm(seqs * pages, device=table.device).view(seqs, pages))
            rows = seqs, self.kv_heads, pages * self.page, self.d
            dense = [make.randn(*rows) for _ in range(2)]
            caches = [self._paged(x, table) for x in dense]
            if self.codes:
                caches = [encode_reference(x / SCALE, None, self.codes) for x in caches]
        scales = [
            make.tensor([SCALE] * self.kv_heads, torch.float32) for _ in range(2 * bool(self.codes))
        ]
        return (q, *caches, table, lens, cu_seqlens, sinks, *(scales or (None, None)), *dense)

    def _paged(self, dense: Tensor, table: Tensor) -> Tensor:
        pages = dense.unflatten(2, (-1, self.page)).transpose(1, 2).flatten(0, 1)
        cache = torch.empty_like(pages, memory_format=torch.contiguous_format)
        cache[table.flatten().long()] = pages
        return cache

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor,
        sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, *_: Tensor,
    ) -> Tensor:  # fmt: skip
        return paged_attention(
            q, k, v, table, lens, cu, max(self.queries), window=self.window, softcap=self.softcap,
            sinks=sinks, deterministic=self.deterministic, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu: Tensor,
        sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, *_: Tensor,
    ) -> Tensor:  # fmt: skip
        return paged_attention_reference(
            q, k, v, table, lens, cu, max(self.queries), self.d**-0.5, self.window, self.softcap,
            sinks, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    def dense(self, q: Tensor, *rest: Tensor) -> Tensor:
        """SDPA on the same keys and values without pages."""
        k, v = rest[-2:]
        q = q.view(len(self.queries), -1, self.heads, self.d).transpose(1, 2)
        whole = self.queries[0] == self.length
        out = F.scaled_dot_product_attention(
            q, k[:, :, : self.length], v[:, :, : self.length], is_causal=whole, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    def seen(self, queries: int) -> int:
        """Pairs of query and key."""
        reach = min(self.window or self.length, self.length)
        return sum(min(self.length - i, reach) for i in range(queries))

    def bytes(self, itemsize: int) -> int:
        keys = 0
        for n in self.queries:
            keys += min(self.length, self.window + n - 1) if self.window else self.length
        stored = self.codes.itemsize if self.codes else itemsize
        rows = sum(self.queries) * self.heads * itemsize + keys * self.kv_heads * stored
        return 2 * rows * self.d

    def case(self) -> Case:
        plain = not (self.window or self.softcap or self.sinks)
        alike = len(set(self.queries)) == 1 and self.queries[0] in (1, self.length)
        return Case(
            op="paged_attention",
            shape=self.name,
            inputs=self.inputs,
            run=self.run,
            bytes=self.bytes,
            reference=self.reference,
            flops=4 * self.d * self.heads * sum(self.seen(n) for n in self.queries),
            peers={"sdpa-dense": self.dense} if plain and alike else {},
            dtypes=self.dtypes,
            options={
                "decode": set(self.queries) == {1},
                "window": self.window,
                "softcap": self.softcap,
            },
            gate=self.gate,
        )


DECODE = ((1, 131072), (16, 4096), (32, 4096), (128, 1024), (128, 8192), (256, 512))  # B, S
GATED = ((1, 131072), (32, 4096), (128, 8192))

STEPS = (
    Step("decode-B1-S131072", (1,), 131072),
    Step("decode-B1-S1024", (1,), 1024, dtypes=ANY),
    Step("decode-B16-S4096", (1,) * 16, 4096),
    Step("decode-B32-S4096", (1,) * 32, 4096),
    Step("decode-B128-S1024", (1,) * 128, 1024, dtypes=ANY),
    Step("decode-B128-S8192", (1,) * 128, 8192, dtypes=(torch.bfloat16,)),
    Step("decode-B256-S512", (1,) * 256, 512),
    Step("decode-B32-S4096-D64-sinks-window", (1,) * 32, 4096, 64, 8, 64, window=128, sinks=True),
    Step("decode-B32-S4096-D256-softcap", (1,) * 32, 4096, 16, 8, 256, softcap=50.0, dtypes=ANY),
    Step("decode-B32-S4096-G7-D96", (1,) * 32, 4096, 28, 4, 96, dtypes=ANY),
    Step("decode-B32-S4096-G71-D64", (1,) * 32, 4096, 71, 1, 64),
    Step("speculate-B32-S4096-Q4", (4,) * 32, 4096),
    Step("chunk-B8-S4096-Q16", (16,) * 8, 4096, dtypes=ANY),
    Step("chunk-B8-S4096-Q16-D256", (16,) * 8, 4096, 16, 8, 256, dtypes=ANY),
    Step("chunk-B1-S32768-Q512", (512,), 32768),
    Step("prefill-B1-S4096", (4096,), 4096, dtypes=ANY),
    Step("prefill-B4-S4096-D64", (4096,) * 4, 4096, 64, 8, 64, dtypes=ANY),
    Step("prefill-B4-S4096-D64-sinks", (4096,) * 4, 4096, 64, 8, 64, sinks=True, window=128),
    Step("prefill-B1-S8192-D256-softcap", (8192,), 8192, 16, 8, 256, window=4096, softcap=50.0),
    Step("prefill-B1-S4096-page64", (4096,), 4096, page=64),
    Step("prefill-B1-S4096-page128", (4096,), 4096, page=128),
    Step("prefill-B8-S1024-page64", (1024,) * 8, 1024, page=64),
    Step("prefill-B4-S4096-D64-page64", (4096,) * 4, 4096, 64, 8, 64, page=64),
    Step("prefill-B4-S4096-D64-page128", (4096,) * 4, 4096, 64, 8, 64, page=128),
    Step("chunk-B1-S8192-Q2048-page64", (2048,), 8192, page=64),
    Step("mixed-Q512-and-120-page64", (512, *(1,) * 120), 1024, page=64),
    Step("mixed-Q2048-and-63", (2048, *(1,) * 63), 4096, dtypes=ANY),
    Step("decode-B32-S4096-llama-70b", (1,) * 32, 4096, 64, 8, gate=False),
    Step("decode-B64-S2048-qwen3-30b", (1,) * 64, 2048, 32, 4, gate=False),
    *(
        Step(f"decode-B{b}-S{n}-page64", (1,) * b, n, page=64, dtypes=HALF[:1], gate=False)
        for b, n in DECODE
    ),
    *(
        Step(f"decode-B{b}-S{n}-{kind}", (1,) * b, n, page=64, codes=codes, gate=(b, n) in GATED)
        for kind, codes in (("fp8", FP8), ("int8", INT8))
        for b, n in DECODE
    ),
    *(
        Step(f"prefill-B1-S4096-{kind}", (4096,), 4096, page=64, codes=codes)
        for kind, codes in (("fp8", FP8), ("int8", INT8))
    ),
    Step(
        "decode-B32-S4096-D256-softcap-int8", (1,) * 32, 4096, 16, 8, 256, softcap=50.0, codes=INT8
    ),
    Step("decode-B32-S4096-G7-D96-fp8", (1,) * 32, 4096, 28, 4, 96, dtypes=ANY, codes=FP8),
    Step("chunk-B8-S4096-Q16-fp8", (16,) * 8, 4096, dtypes=ANY, codes=FP8),
    Step(
        "prefill-B1-S8192-D256-fp8", (8192,), 8192, 16, 8, 256, window=4096, dtypes=ANY, codes=FP8
    ),
    Step("mixed-Q2048-and-63-int8", (2048, *(1,) * 63), 4096, dtypes=ANY, codes=INT8),
    *(
        Step(f"{name}-deterministic", queries, length, dtypes=ANY, deterministic=True)
        for name, queries, length in (
            ("decode-B1-S1024", (1,), 1024),
            ("decode-B128-S1024", (1,) * 128, 1024),
            ("prefill-B1-S4096", (4096,), 4096),
        )
    ),
)
CASES = tuple(step.case() for step in STEPS)
