import pytest
import torch

from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp4_search import mx_scales, nv_scales


def weights(n=40, k=128):
    torch.manual_seed(0)
    return torch.randn(n, k) * (0.05 + torch.rand(n, 1))


def mx(w, **options):
    return MXFP4().dequantize(MXFP4().encode(w, mx_scales(w, **options)))


def nv(w, **options):
    return NVFP4().dequantize(NVFP4().encode(w, *nv_scales(w, **options)))


@pytest.mark.parametrize(
    ("search", "format", "group", "gain"), [(mx, MXFP4(), 32, 0.998), (nv, NVFP4(), 16, 0.9)]
)
def test_no_group_gets_worse_and_some_get_better(search, format, group, gain):
    w = weights()

    def errors(values):
        return (values - w).square().unflatten(1, (-1, group)).sum(-1)

    plain, searched = errors(format.dequantize(format.quantize(w))), errors(search(w))
    assert (searched <= plain * 1.0001).all() and searched.sum() < gain * plain.sum()


@pytest.mark.parametrize(("search", "gain"), [(mx, 0.95), (nv, 0.85)])
def test_importance_moves_the_error(search, gain):
    """To where it counts little."""
    w, importance = weights(), torch.full((128,), 1e-4)
    importance[::4] = 1.0
    counted = (search(w) - w).square()[:, ::4].sum()
    assert (search(w, importance=importance) - w).square()[:, ::4].sum() < gain * counted


def test_scales_are_those_of_the_formats():
    w = weights()
    w[3] = 0.0
    scale = mx_scales(w)
    guess = MXFP4().scales(w)
    assert scale.dtype == torch.uint8 and (scale.int() - guess.int()).abs().max() == 1
    small, each = nv_scales(w, global_scale=torch.tensor(0.01))
    assert small.dtype == torch.float8_e4m3fn and (each == 0.01).all() and each.shape == (40, 1)
    assert (small.float() > 0).all() and small.float().isfinite().all()
    assert (nv(w)[3] == 0).all() and (mx(w)[3] == 0).all()
    huge = NVFP4().encode(w * 1e4, *nv_scales(w * 1e4, global_scale=torch.tensor(0.01)))
    assert NVFP4().dequantize(huge).isfinite().all()
