"""How the tuner calls an op at one of its keys: as the layer does, on inputs like a model's."""

from torch import Tensor

from tlk.bench import tune_quantized
from tlk.bench.case import Inputs
from tlk.bench.tune_keys import EPS, Call, Calls, Key, Projection, model_weight
from tlk.kernels._linear_configs import CUBLAS
from tlk.kernels.gated_linear import gated_linear, gated_linear_reference
from tlk.kernels.matmul import matmul, matmul_add_, matmul_reference
from tlk.kernels.norm_linear import UNFUSED, norm_linear, norm_linear_reference


def _matmul(key: Key) -> Call:
    n, k = key.dims

    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        residual = new.randn(key.running, n) if key.layer.residual else None
        return new.randn(key.running, k), model_weight(new, n, k), residual

    def run(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return matmul(x, weight) if residual is None else matmul_add_(residual, x, weight)

    def reference(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return matmul_reference(x, weight, residual=residual)

    return Call(inputs, run, reference, CUBLAS)


def _norm_linear(key: Key) -> Call:
    n, k = key.dims
    return Call(
        lambda new: (new.randn(key.running, k), new.randn(k), model_weight(new, n, k)),
        lambda x, norm, weight: norm_linear(x, norm, weight, eps=EPS),
        lambda x, norm, weight: norm_linear_reference(x, norm, weight, eps=EPS),
        UNFUSED,
    )


def _gated_linear(key: Key) -> Call:
    n, k = key.dims
    return Call(
        lambda new: (new.randn(key.running, k), new.randn(k), model_weight(new, n, k)),
        lambda x, norm, weight: gated_linear(
            x, weight, activation="silu", norm_weight=norm, eps=EPS
        ),
        lambda x, norm, weight: gated_linear_reference(x, weight, None, "silu", norm, EPS),
    )


def _shape(layer: Projection) -> tuple[int, ...]:
    return layer.outputs, layer.inputs


CALLS = {
    "matmul": Calls(_shape, _matmul),  # what the others do not fuse comes here, so for all layers
    "norm_linear": Calls(lambda layer: _shape(layer) if layer.norm else None, _norm_linear),
    "gated_linear": Calls(
        lambda layer: _shape(layer) if layer.gated and layer.norm else None, _gated_linear
    ),
    **tune_quantized.calls(),
}
