"""Kernels that come with torch: SDPA's backends, Inductor, and the low-precision matmuls of ATen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlk.bench.case import Case
from tlk.bench.kernel_peers.peer import Call, Peer, want


def _sdpa(backend: SDPBackend) -> Callable[[Case, tuple[Any, ...]], Call]:
    def prepare(case: Case, inputs: tuple[Any, ...]) -> Call:
        q, k, v, sinks, starts = inputs[:5]
        o = case.options
        plain = not (o.get("window") or o.get("softcap")) and sinks is None and starts is None
        want(plain, "attention without window, soft cap, sinks and packed sequences")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shared, causal = q.shape[1] != k.shape[1], bool(o.get("causal"))

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
            return out.transpose(1, 2)

        return call

    return prepare


FLASH_ATTENTION = (
    Peer("torch flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("torch cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
)


def inductor(run: Callable[..., Any], compared: bool = True) -> Peer:
    """`run`, the op in plain torch, compiled by Inductor for exactly these shapes."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True)

    def prepare(case: Case, inputs: tuple[Any, ...]) -> Call:
        return lambda: compiled(*inputs)

    return Peer("inductor", prepare, tolerance=0.03, compared=compared)
