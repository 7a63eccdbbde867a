"""The ops that `tlk tune` measures, each with its search space and the heuristic that it must beat.

A kernel file states three things of an op, and this one names them:

- `VERSION`, to be raised when measured configurations no longer apply;
- `candidates(arch, processors, dtype, dims, running)`, what may be fastest at one key of its tables;
- `default_config` of the same arguments, what runs where no table answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tlk.kernels._dequant_configs import VERSION as DEQUANT_MM
from tlk.kernels._dequant_configs import candidates as dequant_mm_candidates
from tlk.kernels._dequant_configs import default_config as dequant_mm_default
from tlk.kernels._linear_configs import candidates as matmul_candidates
from tlk.kernels._linear_configs import default_config as matmul_default
from tlk.kernels.gated_linear import VERSION as GATED_LINEAR
from tlk.kernels.gated_linear import candidates as gated_linear_candidates
from tlk.kernels.gated_linear import default_config as gated_linear_default
from tlk.kernels.matmul import VERSION as MATMUL
from tlk.kernels.norm_linear import VERSION as NORM_LINEAR
from tlk.kernels.norm_linear import candidates as norm_linear_candidates
from tlk.kernels.norm_linear import default_config as norm_linear_default
from tlk.kernels.scaled_mm import VERSION as SCALED_MM
from tlk.kernels.scaled_mm import candidates as scaled_mm_candidates
from tlk.kernels.scaled_mm import default_config as scaled_mm_default
from tlk.kernels.tuning import Config


@dataclass(frozen=True, slots=True)
class Tunable:
    """`candidates` and `default` take (arch, processors, dtype, dims, running).

    launch_only: parameters of a configuration that leave the compiled kernel as it is.
    """

    version: int
    candidates: Callable[[int, int, torch.dtype, tuple[int, ...], int], list[Config]]
    default: Callable[[int, int, torch.dtype, tuple[int, ...], int], Config]
    launch_only: frozenset[str] = frozenset()


_LINEAR = frozenset({"PER_SM", "MOST_TILES"})


def _dequant_mm(kind: str) -> Tunable:
    space = partial(dequant_mm_candidates, kind=kind)
    return Tunable(DEQUANT_MM, space, partial(dequant_mm_default, kind=kind))


def _scaled_mm(blockwise: bool) -> Tunable:
    space = partial(scaled_mm_candidates, blockwise=blockwise)
    return Tunable(SCALED_MM, space, partial(scaled_mm_default, blockwise=blockwise))


# In the order in which they are measured: what an op may hand its work to comes before it.
TUNABLE = {
    "matmul": Tunable(MATMUL, matmul_candidates, matmul_default, _LINEAR),
    "norm_linear": Tunable(NORM_LINEAR, norm_linear_candidates, norm_linear_default, _LINEAR),
    "gated_linear": Tunable(GATED_LINEAR, gated_linear_candidates, gated_linear_default, _LINEAR),
    "dequant_mm.int4": _dequant_mm("int4"),
    "dequant_mm.int8": _dequant_mm("int8"),
    "dequant_mm.table4": _dequant_mm("table4"),
    "dequant_mm.mx4": _dequant_mm("mx4"),
    "dequant_mm.nv4": _dequant_mm("nv4"),
    "dequant_mm.fp8": _dequant_mm("fp8"),
    "scaled_mm.fp8": _scaled_mm(blockwise=False),
    "scaled_mm.fp8_block": _scaled_mm(blockwise=True),
    "scaled_mm.int8": _scaled_mm(blockwise=False),
}
