import pytest
import torch

from tlk.quant.observe import Inputs


def watched(x, parts, **options):
    seen = Inputs(x.shape[-1], len(x), "cpu", **options)
    for part in x.split(parts):
        seen.add(part)
    return seen


@pytest.mark.parametrize("parts", [3, 10, 50])
def test_statistics_of_all_parts(parts):
    x = torch.randn(50, 6)
    seen = watched(x, parts, hessian=True)
    assert torch.allclose(seen.mean_abs, x.abs().mean(0))
    assert torch.allclose(seen.mean_square, x.square().mean(0))
    assert torch.equal(seen.amax, x.abs().amax(0))
    assert torch.allclose(seen.hessian.matrix, x.T @ x, atol=1e-5)
    assert torch.equal(seen.rows, x) and seen.seen == 50


@pytest.mark.parametrize("parts", [3, 7, 50])
def test_rows_are_spread_evenly(parts):
    x = torch.arange(50.0)[:, None]
    assert watched(x, parts, keep=10).rows.flatten().tolist() == list(range(0, 50, 5))
    assert watched(x, parts, keep=20).rows.flatten().tolist() == list(range(0, 50, 3))


def test_dividing_is_as_if_the_inputs_had_been_divided():
    x, scale = torch.randn(40, 5), torch.rand(5) + 0.5
    seen, wanted = watched(x, 8, hessian=True), watched(x / scale, 8, hessian=True)
    seen.divide(scale)
    for name in ("mean_abs", "mean_square", "amax", "rows"):
        assert torch.allclose(getattr(seen, name), getattr(wanted, name)), name
    assert torch.allclose(seen.hessian.matrix, wanted.hessian.matrix, atol=1e-5)


def test_nothing_seen():
    seen = Inputs(4, 0, "cpu")
    assert seen.rows.shape == (0, 4) and not seen.mean_abs.any() and seen.hessian is None
    seen.add(torch.zeros(2, 0, 4))
    assert seen.seen == 0
