"""Scales that move between a weight and what comes before it: x · Wᵀ = (x / s) · (W · s)ᵀ.

AWQ and SmoothQuant differ in which scales they propose and in what they call an error; both try a
handful and keep the best. The identity is always among them, so that scaling never makes it worse.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


class NotFinite(ArithmeticError):
    """The layer's outputs are not finite, even where nothing is scaled."""


Candidate = tuple[float | None, Tensor]
"""(what a scale was made with, scale float32 [K]); None: the identity."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The scale [K] with the least loss. setting: what it was made with, None is the identity.

    unscaled: the loss of the identity.
    """

    scale: Tensor
    setting: float | None
    loss: float
    unscaled: float


def best(candidates: Iterable[Candidate], loss: Callable[[Tensor], float]) -> Choice:
    """The candidate of least `loss`; the first, which must be the identity, among equals.

    A candidate whose loss is not finite is never chosen. Raises NotFinite if that of the identity is not.
    """
    choice: Choice | None = None
    for setting, scale in candidates:
        value = loss(scale)
        if choice is None:
            if value != value or value == float("inf"):
                raise NotFinite(f"the loss is {value} where nothing is scaled")
            choice = Choice(scale, setting, value, value)
        elif value < choice.loss:
            choice = Choice(scale, setting, value, choice.unscaled)
    if choice is None:
        raise ValueError("candidates must hold at least the identity, got none")
    return choice
