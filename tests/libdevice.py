"""CUDA's math library in numpy, for the interpreter."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def erf(x: Array) -> Array:
    return torch.erf(torch.from_numpy(np.array(x))).numpy()


# CUDA's math library by the names of its functions, without the suffix f of single precision.
LIBDEVICE: dict[str, Callable[..., Array]] = {
    "copysign": np.copysign,
    "erf": erf,
    "exp": np.exp,
    "exp10": lambda x: np.power(10.0, x),
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.abs,
    "fast_exp": np.exp,
    "fast_fdivide": np.divide,
    "fast_log": np.log,
    "fast_log2": np.log2,
    "fast_pow": np.power,
    "fast_tanh": np.tanh,
    "fdiv_rn": np.divide,
    "floor": np.floor,
    "fmax": np.fmax,
    "fmin": np.fmin,
    "fmod": np.fmod,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "rint": np.rint,
    "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
}
