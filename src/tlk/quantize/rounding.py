"""One linear layer: from its weight and what is known of its inputs to packed tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.errors import CheckpointError
from tlk.quant import awq
from tlk.quant.format import Format, Packed, fuse
from tlk.quant.fp4 import MXFP4, NVFP4, e8m0
from tlk.quant.fp4_search import mx_scales, nv_scales
from tlk.quant.gptq import Indefinite, Lattice, gptq
from tlk.quant.int4 import MIDDLE, Int4
from tlk.quant.int8 import Int8Weight
from tlk.quant.observe import Inputs
from tlk.quant.ranges import input_scale
from tlk.quant.ranges import rounded as rounded_inputs
from tlk.quantize.plan import Target

GPTQ = ("int4-gptq", "fp4-mx", "fp4-nv")
"""Methods whose rounding makes up for its errors, if there are inputs to measure them on."""
SCALED = ("int4-awq", "int8")
"""Methods that scale weights against what comes before them."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """packed: the whole layer. reports: of each module it is fused from, how it was made, for JSON."""

    packed: Packed
    reports: tuple[dict[str, Any], ...]


def round_linear(
    weight: Tensor, target: Target, dtype: torch.dtype, inputs: Inputs | None, *, clip: bool = False
) -> Rounded:
    """Quantize `weight` float32 [N, K] as `target` says, for a model in `dtype`.

    inputs: what was seen of its inputs, None without calibration. clip: search what is clipped, as AWQ
    does. The reports hold `weight_error`, ‖W − Ŵ‖ / ‖W‖, and with inputs `output_error`, the same of
    their products. Raises CheckpointError for weights that are not finite.
    """
    method, format = target.config.method, target.format
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"weights of {', '.join(target.modules)} are infinite or not a number"
        )
    report: dict[str, Any] = {"method": method}
    packed = None
    if method in GPTQ and inputs is not None and inputs.hessian is not None:
        try:
            packed, report["damping"] = _by_gptq(weight, format, dtype, inputs)
        except Indefinite as error:
            report["fallback"] = f"rounded to nearest: {error}"
    if packed is None:
        rounded = weight
        if clip and inputs is not None:
            rounded = awq.clipped(weight, inputs.rows, format, dtype)
        packed = nearest(rounded, target, dtype)
    if target.config.static:
        if inputs is None:
            raise ValueError(f"calibration must be given for static {method}")
        assert format.act is not None
        packed["input_scale"] = input_scale(inputs.amax, format.act, dtype)
    return Rounded(packed, _reports(weight, packed, target, inputs, report))


def _reports(
    weight: Tensor, packed: Packed, target: Target, inputs: Inputs | None, report: dict[str, Any]
) -> tuple[dict[str, Any], ...]:
    """`report` for every part, with its errors."""
    values = target.format.dequantize(packed)
    errors = {"weight_error": _relative(values - weight, weight, target.heights)}
    if inputs is not None:
        x = inputs.rows.float()
        exact = F.linear(x, weight)
        act = target.format.act
        seen = x if act is None else rounded_inputs(x, act, packed.get("input_scale"))
        off = F.linear(seen, values) - exact
        errors["output_error"] = _relative(off.T, exact.T, target.heights)
    return tuple(
        report | {name: of_parts[i] for name, of_parts in errors.items()}
        for i in range(len(target.heights))
    )


def nearest(weight: Tensor, target: Target, dtype: torch.dtype) -> Packed:
    """Round to nearest, part by part, so that no part's scales depend on its neighbours.

    Parts of NVFP4 share their global scale, as loaders of fused layers want it. Scales of the 4-bit
    floats are searched.
    """
    format = target.format
    parts = weight.split(target.heights)
    if isinstance(format, MXFP4):
        return format.encode(weight, mx_scales(weight))
    if isinstance(format, NVFP4):
        return format.encode(weight, *nv_scales(weight))
    return fuse([format.quantize(part, dtype) for part in parts])


def _by_gptq(
    weight: Tensor, format: Format, dtype: torch.dtype, inputs: Inputs
) -> tuple[Packed, float]:
    assert inputs.hessian is not None
    importance = inputs.mean_square
    lattice, pack = _lattice(weight, format, dtype, importance)
    groups = lattice.scale.shape[1]
    size = weight.shape[1] // groups
    found = gptq(weight, inputs.hessian.matrix, lambda w: lattice, size)
    return pack(found.values), found.damping


def _lattice(
    weight: Tensor, format: Format, dtype: torch.dtype, importance: Tensor
) -> tuple[Lattice, Callable[[Tensor], Packed]]:
    """The points that `format` offers `weight`, and what packs values that lie on them."""
    if isinstance(format, Int4):
        scale, zero = format.scales(weight, dtype)
        s = scale.float()
        z = torch.full_like(s, MIDDLE) if zero is None else zero.float()
        return Lattice(s, z), lambda values: format.encode(values, scale, zero)
    if isinstance(format, Int8Weight):
        scale, zero = format.scales(weight, dtype)
        s = scale.float()
        z = torch.full_like(s, 128.0) if zero is None else zero.float() + 128.0
        return Lattice(s, z, top=255), lambda values: format.encode(values, scale, zero)
    if isinstance(format, MXFP4):
        exponents = mx_scales(weight, importance)
        lattice = Lattice(e8m0(exponents), None, "e2m1")
        return lattice, lambda values: format.encode(values, exponents)
    if isinstance(format, NVFP4):
        small, each = nv_scales(weight, importance)
        lattice = Lattice(small.float() * each, None, "e2m1")
        return lattice, lambda values: format.encode(values, small, each)
    raise TypeError(f"format must have a lattice that GPTQ knows, got {format}")


def _relative(difference: Tensor, whole: Tensor, heights: tuple[int, ...]) -> list[float]:
    """‖difference‖ / ‖whole‖ of each run of `heights` rows."""
    both = zip(difference.split(heights), whole.split(heights), strict=True)
    return [float(d.norm() / w.norm().clamp(min=1e-30)) for d, w in both]
