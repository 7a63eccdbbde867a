from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interpreter import interpret
from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import _op, _paged_split
from tlk.kernels._kv_codes import CODES, encode_reference
from tlk.kernels._paged_split import split_count
from tlk.kernels.paged_attention import default_config, paged_attention, paged_attention_reference

module = import_module("tlk.kernels.paged_attention")  # tlk.kernels names the function so
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Requests:
    """A batch over a shuffled cache; what attention must not touch is NaN, or no page at all."""

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
    codes: torch.dtype | None = None  # of the cache, if it holds 8 bits
    scales: dict[str, Tensor] = field(default_factory=dict)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [-(-n // self.page) for n in self.lengths]
        total = sum(counts) + 1  # page 0 belongs to nobody
        order = (torch.randperm(total - 1) + 1).tolist()
        caches = [
            torch.full((total, self.kv_heads, self.page, d), torch.nan) for d in (self.d, self.dv)
        ]
        scales = [torch.rand(self.kv_heads) / 20 + 0.01 for _ in range(2)]
        table = torch.full((len(counts), max(counts, default=0) + self.spare_pages), -(2**30))
        for s, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            pages = [order.pop() for _ in range(count)]
            dense = [
                torch.randn(self.kv_heads, length, d).to(self.dtype) for d in (self.d, self.dv)
            ]
            if self.codes:
                codes = [self.encoded(x, s) for x, s in zip(dense, scales, strict=True)]
                dense = [c.float() for c in codes]
                real = [c * s[:, None, None] for c, s in zip(dense, scales, strict=True)]
            else:
                real = dense
            self.k.append(real[0].to(self.device))
            self.v.append(real[1].to(self.device))
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
        if self.codes:
            self.scales = {"k_scale": scales[0].to(**to), "v_scale": scales[1].to(**to)}
        if self.codes == torch.int8:
            caches = [c.nan_to_num(nan=100.0) for c in caches]  # int8 has no NaN
        self.caches = [c.to(self.codes or self.dtype).to(**to) for c in caches]
        self.table = table.int().to(**to)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, **to)
        self.cu_seqlens_q = torch.tensor(self.cu, dtype=torch.int32, **to)

    def encoded(self, x: Tensor, scale: Tensor) -> Tensor:
        return encode_reference(x.transpose(0, 1), scale, self.codes).transpose(0, 1)

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
        wide = torch.promote_types(dtype, torch.float32)
        p = torch.softmax(scores, -1, dtype=wide).to(dtype)[..., :length]
        o = p.nan_to_num(0.0) @ v if length else q.new_zeros(r.heads, n, r.dv)
        out[r.cu[s] : r.cu[s + 1]] = o.transpose(0, 1)
    return out


def verify(r: Requests, scale=None, softcap=0.0, sinks=None) -> Tensor:
    options = {"softcap": softcap, "sinks": sinks}
    out = paged_attention(*r.args, softmax_scale=scale, window=r.window, **options, **r.scales)
    like, exact = dense(r, r.dtype, scale, **options), dense(r, torch.float64, scale, **options)
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
@pytest.mark.parametrize("window", [0, 37])
def test_prefill_and_decode_together(window, dtype, device):
    lengths = [40, 7, 70, 150, 1, 0]
    r = Requests([1, 0, 70, 5, 1, 0], lengths, device, dtype, padding=3, page=16, window=window)
    assert not verify(r)[-3:].any(), "padding must be 0"


@pytest.mark.parametrize("page", [1, 8, 32, 64, 96])
def test_prefill_over_pages(page, device):
    verify(Requests([33, 2], [129, page], device, torch.bfloat16, page=page, window=50))


@pytest.mark.parametrize("before", [62, 63, 64, 126, 127, 128])
@pytest.mark.parametrize("queries", [20, 70])
def test_diagonal_through_the_corner_of_a_tile(queries, before, device):
    verify(Requests([queries], [before + queries], device, torch.bfloat16, page=64))


@pytest.mark.parametrize("page", [8, 64])
@pytest.mark.parametrize("queries", [1, 20])
def test_table_without_a_spare_entry(queries, page, device):
    """Nothing behind a full table is read; the interpreter checks every address."""
    verify(Requests([1, queries], [64, 128], device, page=page, spare_pages=0))


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (7, 1), (14, 2), (4, 4), (36, 2), (71, 1)])
@pytest.mark.parametrize("queries", [1, 6])
def test_groups(queries, heads, kv_heads, device):
    r = Requests([queries, queries], [50, 7], device, heads=heads, kv_heads=kv_heads)
    verify(r)
    verify(Requests([queries, 0], [50, 7], device, torch.bfloat16, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("d, dv", [(16, 64), (24, 16), (80, 80), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(d, dv, dtype, device):
    verify(Requests([1, 1], [40, 9], device, dtype, d=d, dv=dv))
    verify(Requests([20, 1], [40, 9], device, dtype, d=d, dv=dv, padding=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 18])
def test_options(queries, dtype, device):
    r = Requests([queries, 1], [60, 35], device, dtype, window=21, heads=6)
    sinks = torch.tensor([-2.0, 9.0, 0.5, 3.0, -torch.inf, 1.0], device=device).to(dtype)
    verify(r, scale=0.7, softcap=3.0, sinks=sinks)
    verify(r, scale=1.0, sinks=sinks)


def split(queries, lengths, capacity, device, dtype=torch.bfloat16, **options):
    """Requests in a table with room for `capacity` tokens, where keys are split over programs."""
    return Requests(queries, lengths, device, dtype, page=64, spare_pages=capacity // 64, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_split_keys(queries, dtype, device):
    options = {"kv_heads": 1, "window": 600}  # few programs, which the interpreter's 8 SMs share
    r = split([queries, 0, 1], [700, 0, 65], 4096, device, dtype, padding=2, **options)
    verify(r, softcap=5.0, sinks=torch.randn(4, device=device))
    verify(split([queries], [700], 4096, device, dtype, padding=1))
    verify(split([queries], [700], 4096, device, dtype, kv_heads=1))  # fewer than there could be


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 18])
def test_codes(queries, dtype, codes, device):
    chunk = min(queries, 9)  # a few more rows than a tile of decode rows has
    r = Requests([queries, chunk, 1, 0], [130, 35, 21, 0], device, dtype, page=16, d=40, dv=24,
                 codes=codes, padding=2)  # fmt: skip
    assert not verify(r)[-2:].any(), "padding must be 0"
    r = Requests(
        [queries, 1], [60, 35], device, dtype, d=16, dv=48, heads=6, window=21, codes=codes
    )
    verify(r, scale=0.7, softcap=3.0, sinks=torch.randn(6, device=device))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("queries", [1, 70])
def test_codes_over_pages_and_split(queries, codes, device):
    verify(split([queries, 1], [700, 65], 4096, device, codes=codes, d=64, dv=64))
    verify(Requests([queries], [200], device, torch.bfloat16, page=8, codes=codes))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("sm", [75, 80, 89, 100])
def test_codes_on_other_gpus(sm, codes, device):
    if device == "cuda":
        pytest.skip("needs the interpreter of a machine without a GPU, to stand for another one")
    with interpret(sm=sm):
        dtype = torch.float16 if sm == 75 else torch.bfloat16
        verify(Requests([1, 2], [130, 35], dtype=dtype, codes=codes, padding=1))
        verify(Requests([20, 1], [130, 35], dtype=dtype, codes=codes, padding=1))


@pytest.mark.parametrize("power", [-60, 60])
def test_codes_meet_bfloat16_rows_of_any_size(power, device):
    """Rows go to float16, each by a power of 2 of its own; one of them is zero."""
    r = Requests([4], [90], device, torch.bfloat16, codes=torch.int8)
    sizes = torch.tensor([0.0, 2.0**power, -(2.0**-power), 1.0], device=device)
    r.q = r.q * sizes.to(torch.bfloat16)[:, None, None]
    exact = dense(r, torch.float64, 1e-3)
    check(paged_attention(*r.args, softmax_scale=1e-3, **r.scales), dense(r, r.dtype, 1e-3), exact)


def test_codes_without_scales(device):
    r = Requests([1, 3], [30, 9], device, torch.bfloat16, codes=torch.float8_e4m3fn)
    ones = {name: torch.ones_like(scale) for name, scale in r.scales.items()}
    assert torch.equal(paged_attention(*r.args), paged_attention(*r.args, **ones))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_deterministic(dtype, device):
    r = Requests([1, 17], [70, 140], device, dtype, page=16, codes=torch.int8, spare_pages=40)
    together = paged_attention(*r.args, deterministic=True, **r.scales)
    for s in range(2):
        part = alone(r, s, 3, deterministic=True, **r.scales)
        assert torch.equal(part, together[r.cu[s] : r.cu[s + 1]])
    check(together, dense(r, dtype), dense(r, torch.float64))


def test_the_kernels_ran_and_not_the_reference(device, monkeypatch):
    grids = record_launches(monkeypatch, module, "_paged_attention_kernel")
    combined = record_launches(monkeypatch, _paged_split, "_combine_kernel")
    verify(split([1, 1], [300, 40], 4096, device))
    assert grids[0][2] > 1 and combined == [(2, 4)]
    verify(Requests([1, 1], [30, 40], device))
    assert len(grids) == 2 and len(combined) == 1


def test_a_short_sequence_is_not_split(device, monkeypatch):
    """Its one program writes the result, and what there is to combine is never read."""
    made = []
    partials = module.Partials
    monkeypatch.setattr(module, "Partials", lambda *a: made.append(partials(*a)) or made[-1])
    verify(split([1, 1, 1], [256, 257, 1000], 4096, device))
    used = made[0].used.cpu()
    assert used[0].unique().tolist() == [1] and used[1].unique().tolist() == [2]
    assert 1 < used[2, 0] <= 4
    unwritten = made[0].lse[0]
    assert unwritten.isnan().all() or unwritten.is_cuda


@pytest.mark.parametrize("capacity", [64, 4096])
@pytest.mark.parametrize("queries", [1, 4])
def test_rows_that_see_nothing_are_zero(queries, capacity, device):
    r = split([queries] * 3, [0, 2, 0], capacity, device, torch.float32, padding=2)
    r.lengths = [2, 2, 2]  # the sequence that has tokens, as the oracle sees it
    out = paged_attention(*r.args, sinks=torch.ones(4, device=device))
    shown = out.abs().amax((1, 2)) > 0
    start = queries + max(queries - 2, 0)  # queries before the first token see nothing either
    want = torch.zeros_like(shown)
    want[start : 2 * queries] = True
    assert torch.equal(shown, want)


@pytest.mark.parametrize("tokens", [1, 5])
def test_no_sequence(tokens, device):
    r = Requests([], [], device, padding=tokens)
    assert not paged_attention(*r.args).any()
    q, *rest = r.args
    assert not paged_attention(q, *rest[:-1], 1).any()
    assert paged_attention(q[:0], *rest).shape == (0, 4, 16)


def test_large_scores_do_not_overflow(device):
    r = Requests([5, 1], [40, 90], device, torch.float16)
    r.q = r.q * 200
    for x in (*r.k, r.caches[0]):
        x *= 20
    out = paged_attention(*r.args, softmax_scale=0.01)
    # the weights are rounded before they are normalized, here to a larger number than after
    check(out, dense(r, r.dtype, 0.01), dense(r, torch.float32, 0.01), factor=4.0)


@pytest.mark.parametrize("queries", [1, 30])
def test_a_batch_gives_what_its_requests_give_alone(queries, device):
    r = Requests([queries, 40, 1], [77, 40, 200], device)
    q, k, v, table, lens, _, longest = r.args
    together = paged_attention(*r.args)
    for s, n in enumerate(r.queries):
        rows = slice(r.cu[s], r.cu[s + 1])
        cu = torch.tensor([0, n], dtype=torch.int32, device=device)
        one = (q[rows], k, v, table[s : s + 1], lens[s : s + 1], cu)
        torch.testing.assert_close(paged_attention(*one, n), together[rows])
        torch.testing.assert_close(paged_attention(*one, longest), together[rows])


def alone(r, s, chunk, **options):
    """What sequence `s` gives without the others, in chunks of so many queries and some padding."""
    q, k, v, table, lens, _, _ = r.args
    parts, end = [], r.cu[s] + r.queries[s]
    for start in range(r.cu[s], end, chunk):
        n = min(chunk, end - start)
        cu = torch.tensor([0, 0, n], dtype=torch.int32, device=r.device)
        length = lens[[s, s]] - (end - start - n)
        padded = torch.cat([q[start : start + n], q[:2]])
        y = paged_attention(padded, k, v, table[[s, s]], length, cu, n, **options)
        parts.append(y[:n])
    return torch.cat(parts)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 37])
def test_deterministic(window, dtype, reference, device, monkeypatch):
    """Bit for bit the same alone, in chunks of any size and in any batch, split or not."""
    combined = record_launches(monkeypatch, _paged_split, "_combine_kernel")
    options = {"window": window, "softcap": 5.0, "deterministic": True}
    with kernels_off() if reference else nullcontext():
        r = Requests([1, 17, 1, 0, 1], [70, 140, 9, 5, 129], device, dtype, page=16, window=window,
                     padding=2, spare_pages=40)  # fmt: skip
        options["sinks"] = torch.randn(4, device=device)
        together = paged_attention(*r.args, **options)
        for s, queries in enumerate(r.queries):
            for chunk in sorted({1, 3, 7, queries}) if queries else ():
                part = alone(r, s, chunk, **options)
                assert torch.equal(part, together[r.cu[s] : r.cu[s + 1]]), f"{s}, {chunk}"
    like, exact = (dense(r, t, softcap=5.0, sinks=options["sinks"]) for t in (dtype, torch.float64))
    check(together, like, exact)
    assert not combined


def test_caches_of_different_layout(device):
    """K a slice of a pool of both, V its own: page strides differ, pages are contiguous."""
    r = Requests([1, 12], [50, 33], device)
    pool = torch.stack([r.caches[0], torch.full_like(r.caches[0], torch.nan)], 1)
    r.caches[0] = pool[:, 0]
    verify(r)


@contextmanager
def kernels_off():
    """Ops on CPU tensors run their references, inside of an interpreter too."""
    token = _op._PRETENDED.set(None)
    yield
    _op._PRETENDED.reset(token)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_turing(dtype, device):
    if device == "cuda":
        pytest.skip("needs the interpreter of a machine without a GPU, to stand for sm_75")
    with interpret(sm=75):
        for options in ({}, {"softcap": 4.0, "sinks": torch.randn(4)}):
            verify(Requests([1, 3], [70, 20], dtype=dtype, padding=1), **options)
            verify(Requests([70, 0, 1], [90, 20, 64], dtype=dtype, padding=1), **options)
        prefill = Requests([70, 0, 1], [90, 20, 64], dtype=dtype, window=20)
        verify(prefill)
        assert module._backend(*prefill.args) == "torch"
        assert module._backend(*prefill.args, deterministic=True) == "triton"
        assert module._backend(*Requests([1], [9]).args) == "triton"
    assert module._backend(*prefill.args) == "triton"


def test_split_count():
    assert split_count(8, 511, 132) == 1
    assert split_count(1024, 8192, 132) == 1  # many sequences fill the GPU
    assert split_count(8, 131072, 132) == 16  # one sequence fills it, too
    assert split_count(8, 256, 132) == 1  # too few keys to share
    assert split_count(128, 4096, 132) == 1
    assert split_count(96, 4096, 132) == 2  # a quarter of it idle is too much
    assert split_count(40, 600, 132) == 2


def test_configs_have_no_more_rows_than_needed():
    assert default_config(90, torch.bfloat16, 128, 4).block_m == 16
    assert default_config(90, torch.bfloat16, 128, 4096).block_m == 128
    assert not default_config(75, torch.float16, 128, 4).dot


def test_registration(device):
    r = Requests([3, 1], [20, 5], device, padding=1)
    options = (0.25, 4, 2.0, torch.ones(4, device=device))
    torch.library.opcheck(torch.ops.tlk.paged_attention.default, (*r.args, *options))
    run = torch.compile(
        lambda *a: paged_attention(*a, 3, window=4) + 1, fullgraph=True, backend="aot_eager"
    )
    want = paged_attention_reference(*r.args, 0.25, 4) + 1
    torch.testing.assert_close(run(*r.args[:-1]), want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.ones(4, 4)}, ValueError, r"q must have shape \(any, any, any\), got \(4, 4\)"),
        (
            {0: torch.ones(4, 3, 16)},
            ValueError,
            "q must have a multiple of k_cache's 2 heads, got 3",
        ),
        ({0: torch.ones(4, 4, 16).double()}, TypeError, "q must be float32 or .*, got float64"),
        ({1: torch.ones(6, 2, 0, 16), 2: torch.ones(6, 2, 0, 16)}, ValueError, "at least 1 token"),
        ({2: torch.ones(6, 2, 8, 257)}, ValueError, "v_cache must have a head dim .* got 257"),
        ({1: torch.ones(3, 2, 8, 12)}, ValueError, "k_cache must have shape .*16"),
        (
            {1: torch.ones(6, 2, 8, 16).half()},
            TypeError,
            "k_cache must be float32 or .*, got float16",
        ),
        ({2: torch.ones(6, 8, 2, 16).transpose(1, 2)}, ValueError, "v_cache must have contiguous"),
        ({3: torch.zeros(2, 5)}, TypeError, "page_table must be int32, got float32"),
        ({4: torch.zeros(3, dtype=torch.int32)}, ValueError, r"seq_lens must have shape \(2\)"),
        ({5: torch.zeros(2, dtype=torch.int32)}, ValueError, r"cu_seqlens_q must have shape \(3\)"),
        ({6: -1}, ValueError, "max_q must be at least 0, got -1"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"softcap": -2.0}, ValueError, "softcap must be at least 0, got -2.0"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be above 0, got 0.0"),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks must have shape \(4\)"),
        (
            {2: torch.ones(6, 2, 8, 16).to(torch.int8)},
            TypeError,
            "v_cache must be float32, got int8",
        ),
        ({"k_scale": torch.ones(2)}, ValueError, "v_scale must not be None"),
        (
            {"k_scale": torch.ones(2), "v_scale": torch.ones(2)},
            ValueError,
            "k_scale must be None for a cache of torch.float32",
        ),
        (
            {i: torch.ones(6, 2, 8, 15).to(torch.int8) for i in (1, 2)} | {0: torch.ones(4, 4, 15)},
            ValueError,
            "k_cache must have an even head dim to hold codes, got 15",
        ),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    args = list(Requests([3, 1], [20, 5], spare_pages=2).args)
    args[1:3] = [torch.zeros(6, 2, 8, 16)] * 2
    options = {k: x for k, x in change.items() if isinstance(k, str)}
    for i, x in change.items():
        if isinstance(i, int):
            args[i] = x
    with pytest.raises(error, match=message):
        paged_attention(*args, **options)
