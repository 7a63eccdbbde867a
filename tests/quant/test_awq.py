import pytest
import torch
import torch.nn.functional as F

from tlk.quant import awq
from tlk.quant.int4 import Int4


def inputs(tokens=300, k=128, seed=0):
    """Inputs a few of whose columns are much larger than the others."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k, generator=g) * (0.2 + 5 * torch.rand(k, generator=g) ** 8)


def test_weight_mean_is_relative_to_the_group():
    w = torch.tensor([[1.0, -4.0, 10.0, 5.0], [2.0, 2.0, 0.0, 1.0]])
    assert torch.allclose(
        awq.weight_mean(w, 2), torch.tensor([(1 / 4 + 1) / 2, 1.0, 0.5, (0.5 + 1) / 2]), atol=1e-5
    )
    whole = awq.weight_mean(w, None)
    assert torch.allclose(whole, torch.tensor([(0.1 + 1) / 2, (0.4 + 1) / 2, 0.5, 0.5]), atol=1e-5)


def test_candidates():
    x, w = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.5, 0.5, 0.25])
    found = list(awq.candidates(x, w))
    assert [s for s, _ in found] == [None, *(i / 20 for i in range(20))]
    assert torch.equal(found[0][1], torch.ones(3))
    for ratio, scale in found[2:]:
        assert scale.isfinite().all() and scale.min() > 0
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
        raw = x**ratio / (w ** (1 - ratio) + 1e-4)
        assert float(scale[2] / scale[1]) == pytest.approx(float(raw[2] / raw[1]), rel=1e-4)


@pytest.mark.parametrize("format", [Int4(32, symmetric=False), Int4(None), Int4(64)])
def test_clipping_lowers_the_error_of_every_row_and_group(format, monkeypatch):
    monkeypatch.setattr(awq, "ROWS", 7)
    x, w = inputs(), torch.randn(17, 128) * (1 + 8 * (torch.rand(17, 128) > 0.99))
    clipped = awq.clipped(w, x, format, torch.float32)
    groups = format.quantize(w)["scale"].shape[1]

    def errors(weight):
        off = (format.dequantize(format.quantize(weight)) - w).unflatten(1, (groups, -1))
        return torch.einsum("tgk,ngk->tng", x.unflatten(1, (groups, -1)), off).square().sum(0)

    before, after = errors(w), errors(clipped)
    assert (after <= before * 1.0001).all() and after.sum() < 0.9 * before.sum()
    changed = clipped != w
    assert changed.any() and (clipped.abs()[changed] < w.abs()[changed]).all()
    limit = w.unflatten(1, (groups, -1)).abs().amax(-1)
    assert (clipped.unflatten(1, (groups, -1)).abs().amax(-1) >= 0.5499 * limit).all()


def test_what_matters_little_is_clipped_more():
    """The largest weight of a group meets an input that is nearly always 0."""
    w, x = torch.randn(4, 32), torch.randn(200, 32)
    w[:, 5], x[:, 5] = 9.0, 1e-4
    clipped = awq.clipped(w, x, Int4(32), torch.float32)
    assert torch.allclose(clipped[:, 5], torch.tensor(9.0 * 0.55))
    x[:, 5] = 50.0
    assert (awq.clipped(w, x, Int4(32), torch.float32)[:, 5] > 8.5).all()


def test_scaling_helps_where_inputs_differ():
    x, w = inputs(), torch.randn(24, 128)
    format, exact = Int4(64), F.linear(x, w)

    def loss(scale):
        values = format.dequantize(format.quantize(w * scale)) / scale
        return float((F.linear(x, values) - exact).square().sum())

    found = {s: loss(scale) for s, scale in awq.candidates(x.abs().mean(0), awq.weight_mean(w, 64))}
    assert min(found.values()) < 0.7 * found[None]
