"""The glue to FlashInfer, on a CPU, with fakes that compute what its documentation says."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.bench.kernel_peers.packages import install
from tlk.bench.case import Inputs
from tlk.bench.cases.activation import _gelu_case, _silu_case
from tlk.bench.cases.flash_attention import Attention
from tlk.bench.cases.norm import _add_case, _heads_case, _rms_case
from tlk.bench.cases.paged_attention import Step
from tlk.bench.cases.sampling import _sample_case
from tlk.bench.kernel_peers import flashinfer_peers as peers
from tlk.bench.kernels import difference, seeded, tensors
from tlk.errors import UnsupportedError

NEW = Inputs("cpu", torch.float32)


def attend(q, k, v, causal, window_left=-1, logits_soft_cap=None):
    """q [M, H, D], k and v [N, Hk, D], as FlashInfer defines them."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1])
    if logits_soft_cap:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    m, n = scores.shape[1:]
    ahead = torch.arange(n)[None, :] - (torch.arange(m)[:, None] + n - m)
    if causal:
        scores = scores.masked_fill(ahead > 0, -torch.inf)
    if window_left >= 0:
        scores = scores.masked_fill(ahead < -window_left, -torch.inf)
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v)


def single_prefill(q, k, v, *, causal, window_left, logits_soft_cap, backend, o_dtype):
    assert backend in ("fa2", "fa3") and o_dtype == q.dtype
    return attend(q, k, v, causal, window_left, logits_soft_cap)


class Ragged:
    """Its wrapper of sequences one after another, [T, H, D]."""

    def __init__(self, workspace, kv_layout, backend):
        assert kv_layout == "NHD" and backend in ("fa2", "fa3")

    def plan(
        self, cu_q, cu_k, heads, kv_heads, d, d_v, *, causal, window_left, logits_soft_cap, q_data_type,
        kv_data_type,
    ):  # fmt: skip
        assert q_data_type == kv_data_type == torch.float32 and cu_q.dtype == torch.int32
        self.cu = cu_q, cu_k
        self.sizes = (heads, d), (kv_heads, d), (kv_heads, d_v)
        self.options = causal, window_left, logits_soft_cap

    def run(self, q, k, v):
        assert tuple(x.shape[1:] for x in (q, k, v)) == self.sizes
        bounds = [list(pairwise(x.tolist())) for x in self.cu]
        return torch.cat([
            attend(q[a:b], k[c:d], v[c:d], *self.options)
            for (a, b), (c, d) in zip(*bounds, strict=True)
        ])  # fmt: skip


class Wrapper:
    """Both of its wrappers of paged caches, [P, Hk, page, D]."""

    def __init__(self, workspace, kv_layout, **options):
        assert kv_layout == "HND" and workspace.dtype == torch.uint8
        self.decode = options.get("use_cuda_graph", False)
        if self.decode:
            assert options["use_tensor_cores"] and len(options["paged_kv_indptr_buffer"]) > 1

    def plan(self, *arrays, q_data_type, kv_data_type, window_left, logits_soft_cap, causal=False):
        assert q_data_type == torch.float32
        self.kv_data_type = kv_data_type
        if self.decode:
            arrays = (None, *arrays)
        self.cu, self.indptr, self.indices, self.last, *self.sizes = arrays
        assert all(x.dtype == torch.int32 for x in (self.indptr, self.indices, self.last))
        self.options = (window_left, logits_soft_cap)
        self.causal = causal or self.decode

    def run(self, q, caches, k_scale=1.0, v_scale=1.0):
        k, v = caches
        assert k.dtype == v.dtype == self.kv_data_type
        k, v = k.float() * k_scale, v.float() * v_scale
        heads, kv_heads, d, page = self.sizes
        assert (heads, d) == q.shape[1:] and (kv_heads, page) == k.shape[1:3]
        outputs = []
        for s in range(len(self.last)):
            pages = self.indices[self.indptr[s] : self.indptr[s + 1]].long()
            tokens = (len(pages) - 1) * page + int(self.last[s])
            mine = q[s : s + 1] if self.cu is None else q[self.cu[s] : self.cu[s + 1]]
            rows = [x[pages].transpose(1, 2).flatten(0, 1)[:tokens] for x in (k, v)]
            outputs.append(attend(mine, *rows, self.causal, *self.options))
        return torch.cat(outputs)


def rmsnorm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def fused_add_rmsnorm(x, residual, weight, eps):
    residual.add_(x)
    x.copy_(rmsnorm(residual, weight, eps))


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch):
    def gated(activation):
        def run(x):
            gate, up = x.chunk(2, -1)
            return activation(gate) * up

        return run

    calls = []

    def drawing(name):
        def run(*args, seed, offset):
            assert seed.shape == offset.shape == (1,) and seed.dtype == torch.int64
            calls.append((name, args))
            return args[0].argmax(-1)

        return run

    names = (
        *("top_k_top_p_sampling_from_logits", "top_k_top_p_sampling_from_probs"),
        *("top_p_sampling_from_probs", "sampling_from_logits", "sampling_from_probs"),
    )
    sampling = SimpleNamespace(softmax=lambda x: x.softmax(-1), **{n: drawing(n) for n in names})
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 64)
    install(
        monkeypatch, "flashinfer", single_prefill_with_kv_cache=single_prefill, rmsnorm=rmsnorm,
        BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
        fused_add_rmsnorm=fused_add_rmsnorm, sampling=sampling, silu_and_mul=gated(F.silu),
        gelu_and_mul=gated(F.gelu), gelu_tanh_and_mul=gated(lambda x: F.gelu(x, approximate="tanh")),
    )  # fmt: skip
    return calls


