"""8-bit floats as DeepSeek-V3 stores them (quant_method "fp8"), and fbgemm's (quant_method "fbgemm_fp8").

    w = q · weight_scale_inv          weight E4M3 [N, K]; the scale multiplies, whatever its name says

weight_scale_inv float32 [N/128, K/128], rounded up, or powers of two (scale_fmt "ue8m0"). With
weight_block_size null it is one number. fbgemm: weight_scale float32 [N, 1]; its upper bound of the
activations' scales (input_scale_ub) is not applied: inputs beyond it are kept and not cut.
https://arxiv.org/abs/2412.19437
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.quant.files.floats import fp8_layer
from tlk.quant.files.layer import Layer, Tensors

SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")


@dataclass(frozen=True)
class BlockFp8:
    """What quantization_config says; granularity "block", "channel" or "tensor"."""

    method: str
    granularity: str
    static: bool = False
    skipped: tuple[str, ...] = ()

    def listed(self, module: str) -> bool | None:
        return module != "lm_head" and not any(names(key, module) for key in self.skipped)

    def named(self) -> Collection[str]:
        return ()

    def holds(self, suffixes: Collection[str]) -> bool:
        return any(suffix in suffixes for suffix in SCALES)

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        t = Tensors(module, tensors)
        scale = next((name for name in SCALES if t.has(name)), SCALES[0])
        layer = fp8_layer(
            t, shape, self.granularity, scale, input_scale="input_scale" if self.static else None
        )
        t.ignore("input_scale_ub", "input_scale")
        t.done()
        return layer


def scheme(fields: Mapping[str, Any]) -> BlockFp8:
    """The scheme of a "fp8" config; UnsupportedError for what tlk does not read."""
    block, kind = fields.get("weight_block_size"), fields.get("fmt", "e4m3")
    if kind != "e4m3" or fields.get("expert_dtype") not in (None, "fp8"):
        raise UnsupportedError(
            f"fp8 with fmt {kind!r} and expert_dtype {fields.get('expert_dtype')!r}: tlk reads e4m3"
        )
    if block is not None and list(block) != [128, 128]:
        raise UnsupportedError(f"fp8 with weight_block_size {block}: tlk reads [128, 128]")
    skipped = fields.get("modules_to_not_convert") or fields.get("ignored_layers") or ()
    static = fields.get("activation_scheme") == "static"
    if static and block is not None:
        raise UnsupportedError("fp8 with blocks and activation_scheme 'static': it must be dynamic")
    return BlockFp8("fp8", "tensor" if block is None else "block", static, tuple(skipped))


def fbgemm_scheme(fields: Mapping[str, Any]) -> BlockFp8:
    """The scheme of a "fbgemm_fp8" config."""
    return BlockFp8(
        "fbgemm_fp8", "channel", False, tuple(fields.get("modules_to_not_convert") or ())
    )


def names(key: str, module: str) -> bool:
    """Whether `key` names `module`, as transformers matches: an expression up to a dot, or its end."""
    return re.match(rf"(?:{key})(?:\.|$)", module) is not None or module.endswith(key)
