import pytest
import torch
import torch.nn.functional as F

from tlk.quant.scaling import best
from tlk.quant.smoothquant import ALPHAS, candidates, fake_quantized, smooth_scale


def test_smooth_scale():
    x, w = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    assert torch.allclose(smooth_scale(x, w, 0.5), torch.tensor([2.0, 1.5, 1.0]))
    assert torch.allclose(smooth_scale(x, w, 1.0)[:2], x[:2])
    assert smooth_scale(x, torch.zeros(3), 0.5).isfinite().all()


def test_candidates_begin_with_the_identity():
    x, w = torch.rand(5) + 1, torch.rand(5) + 1
    found = list(candidates(x, w))
    assert [s for s, _ in found] == [None, *ALPHAS]
    assert torch.equal(found[0][1], torch.ones(5))
    assert torch.equal(found[1][1], smooth_scale(x, w, 0.5))


def test_smoothing_helps_with_outliers():
    """Without it, inputs 60 times larger take all the precision of their rows."""
    torch.manual_seed(0)
    x, w = torch.randn(200, 64), torch.randn(32, 64)
    x[:, :2] *= 60
    exact = F.linear(x, w)

    def loss(scale):
        values = fake_quantized(w * scale, 127.0, 1.0)
        return float((F.linear(fake_quantized(x / scale, 127.0, 1.0), values) - exact).norm())

    choice = best(candidates(x.abs().amax(0), w.abs().amax(0)), loss)
    assert choice.setting in ALPHAS and choice.loss < 0.5 * choice.unscaled


@pytest.mark.parametrize(("largest", "step"), [(127.0, 1.0), (448.0, None)])
def test_fake_quantized(largest, step):
    x = torch.randn(5, 100) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0])[:, None]
    y = fake_quantized(x, largest, step)
    assert torch.equal(y[3], x[3])
    assert torch.allclose(y.abs().amax(1), x.abs().amax(1))
    error = (y - x).norm(dim=1)[[0, 1, 2, 4]] / x.norm(dim=1)[[0, 1, 2, 4]]
    assert (error > 1e-3).all() and (error < (0.02 if step else 0.04)).all()
    if step:
        units = y[1] / (x[1].abs().max() / 127)
        assert torch.allclose(units, units.round(), atol=1e-4)
