"""Which format each layer of a model is quantized to: what a user asks for, by module name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tlk.quant.format import Format
from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import GROUP_SIZES, Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import TableFormat

METHODS: Mapping[str, Format] = {
    "fp8": Fp8("channel"),
    "fp8-tensor": Fp8("tensor"),
    "fp8-block": Fp8("block"),
    "int8": Int8(),
    "int8-weight": Int8Weight(),
    "int4": Int4(),
    "int4-awq": Int4(symmetric=False),
    "int4-gptq": Int4(),
    "nf4": TableFormat("nf4"),
    "fp4": TableFormat("fp4"),
    "fp4-mx": MXFP4(),
    "fp4-nv": NVFP4(),
}
"""The format of each method by default. How its codes are found (AWQ, GPTQ, …) is the calibrator's."""

CALIBRATED = ("int8", "int4-awq", "int4-gptq")
"""Methods that need calibration data; the others can do without."""


@dataclass(frozen=True)
class QuantConfig:
    """A method for all linear layers of a model but some.

    method: a key of METHODS. group_size: inputs that share a scale; None is the method's own: 128 for
    int4, a row for int8-weight, 64 for nf4 and fp4. symmetric: without zero points; None is the
    method's own, which is True except for int4-awq. double_quant: nf4 and fp4 store their scales in
    8 bit. ignore, and the keys of per_layer: a module's name, its class's name, or "re:" and a regular
    expression that the beginning of a module's name must match. per_layer: another method, or
    another config, for some modules, or None for 16 bit; the first key that matches counts, after
    ignore. calibration: texts, a JSONL file's path, or token ids [n, length]. static: int8 and fp8
    round all activations of a layer with one scale from the calibration data, not with one a row.

    Raises ValueError, naming the field, for what the method does not have.
    """

    method: str
    group_size: int | None = None
    symmetric: bool | None = None
    ignore: Sequence[str] = ("lm_head",)
    per_layer: Mapping[str, "str | QuantConfig | None"] = field(default_factory=dict)
    calibration: Any = None
    double_quant: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if isinstance(self.ignore, str):
            raise ValueError(f"ignore must be a sequence of names, got the string {self.ignore!r}")
        for key in (*self.ignore, *self.per_layer):
            _check_pattern(key)
        for key, value in self.per_layer.items():
            if isinstance(value, str) and value not in METHODS:
                raise ValueError(
                    f"per_layer[{key!r}] must be a QuantConfig, None or one of "
                    f"{', '.join(METHODS)}, got {value!r}"
                )
        _ = self.format

    @property
    def format(self) -> Format:
        """The format of a layer that no key of `per_layer` names."""
        format: Any = METHODS[self.method]
        if self.group_size is not None:
            format = _with_group_size(self.method, format, self.group_size)
        if self.symmetric is not None and isinstance(format, Int4 | Int8Weight):
            format = replace(format, symmetric=self.symmetric)
        elif self.symmetric is False:
            raise ValueError(f"symmetric must be None or True for {self.method}, got False")
        if self.double_quant:
            if not isinstance(format, TableFormat):
                raise ValueError(f"double_quant is of nf4 and fp4, not of {self.method}")
            format = replace(format, nested=True)
        if self.static:
            if not isinstance(format, Int8 | Fp8) or format.block:
                raise ValueError(f"static is of int8 and fp8, not of {self.method}")
            format = replace(format, static=True)
        return format

    def to_dict(self) -> dict[str, Any]:
        """All fields but the calibration data, for JSON."""
        return {
            "method": self.method,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "ignore": list(self.ignore),
            "per_layer": {
                key: value.to_dict() if isinstance(value, QuantConfig) else value
                for key, value in self.per_layer.items()
            },
            "double_quant": self.double_quant,
            "static": self.static,
        }


def config_of(
    config: QuantConfig, module_name: str, class_name: str = "Linear"
) -> QuantConfig | None:
    """What `config` says of the module of that name and class; None: it stays in 16 bit."""
    if any(matches(key, module_name, class_name) for key in config.ignore):
        return None
    for key, value in config.per_layer.items():
        if matches(key, module_name, class_name):
            return replace(config, method=value, group_size=None, symmetric=None, per_layer={},
                           double_quant=False, static=False) if isinstance(value, str) else value  # fmt: skip
    return config


def format_of(config: QuantConfig, module_name: str, class_name: str = "Linear") -> Format | None:
    """The format of the module of that name and class by `config`; None: it stays in 16 bit."""
    found = config_of(config, module_name, class_name)
    return None if found is None else found.format


def matches(key: str, module_name: str, class_name: str) -> bool:
    """Whether `key` is the module's name or its class's, or an "re:" expression its name begins with."""
    if key.startswith("re:"):
        return re.match(key.removeprefix("re:"), module_name) is not None
    return key in (module_name, class_name)


def _with_group_size(method: str, format: Any, group_size: int) -> Format:
    if not isinstance(format, Int4 | Int8Weight | TableFormat):
        raise ValueError(f"group_size must be None for {method}, got {group_size}")
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size must be None or one of {GROUP_SIZES} for {method}, got {group_size}"
        )
    if isinstance(format, TableFormat):
        return replace(format, blocksize=group_size)
    return replace(format, group_size=group_size)


def _check_pattern(key: str) -> None:
    if not key.startswith("re:"):
        return
    try:
        re.compile(key.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"{key!r} is no regular expression: {error}") from error
