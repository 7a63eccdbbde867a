import pytest
import torch

from tlk.quant.scaling import NotFinite, best


def scales(*settings):
    return [(s, torch.full((3,), float(s or 1))) for s in settings]


def test_the_least_loss_wins():
    choice = best(scales(None, 2, 3, 4), lambda s: abs(float(s[0]) - 2.9))
    assert choice.setting == 3 and choice.scale.tolist() == [3, 3, 3]
    assert choice.loss == pytest.approx(0.1) and choice.unscaled == pytest.approx(1.9)


def test_the_identity_wins_among_equals():
    assert best(scales(None, 2, 3), lambda s: 5.0).setting is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_chosen(value):
    assert best(scales(None, 2), lambda s: value if s[0] == 2 else 7.0).setting is None
    with pytest.raises(NotFinite, match=f"the loss is {value} where nothing is scaled"):
        best(scales(None, 2), lambda s: value)


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="candidates must hold at least the identity"):
        best([], lambda s: 0.0)