def agrees(peer, case):
    """The peer gives what the reference gives, both of fresh inputs."""
    result = tensors(peer.prepare(case, seeded(case, NEW, 0))())
    expected = tensors(case.reference(*seeded(case, NEW, 0)))
    assert len(result) == len(expected) > 0
    for a, e in zip(result, expected, strict=True):
        assert difference(a.reshape(e.shape), e) < 1e-5


ATTENTION = (
    Attention("causal", (20,), 4, 2, d=16, causal=True),
    Attention("full", (20,), 4, 4, d=16),
    Attention("window", (20,), 4, 2, d=16, causal=True, window=5),
    Attention("capped", (20,), 4, 2, d=16, causal=True, softcap=3.0),
    Attention("more keys", (7,), 4, 2, d=16, keys=20),
    Attention("packed", (20, 9, 1), 4, 2, d=16, causal=True, varlen=True),
    Attention("packed, wide", (9, 20), 4, 2, d=24, dv=16, varlen=True),
    Attention(
        "packed window", (20, 9), 4, 2, d=16, causal=True, varlen=True, window=4, softcap=2.0
    ),
)


@pytest.mark.parametrize("attention", ATTENTION, ids=lambda a: a.name)
@pytest.mark.parametrize("peer", peers.FLASH_ATTENTION, ids=lambda p: p.name)
def test_attention(peer, attention):
    agrees(peer, attention.case())


@pytest.mark.parametrize(
    "attention",
    [
        Attention("batch", (20, 20), 4, 2, d=16),
        Attention("sinks", (20,), 4, 2, d=16, causal=True, sinks=True),
        Attention("packed sinks", (20, 9), 4, 2, d=16, varlen=True, sinks=True),
        Attention("packed fp8", (20, 9), 4, 2, d=16, varlen=True, eight_bit=True),
    ],
    ids=lambda a: a.name,
)
def test_attention_that_it_has_not(attention):
    with pytest.raises(UnsupportedError, match="and no sinks"):
        agrees(peers.FLASH_ATTENTION[0], attention.case())


DECODE = (
    Step("one", (1,), 40, 4, 2, 16),
    Step("many", (1,) * 3, 32, 4, 2, 16),
    Step("page 8", (1,) * 3, 33, 4, 1, 16, page=8),
    Step("window", (1,) * 2, 40, 4, 2, 16, window=9),
    Step("capped", (1,) * 2, 40, 4, 2, 16, softcap=2.0),
    Step("fp8", (1,) * 2, 40, 4, 2, 16, codes=torch.float8_e4m3fn),
)


@pytest.mark.parametrize("step", DECODE, ids=lambda s: s.name)
def test_decode(step):
    agrees(peers.DECODE, step.case())


@pytest.mark.parametrize(
    "step",
    [
        Step("prefill", (20,), 20, 4, 2, 16),
        Step("chunks", (5, 5), 40, 4, 2, 16, window=9),
        Step("mixed", (9, 1, 1), 40, 4, 2, 16, page=8),
    ],
    ids=lambda s: s.name,
)
def test_paged_prefill(step):
    agrees(peers.PAGED_PREFILL, step.case())


def test_paged_attention_that_it_has_not():
    for peer, step in (
        (peers.DECODE, Step("sinks", (1,), 40, 4, 2, 16, sinks=True)),
        (peers.DECODE, Step("int8", (1,), 40, 4, 2, 16, codes=torch.int8)),
        (peers.DECODE, Step("queries", (2,), 40, 4, 2, 16)),
        (peers.PAGED_PREFILL, Step("sinks", (9,), 40, 4, 2, 16, sinks=True)),
    ):
        with pytest.raises(UnsupportedError, match="no sinks"):
            agrees(peer, step.case())


def test_norms_and_activations():
    agrees(peers.RMS_NORM, _rms_case(3, 32))
    agrees(peers.RMS_NORM, _heads_case(3, 2, 16, 64))
    agrees(peers.ADD_RMS_NORM, _add_case(3, 32))
    agrees(peers.SILU_AND_MUL, _silu_case(3, 16))
    for approximate in ("none", "tanh"):
        agrees(peers.GELU_AND_MUL, _gelu_case(3, 16, approximate))


@pytest.mark.parametrize(
    ("setting", "from_logits", "from_probs"),
    [
        ("k50-p0.9", "top_k_top_p_sampling_from_logits", "top_k_top_p_sampling_from_probs"),
        ("p0.9", "top_p_sampling_from_probs", "top_p_sampling_from_probs"),
        ("plain", "sampling_from_logits", "sampling_from_probs"),
    ],
)
def test_sampling(flashinfer, setting, from_logits, from_probs):
    case = _sample_case(2, 100, setting)
    inputs = seeded(case, Inputs("cpu", torch.bfloat16), 0)
    for peer in peers.SAMPLE:
        assert not peer.compared
        peer.prepare(case, inputs)()
    (first, logits), (second, probs) = flashinfer
    assert (first, second) == (from_logits, from_probs)
    assert probs[0].dtype == logits[0].dtype == torch.float32
    assert torch.allclose(probs[0].sum(-1), torch.ones(2))
    assert torch.allclose(logits[0].softmax(-1) if "logits" in first else logits[0], probs[0])
    assert len(probs) == {"k50-p0.9": 3, "p0.9": 2, "plain": 1}[setting]


@pytest.mark.parametrize("setting", ["greedy", "min-p0.05"])
def test_sampling_that_it_has_not(setting):
    case = _sample_case(2, 100, setting)
    with pytest.raises(UnsupportedError, match="top-k and top-p only"):
        peers.SAMPLE[0].prepare(case, seeded(case, NEW, 0))
