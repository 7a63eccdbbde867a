from itertools import pairwise

import pytest
import torch

from tests.bench.kernel_peers.test_flashinfer_peers import agrees, attend
from tlk.bench.cases.flash_attention import Attention
from tlk.bench.cases.norm import _rms, _rms_case
from tlk.bench.kernel_peers import torch_peers
from tlk.errors import UnsupportedError


@pytest.fixture(autouse=True)
def any_backend(monkeypatch):
    """A CPU has flash attention only."""
    from torch.nn.attention import SDPBackend

    real = torch_peers.sdpa_kernel
    asked = []
    monkeypatch.setattr(
        torch_peers, "sdpa_kernel", lambda b: asked.append(b) or real(SDPBackend.MATH)
    )
    return asked


@pytest.mark.parametrize("peer", torch_peers.FLASH_ATTENTION, ids=lambda p: p.name)
@pytest.mark.parametrize(
    "attention",
    [
        Attention("causal", (20, 20), 4, 2, d=16, causal=True),
        Attention("full", (20,), 4, 4, d=16),
        Attention("keys", (7,), 4, 2, d=16, keys=20),
    ],
    ids=lambda a: a.name,
)
def test_attention(any_backend, peer, attention):
    agrees(peer, attention.case())
    assert [b.name for b in any_backend] == [
        peer.name.removeprefix("torch ").upper() + "_ATTENTION"
    ]


def test_packed_sequences(monkeypatch):
    """The op of a GPU, with a fake of it that takes what its schema says."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug):
        assert (max_q, max_k, dropout, debug) == (20, 20, 0.0, False) and cu_q is cu_k
        parts = [
            attend(q[a:b], k[a:b], v[a:b], causal) for a, b in pairwise(cu_q.tolist())
        ]  # fmt: skip
        return torch.cat(parts), None, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    flash, cudnn = torch_peers.FLASH_ATTENTION
    for causal in (True, False):
        case = Attention("x", (9, 20, 1), 4, 2, d=16, causal=causal, varlen=True).case()
        agrees(flash, case)
    with pytest.raises(UnsupportedError, match="sequences of one length"):
        agrees(cudnn, case)


@pytest.mark.parametrize(
    "field", [{"window": 4}, {"softcap": 2.0}, {"sinks": True}, {"eight_bit": True}]
)
def test_attention_that_it_has_not(field):
    with pytest.raises(UnsupportedError, match="16 bits without window"):
        agrees(
            torch_peers.FLASH_ATTENTION[0],
            Attention("x", (8,), 2, 2, d=16, causal=True, **field).case(),
        )


def test_inductor_compiles_once_for_all_copies(monkeypatch):
    compiled = []

    def compile(run, *, dynamic, fullgraph):
        assert not dynamic and fullgraph
        compiled.append(run)
        return run

    monkeypatch.setattr(torch, "compile", compile)
    peer = torch_peers.inductor(_rms)
    for _ in range(2):
        agrees(peer, _rms_case(3, 32))
    assert compiled == [_rms] and peer.compared and not torch_peers.inductor(_rms, False).compared
