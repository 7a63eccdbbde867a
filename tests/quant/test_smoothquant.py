import torch
import torch.nn.functional as F

from tlk.quant.ranges import rounded
from tlk.quant.scaling import best
from tlk.quant.smoothquant import ALPHAS, candidates, smooth_scale


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
        values = rounded(w * scale, torch.int8)
        return float((F.linear(rounded(x / scale, torch.int8), values) - exact).norm())

    choice = best(candidates(x.abs().amax(0), w.abs().amax(0)), loss)
    assert choice.setting in ALPHAS and choice.loss < 0.5 * choice.unscaled
