"""Linears on weights of 8 and 4 bits: ATen's, gemlite, bitsandbytes, and cuBLAS on the same weight in 16 bits.

https://github.com/mobiusml/gemlite and https://github.com/bitsandbytes-foundation/bitsandbytes. Each gets the
codes and scales of the case in its own layout, so that it computes the same matrix; what it prepares at
load time is prepared before the clock runs. Peers that multiply in 8 bits get quantized activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlk.bench.case import Case
from tlk.bench.kernel_peers.peer import Call, Peer, want
from tlk.kernels.dequantize import codes_reference, dequantize_reference

Prepare = Callable[[Case, tuple[Any, ...]], Call]
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Linear:
    """The tensors of a case of `dequant_mm` that has no more than a product."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    global_scale: Tensor | None
    kind: str
    group: int

    @classmethod
    def of(cls, case: Case, inputs: tuple[Any, ...]) -> "Linear":
        """UnsupportedError for a case with an epilogue or a norm, which peers have not."""
        x, bias, residual, norm_weight, weight, scale, zero, table, whole, nested, kind, group = (
            inputs
        )
        extra = [part for part in (bias, residual, norm_weight) if part is not None]
        extra += [name for name, value in options_of(case).items() if value]
        want(not extra and not nested, "a plain linear, whose scales are not quantized again")
        return cls(x, weight, scale, zero, table, whole, kind, group)

    @property
    def codes(self) -> Tensor:
        """Of four bits, uint8 [N, K]."""
        return codes_reference(self.weight, self.group).to(torch.uint8)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K]."""
        return dequantize_reference(
            self.weight, self.scale, self.zero, self.table, self.global_scale, [], self.kind,
            self.group, dtype,
        )  # fmt: skip


def options_of(case: Case) -> Mapping[str, Any]:
    """What the case states, or the keywords of its `run`, a functools.partial."""
    return case.options or getattr(case.run, "keywords", {})


def _cublas(case: Case, inputs: tuple[Any, ...]) -> Call:
    linear = Linear.of(case, inputs)
    x, dense = linear.x, linear.dense(linear.x.dtype)
    return lambda: F.linear(x, dense)


def _tinygemm(case: Case, inputs: tuple[Any, ...]) -> Call:
    w = Linear.of(case, inputs)
    k = w.x.shape[-1]
    group = min(w.group, k)
    want(w.kind == "int4" and group in (32, 64, 128, 256), "int4 in groups of 32 to 256")
    want(w.x.dtype == torch.bfloat16, "bfloat16")
    packed = torch.ops.aten._convert_weight_to_int4pack(w.codes[:, ::2] << 4 | w.codes[:, 1::2], 8)
    scale = w.scale.to(torch.bfloat16)
    zero = torch.zeros_like(scale) if w.zero is None else (8 - w.zero.to(torch.bfloat16)) * scale
    both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()  # [K/G, N, 2]
    x = w.x.reshape(-1, k)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, both)


def _gemlite(case: Case, inputs: tuple[Any, ...]) -> Call:
    w = Linear.of(case, inputs)
    want(w.kind in ("int4", "int8", "fp8"), "int4, int8 and fp8")
    want(w.kind == "int4" or w.scale.shape[1] == 1, "8 bits with a scale for each row")
    want(w.kind != "int8" or w.zero is None, "int8 without zeros")
    helper = import_module("gemlite.helper")
    where = {"device": str(w.x.device), "dtype": w.x.dtype}
    if w.kind == "int4":
        zero = torch.full_like(w.scale, 8) if w.zero is None else w.zero
        layer = helper.A16Wn(**where).from_weights(
            w.codes, w.scale.to(w.x.dtype), zero, 4, min(w.group, w.x.shape[-1])
        )
    else:
        fp8 = torch.float8_e4m3fn if w.kind == "fp8" else None
        layer = helper.A16W8(**where, fp8=fp8).from_weights(w.weight, scales=w.scale)
    x = w.x.reshape(-1, w.x.shape[-1])
    return lambda: layer(x)


def _bitsandbytes(case: Case, inputs: tuple[Any, ...]) -> Call:
    """Its codes lie in the order of the inputs, the first of a byte in the high half."""
    w = Linear.of(case, inputs)
    want(w.kind == "table4" and w.table is not None, "NF4 and its own FP4")
    assert w.table is not None
    functional, run = import_module("bitsandbytes.functional"), import_module("bitsandbytes")
    name = "nf4" if float(w.table[0, 0]) == -1.0 else "fp4"
    codes = w.codes
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
    state = functional.QuantState(
        absmax=w.scale.flatten().contiguous(), shape=torch.Size(codes.shape),
        code=w.table[0].contiguous(), blocksize=w.group, quant_type=name, dtype=w.x.dtype,
    )  # fmt: skip
    x = w.x.reshape(-1, codes.shape[1])
    return lambda: run.matmul_4bit(x, packed, quant_state=state)


def _weight_scaled_mm(case: Case, inputs: tuple[Any, ...]) -> Call:
    """Of fp8 activations, quantized before, and of the weight in fp8: as many bytes as ours."""
    w = Linear.of(case, inputs)
    want(w.kind in ("int8", "fp8"), "8 bits")
    weight, rows = _rowwise(w.dense(torch.float32))
    x, x_scale = _rowwise(w.x.reshape(-1, w.x.shape[-1]).float())
    columns, dtype = rows.t(), w.x.dtype
    return lambda: torch._scaled_mm(
        x, weight.t(), x_scale, columns, out_dtype=dtype, use_fast_accum=True
    )


def _rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def _scaled_mm(case: Case, inputs: tuple[Any, ...], fast: bool = True) -> Call:
    """`fast`: sums that are not promoted to float32 on their way, which torch leaves off by default."""
    x, x_scale, weight, scale = _operands(case, inputs, torch.float8_e4m3fn)
    if scale.shape == (len(weight), 1):
        x_scale, scale = x_scale.reshape(-1, 1), scale.t()
    else:  # blocks: scales of x lie column by column, those of the weight as [K/128, N/128]
        x_scale, scale = x_scale.t().contiguous().t(), scale.t()
    dtype = options_of(case).get("out_dtype", torch.bfloat16)
    return lambda: torch._scaled_mm(
        x, weight.t(), x_scale, scale, out_dtype=dtype, use_fast_accum=fast and scale.shape[0] == 1
    )


def _int_mm(case: Case, inputs: tuple[Any, ...]) -> Call:
    """The product alone: int32, without scales."""
    x, _, weight, _ = _operands(case, inputs, torch.int8)
    return lambda: torch._int_mm(x, weight.t())


def _bitsandbytes_int8(case: Case, inputs: tuple[Any, ...]) -> Call:
    """Its scales are maxima: 127 times ours. The result is float16."""
    x, x_scale, weight, scale = _operands(case, inputs, torch.int8)
    functional = import_module("bitsandbytes.functional")
    rows, columns = (x_scale * 127).flatten(), (scale * 127).flatten()
    return lambda: functional.int8_mm_dequant(
        functional.int8_linear_matmul(x, weight), rows, columns
    )


def _operands(
    case: Case, inputs: tuple[Any, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, x_scale, weight, scale = inputs[:4]
    more = any(isinstance(t, Tensor) for t in inputs[4:]) or options_of(case).get("activation")
    name = str(dtype).removeprefix("torch.")
    want(x.dtype == dtype and not more, f"{name} without bias, activation and residual")
    return x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, x_scale.shape[-1]), weight, scale


DEQUANT_MM = (
    Peer("cublas bf16", _cublas, tolerance=0.02),
    Peer("tinygemm", _tinygemm, tolerance=0.02),
    Peer("gemlite", _gemlite, "gemlite", tolerance=0.02),
    Peer("bitsandbytes", _bitsandbytes, "bitsandbytes", tolerance=0.02),
    Peer("_scaled_mm", _weight_scaled_mm, tolerance=0.08),
)
SCALED_MM = (
    Peer("_scaled_mm", _scaled_mm, tolerance=0.02),
    Peer("_scaled_mm careful", partial(_scaled_mm, fast=False), tolerance=0.02),
    Peer("_int_mm", _int_mm, compared=False),
    Peer("bitsandbytes int8", _bitsandbytes_int8, "bitsandbytes", tolerance=0.02),
)
