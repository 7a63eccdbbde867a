"""Liger's Triton kernels, which are made for training. https://github.com/linkedin/Liger-Kernel"""

from importlib import import_module
from typing import Any

from torch import Tensor

from tlk.bench.case import Case
from tlk.bench.kernel_peers.peer import Call, Peer, want


def _rms_norm(case: Case, inputs: tuple[Any, ...]) -> Call:
    forward = import_module("liger_kernel.ops.rms_norm").rms_norm_forward
    x, weight = inputs
    rows = x.reshape(-1, x.shape[-1])  # it takes rows without gaps
    return lambda: forward(rows, weight, 1e-6, 0.0, "llama", False)[0]


def _add_rms_norm(case: Case, inputs: tuple[Any, ...]) -> Call:
    forward = import_module("liger_kernel.ops.fused_add_rms_norm").fused_add_rms_norm_forward
    x, residual, weight = inputs
    return lambda: forward(x, residual, weight, 1e-6, 0.0, "llama")[:2]


def _layer_norm(case: Case, inputs: tuple[Any, ...]) -> Call:
    forward = import_module("liger_kernel.ops.layer_norm").layer_norm_forward
    x, weight, bias = inputs
    return lambda: forward(x, weight, bias, 1e-5)[0]


def _silu_and_mul(case: Case, inputs: tuple[Any, ...]) -> Call:
    """On halves of their own, for it takes no rows with gaps."""
    forward = import_module("liger_kernel.ops.swiglu").swiglu_forward
    gate, up = (half.contiguous() for half in inputs[0].chunk(2, -1))
    return lambda: forward(gate, up)[2]


def _rope(case: Case, inputs: tuple[Any, ...]) -> Call:
    """Without the write to the cache, which it does not have: less work than ours."""
    want(case.options.get("plain", True), "whole heads, not interleaved, and no norms")
    forward = import_module("liger_kernel.ops.rope").rope_forward
    q, k, _, cos, sin, positions = inputs[:6]
    c, s = (table[positions].repeat(1, 2).to(q.dtype)[None] for table in (cos, sin))
    # as it sees them: [B, H, T, D], which in memory are [B, T, H, D]
    q, k = (x.contiguous()[None].transpose(1, 2) for x in (q, k))

    def call() -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = forward(q, k, c, s)[:2]
        return turned

    return call


def _peer(prepare: Any, name: str = "liger", compared: bool = True) -> Peer:
    return Peer(name, prepare, "liger-kernel", "liger_kernel", compared)


RMS_NORM = _peer(_rms_norm)
ADD_RMS_NORM = _peer(_add_rms_norm)
LAYER_NORM = _peer(_layer_norm)
SILU_AND_MUL = _peer(_silu_and_mul)
ROPE = _peer(_rope, "liger, no cache", compared=False)
