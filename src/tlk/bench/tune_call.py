"""What the tuner must know of an op to call it at one of its keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.bench.case import Inputs
from tlk.bench.tune_keys import Key, Projection
from tlk.kernels.tuning import Config

EPS = 1e-5
"""Of every norm."""


@dataclass(frozen=True, slots=True)
class Call:
    """`run(*inputs(Inputs(...)))` executes the op once, `reference` in float32 on the same inputs.

    `run` may write over its inputs, as a model would. library: the configuration that leaves the
    work to a library, measured beside the others.
    """

    inputs: Callable[[Inputs], tuple[Any, ...]]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    library: Config | None = None


@dataclass(frozen=True, slots=True)
class Calls:
    """For which layers a model runs an op, as `dims` or None, and how it calls it there.

    dtype: what its tables are keyed by if it is not the model's own.
    """

    dims: Callable[[Projection], tuple[int, ...] | None]
    make: Callable[[Key], Call]
    dtype: torch.dtype | None = None


def model_weight(new: Inputs, n: int, k: int) -> Tensor:
    """Random as a model's [n, k]: outputs of the size of the inputs."""
    weight = new.randn(n, k)
    return weight if new.empty else weight.mul_(k**-0.5)  # gigabytes that nobody will read
