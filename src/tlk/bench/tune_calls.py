"""How the tuner calls an op at one of its keys: as the layer does, on inputs like a model's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tlk.bench.case import Inputs
from tlk.bench.tune_keys import Key, Projection
from tlk.kernels.gated_linear import gated_linear, gated_linear_reference
from tlk.kernels.matmul import CUBLAS, matmul, matmul_add_, matmul_reference
from tlk.kernels.norm_linear import UNFUSED, norm_linear, norm_linear_reference
from tlk.kernels.tuning import Config

EPS = 1e-5


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


def _matmul(key: Key) -> Call:
    n, k = key.dims

    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        residual = new.randn(key.running, n) if key.layer.residual else None
        return new.randn(key.running, k), _weight(new, n, k), residual

    def run(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return matmul(x, weight) if residual is None else matmul_add_(residual, x, weight)

    def reference(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return matmul_reference(x, weight, residual=residual)

    return Call(inputs, run, reference, CUBLAS)


def _norm_linear(key: Key) -> Call:
    n, k = key.dims
    return Call(
        lambda new: (new.randn(key.running, k), new.randn(k), _weight(new, n, k)),
        lambda x, norm, weight: norm_linear(x, norm, weight, eps=EPS),
        lambda x, norm, weight: norm_linear_reference(x, norm, weight, eps=EPS),
        UNFUSED,
    )


def _gated_linear(key: Key) -> Call:
    n, k = key.dims
    return Call(
        lambda new: (new.randn(key.running, k), new.randn(k), _weight(new, n, k)),
        lambda x, norm, weight: gated_linear(
            x, weight, activation="silu", norm_weight=norm, eps=EPS
        ),
        lambda x, norm, weight: gated_linear_reference(x, weight, None, "silu", norm, EPS),
    )


def _weight(new: Inputs, n: int, k: int) -> Tensor:
    """Random as a model's: outputs of the size of the inputs."""
    weight = new.randn(n, k)
    return weight if new.empty else weight.mul_(k**-0.5)  # gigabytes that nobody will read


@dataclass(frozen=True, slots=True)
class Calls:
    """For which layers a model runs an op, as `dims` or None, and how."""

    dims: Callable[[Projection], tuple[int, ...] | None]
    make: Callable[[Key], Call]


def _shape(layer: Projection) -> tuple[int, ...]:
    return layer.outputs, layer.inputs


CALLS = {
    "matmul": Calls(_shape, _matmul),  # what the others do not fuse comes here, so for all layers
    "norm_linear": Calls(lambda layer: _shape(layer) if layer.norm else None, _norm_linear),
    "gated_linear": Calls(
        lambda layer: _shape(layer) if layer.gated and layer.norm else None, _gated_linear
    ),
}
