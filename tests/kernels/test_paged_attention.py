from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interpreter import interpret
from tests.kernels.check import check
from tlk.kernels import paged_attention as module
from tlk.kernels.paged_attention import (
    default_config,
    paged_attention,
    paged_attention_reference,
    split_count,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Requests:
    """A batch over a shuffled cache; whatever attention must not touch is NaN, or no page at all."""

    queries: list[int]
    lengths: list[int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    dv: int = 16
    page: int = 8
    padding: int = 0
    window: int = 0
    spare_pages: int = 2
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [-(-n // self.page) for n in self.lengths]
        total = sum(counts) + 1  # page 0 belongs to nobody
        order = (torch.randperm(total - 1) + 1).tolist()
        caches = [torch.full((total, self.kv_heads, self.page, d), torch.nan) for d in (self.d, self.dv)]
        table = torch.full((len(counts), max(counts, default=0) + self.spare_pages), -(2**30))
        for s, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            pages = [order.pop() for _ in range(count)]
            dense = [torch.randn(self.kv_heads, length, d).to(self.dtype) for d in (self.d, self.dv)]
            self.k.append(dense[0].to(self.device))
            self.v.append(dense[1].to(self.device))
            oldest = max(length - self.queries[s] - self.window + 1, 0) if self.window else 0
            for i, page in enumerate(pages):
                if (i + 1) * self.page <= oldest:
                    continue  # left of the window: given back to the allocator
                table[s, i] = page
                for cache, x in zip(caches, dense, strict=True):
                    part = x[:, i * self.page : (i + 1) * self.page]
                    cache[page, :, : part.shape[1]] = part.float()
        to = {"device": self.device}
        self.cu = [0]
        for n in self.queries:
            self.cu.append(self.cu[-1] + n)
        rows = torch.randn(self.cu[-1] + self.padding, self.heads + 3, self.d).to(self.dtype)
        self.q = rows.to(**to)[:, 1 : self.heads + 1]  # a slice of a qkv row
        self.caches = [c.to(self.dtype).to(**to) for c in caches]
        self.table = table.int().to(**to)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, **to)
        self.cu_seqlens_q = torch.tensor(self.cu, dtype=torch.int32, **to)

    @property
    def args(self):
        longest = max(self.queries, default=0)
        return (self.q, *self.caches, self.table, self.seq_lens, self.cu_seqlens_q, longest)


def dense(r: Requests, dtype, scale=None, softcap=0.0, sinks=None) -> Tensor:
    """Attention as a transformers model computes it eagerly, one sequence at a time, in `dtype`."""
    scale = r.d**-0.5 if scale is None else scale
    out = torch.zeros(r.q.shape[0], r.heads, r.dv, dtype=dtype, device=r.device)
    for s, (n, length) in enumerate(zip(r.queries, r.lengths, strict=True)):
        q = r.q[r.cu[s] : r.cu[s + 1]].to(dtype).transpose(0, 1)
        k, v = (x[s].to(dtype).repeat_interleave(r.heads // r.kv_heads, 0) for x in (r.k, r.v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        i = torch.arange(length - n, length, device=r.device)[:, None]
        j = torch.arange(length, device=r.device)[None]
        hidden = (j > i) | (j <= i - r.window) if r.window else j > i
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, n, 1)
            scores = torch.cat([scores, sink], -1)
        p = torch.softmax(scores.float(), -1).to(dtype)[..., :length]
        o = p.nan_to_num(0.0) @ v if length else q.new_zeros(r.heads, n, r.dv)
        out[r.cu[s] : r.cu[s + 1]] = o.transpose(0, 1)
    return out


def verify(r: Requests, scale=None, softcap=0.0, sinks=None) -> Tensor:
    options = {"softcap": softcap, "sinks": sinks}
    out = paged_attention(*r.args, softmax_scale=scale, window=r.window, **options)
    like, exact = dense(r, r.dtype, scale, **options), dense(r, torch.float32, scale, **options)
    check(out, like, exact)
    return out


@pytest.mark.parametrize("window", [0, 5])
def test_reference_is_sdpa(window):
    r = Requests([3, 1, 9], [20, 33, 9], window=window, padding=2)
    out = paged_attention_reference(*r.args, 0.3, window)
    assert not out[13:].any()
    for s, (n, length) in enumerate(zip(r.queries, r.lengths, strict=True)):
        i = torch.arange(length - n, length)[:, None]
        j = torch.arange(length)[None]
        seen = (j <= i) & (j > i - window) if window else j <= i
        q = r.q[r.cu[s] : r.cu[s + 1]].transpose(0, 1)
        want = F.scaled_dot_product_attention(
            q[None], r.k[s][None], r.v[s][None], attn_mask=seen, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[r.cu[s] : r.cu[s + 1]], want[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [1, 8, 16, 64, 12])
def test_decode(page, dtype, device):
    verify(Requests([1, 1, 1], [page, 130, 97], device, dtype, page=page, d=32, dv=32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_and_decode_together(dtype, device):
    r = Requests([1, 0, 70, 5, 1, 0], [40, 7, 70, 150, 1, 0], device, dtype, padding=3, page=16)
    verify(r)
