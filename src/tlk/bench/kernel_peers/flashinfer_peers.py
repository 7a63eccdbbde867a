"""FlashInfer, whose kernels are compiled by nvcc at their first call. https://github.com/flashinfer-ai/flashinfer"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tlk.bench.case import Case
from tlk.bench.kernel_peers.peer import Call, Peer, want

WORKSPACE_BYTES = 128 << 20
Prepare = Callable[[Case, tuple[Any, ...]], Call]


def _peer(prepare: Prepare, name: str = "flashinfer", compared: bool = True) -> Peer:
    return Peer(name, prepare, "flashinfer-python", "flashinfer", compared)


def _prefill(case: Case, inputs: tuple[Any, ...], backend: str) -> Call:
    q, k, v, sinks, starts = inputs[:5]
    o = case.options
    if starts is not None:
        want(sinks is None and q.itemsize > 1, "packed sequences in 16 bits, and no sinks")
        return _ragged(case, q, k, v, starts, backend)
    want(sinks is None and q.shape[0] == 1, "one sequence at a time, and no sinks")
    run = import_module("flashinfer").single_prefill_with_kv_cache
    options = {
        "causal": bool(o.get("causal")),
        "window_left": o["window"] - 1 if o.get("window") else -1,
        "logits_soft_cap": o.get("softcap") or None,
        "backend": backend,
        "o_dtype": q.dtype if q.itemsize > 1 else torch.bfloat16,  # of fp8, with scales of one
    }
    q, k, v = q[0], k[0], v[0]
    return lambda: run(q, k, v, **options)


def _ragged(
    case: Case, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, backend: str
) -> Call:  # fmt: skip
    """Sequences of different lengths, as many queries as keys each."""
    o = case.options
    wrapper = import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(
        _workspace(q.device), "NHD", backend=backend
    )
    wrapper.plan(
        starts, starts, q.shape[1], k.shape[1], q.shape[2], v.shape[2],
        causal=bool(o.get("causal")), window_left=o["window"] - 1 if o.get("window") else -1,
        logits_soft_cap=o.get("softcap") or None, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, k, v)


def _decode(case: Case, inputs: tuple[Any, ...]) -> Call:
    """Scales of an 8-bit cache are one number for all heads, as they are in the cases."""
    q, k, v, table, lens, _, sinks, k_scale, v_scale = inputs[:9]
    o = case.options
    known = k.dtype in (q.dtype, torch.float8_e4m3fn)
    one_each = q.shape[0] == lens.shape[0] and sinks is None and known
    want(one_each, "one query a sequence, no sinks, and a cache in fp8 or the dtype of the queries")
    scales = (
        {"k_scale": float(k_scale[0]), "v_scale": float(v_scale[0])} if k_scale is not None else {}
    )
    indptr, indices, last = _pages(table, lens, k.shape[2])
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
        _workspace(q.device), "HND", use_tensor_cores=True, use_cuda_graph=True, backend="fa2",
        paged_kv_indptr_buffer=indptr.clone(), paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        indptr, indices, last, q.shape[1], k.shape[1], q.shape[2], k.shape[2],
        window_left=o["window"] - 1 if o.get("window") else -1,
        logits_soft_cap=o.get("softcap") or None, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v), **scales)


def _paged_prefill(case: Case, inputs: tuple[Any, ...]) -> Call:
    q, k, v, table, lens, cu, sinks = inputs[:7]
    o = case.options
    want(sinks is None and k.dtype == q.dtype, "no sinks, and a cache in the dtype of the queries")
    indptr, indices, last = _pages(table, lens, k.shape[2])
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
        _workspace(q.device), "HND", backend="auto"
    )
    wrapper.plan(
        cu, indptr, indices, last, q.shape[1], k.shape[1], q.shape[2], k.shape[2], causal=True,
        window_left=o["window"] - 1 if o.get("window") else -1,
        logits_soft_cap=o.get("softcap") or None, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v))


def _pages(table: Tensor, lens: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Its three int32 tensors: where each sequence's pages start, the pages, tokens on the last."""
    counts = (lens + page - 1) // page
    indptr = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens.device)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(table.shape[1], device=table.device) < counts[:, None]
    return indptr, table[used].int(), (lens - (counts - 1) * page).int()


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _rms_norm(case: Case, inputs: tuple[Any, ...]) -> Call:
    run = import_module("flashinfer").rmsnorm
    x, weight = inputs
    return lambda: run(x, weight, 1e-6)


def _add_rms_norm(case: Case, inputs: tuple[Any, ...]) -> Call:
    """In place: the sum lies in `residual` then, and the norm in `x`."""
    run = import_module("flashinfer").fused_add_rmsnorm
    x, residual, weight = inputs

    def call() -> tuple[Tensor, Tensor]:
        run(x, residual, weight, 1e-6)
        return x, residual

    return call


def _silu_and_mul(case: Case, inputs: tuple[Any, ...]) -> Call:
    run = import_module("flashinfer").silu_and_mul
    return lambda: run(inputs[0])


def _gelu_and_mul(case: Case, inputs: tuple[Any, ...]) -> Call:
    package = import_module("flashinfer")
    tanh = case.options.get("approximate") == "tanh"
    run = package.gelu_tanh_and_mul if tanh else package.gelu_and_mul
    return lambda: run(inputs[0])


def _sampling(case: Case, inputs: tuple[Any, ...], from_logits: bool) -> Call:
    """On float32, which it wants, made before; probabilities too where it starts from those."""
    logits, temperature, top_k, top_p, _, seeds, offsets = inputs
    o = case.options
    some = o.get("temperature", 1.0) > 0 and not o.get("min_p")
    want(some, "drawing, with top-k and top-p only")
    package = import_module("flashinfer").sampling
    x = (logits.float() / temperature[:, None]).contiguous()
    place = {"seed": seeds[:1].clone(), "offset": offsets[:1].clone()}  # no generator in a graph
    if from_logits:
        if o.get("top_k"):
            return lambda: package.top_k_top_p_sampling_from_logits(x, top_k, top_p, **place)
        if o.get("top_p", 1.0) < 1:
            return lambda: package.top_p_sampling_from_probs(package.softmax(x), top_p, **place)
        return lambda: package.sampling_from_logits(x, **place)
    p = x.softmax(-1)
    if o.get("top_k"):
        return lambda: package.top_k_top_p_sampling_from_probs(p, top_k, top_p, **place)
    if o.get("top_p", 1.0) < 1:
        return lambda: package.top_p_sampling_from_probs(p, top_p, **place)
    return lambda: package.sampling_from_probs(p, **place)


FLASH_ATTENTION = (
    _peer(partial(_prefill, backend="fa3"), "flashinfer fa3"),
    _peer(partial(_prefill, backend="fa2"), "flashinfer fa2"),
)
DECODE = _peer(_decode)
PAGED_PREFILL = _peer(_paged_prefill)
RMS_NORM = _peer(_rms_norm)
ADD_RMS_NORM = _peer(_add_rms_norm)
SILU_AND_MUL = _peer(_silu_and_mul)
GELU_AND_MUL = _peer(_gelu_and_mul)
SAMPLE = (
    _peer(partial(_sampling, from_logits=True), "flashinfer", compared=False),
    _peer(partial(_sampling, from_logits=False), "flashinfer from probs", compared=False),
)
