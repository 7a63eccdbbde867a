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
        plain = not (o.get("window") or o.get("softcap")) and sinks is None and q.itemsize > 1
        want(plain, "attention in 16 bits without window, soft cap and sinks")
        if starts is not None:
            want(backend == SDPBackend.FLASH_ATTENTION, "sequences of one length")
            return _packed(q, k, v, starts, bool(o.get("causal")))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shared, causal = q.shape[1] != k.shape[1], bool(o.get("causal"))

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
            return out.transpose(1, 2)

        return call

    return prepare


def _packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> Call:
    """What `torch.nn.attention.varlen` calls; the longest sequence is known before, as ours is."""
    longest = int(starts.diff().max())
    run = torch.ops.aten._flash_attention_forward

    def call() -> Tensor:
        out: Tensor = run(q, k, v, starts, starts, longest, longest, 0.0, causal, False)[0]
        return out

    return call


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
