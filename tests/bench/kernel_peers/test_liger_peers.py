"""The glue to Liger, on a CPU, with fakes that compute what its functions do."""

import pytest
import torch
import torch.nn.functional as F

from tests.bench.kernel_peers.packages import install
from tests.bench.kernel_peers.test_flashinfer_peers import agrees
from tlk.bench.case import Inputs
from tlk.bench.cases.activation import _silu_case
from tlk.bench.cases.norm import _add_case, _heads_case, _layer_case, _rms_case
from tlk.bench.cases.rope import _case as rope_case
from tlk.bench.kernel_peers import liger_peers as peers
from tlk.bench.kernels import seeded
from tlk.errors import UnsupportedError


def rms_norm_forward(x, w, eps, offset, casting_mode, row_mode):
    assert x.is_contiguous() and casting_mode == "llama" and not row_mode and offset == 0
    return F.rms_norm(x, w.shape, w, eps), x, None


def fused_add_rms_norm_forward(x, r, w, eps, offset, casting_mode):
    total = x + r
    return F.rms_norm(total, w.shape, w, eps), total, None


def layer_norm_forward(x, w, b, eps):
    return F.layer_norm(x, w.shape, w, b, eps), x


def swiglu_forward(a, b):
    assert a.is_contiguous() and b.is_contiguous()
    return a, b, F.silu(a) * b


def rope_forward(q, k, cos, sin):
    """q and k [B, H, T, D], cos and sin [B, T, D]."""

    def turned(x):
        assert x.transpose(1, 2).is_contiguous()
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return turned(q), turned(k), cos, sin


@pytest.fixture(autouse=True)
def liger(monkeypatch):
    for module, function in (
        ("rms_norm", rms_norm_forward),
        ("fused_add_rms_norm", fused_add_rms_norm_forward),
        ("layer_norm", layer_norm_forward),
        ("swiglu", swiglu_forward),
        ("rope", rope_forward),
    ):
        install(monkeypatch, f"liger_kernel.ops.{module}", **{function.__name__: function})


def test_norms_and_activation():
    agrees(peers.RMS_NORM, _rms_case(3, 32))
    agrees(peers.RMS_NORM, _heads_case(3, 2, 16, 64))
    agrees(peers.ADD_RMS_NORM, _add_case(3, 32))
    agrees(peers.LAYER_NORM, _layer_case(3, 32))
    agrees(peers.SILU_AND_MUL, _silu_case(3, 16))


def test_rotation():
    case, new = rope_case(5, 4, 2, 16, 16), Inputs("cpu", torch.float32)
    q, k = peers.ROPE.prepare(case, seeded(case, new, 0))()
    mine = seeded(case, new, 0)
    case.reference(*mine)
    assert torch.allclose(q[0].transpose(0, 1), mine[0], atol=1e-5)
    slots = mine[8]
    assert torch.allclose(k[0].transpose(0, 1), mine[6][slots // 16, :, slots % 16], atol=1e-5)


def test_rotation_that_it_has_not():
    case = rope_case(5, 4, 2, 16, 16, norm=True)
    with pytest.raises(UnsupportedError, match="no norms"):
        peers.ROPE.prepare(case, seeded(case, Inputs("cpu", torch.float32), 0))
