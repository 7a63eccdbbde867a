"""What `flash_attention` asks of its arguments, and how it reads those that may be left out."""

import torch
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)

MAX_HEAD_DIM = 256
FP8 = torch.float8_e4m3fn
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_options(softmax_scale: float, window: int, softcap: float) -> None:
    """Raise ValueError for an option out of its range."""
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be > 0, got {softmax_scale}")
    if window < 0:
        raise ValueError(f"window must be >= 0, got {window}")
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0, got {softcap}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, varlen: bool) -> None:
    """Raise TypeError or ValueError unless queries, keys, values and sinks belong together."""
    check_dtype("q", q, *FLOATS, FP8)
    check_shape("q", q, *([None] * (3 if varlen else 4)))
    check_shape("k", k, *([None] if varlen else [q.shape[0], None]), None, q.shape[-1])
    check_shape("v", v, *k.shape[:-1], None)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, x, q.dtype)
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[-2]} heads, got {q.shape[-2]}")
    if sinks is not None:
        check_dtype("sinks", sinks, *FLOATS)
        check_shape("sinks", sinks, q.shape[-2])
        check_device("sinks", sinks, q.device)


def check_lengths(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
) -> None:
    """Raise TypeError or ValueError unless all or none of the lengths are given, and fit `q`."""
    given = [x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_q, max_k)]
    if any(given) and not all(given):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k, max_q and max_k must be given together, got only some"
        )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    check_shape("cu_seqlens_q", cu_seqlens_q, None)
    check_shape("cu_seqlens_k", cu_seqlens_k, *cu_seqlens_q.shape)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, x, torch.int32)
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)


def check_scales(
    q: Tensor, k: Tensor, scales: tuple[Tensor | None, ...], out_dtype: torch.dtype | None
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], torch.dtype | None]:
    """The scales of `q`, `k` and `v`, all of them or none, and the dtype of the output if it is not q's.

    Raises TypeError or ValueError for scales or an `out_dtype` without 8-bit inputs, and for
    wrong dtypes, shapes and devices.
    """
    if q.dtype != FP8:
        if any(s is not None for s in scales):
            raise ValueError(
                f"q_scale, k_scale and v_scale are for 8-bit q, k and v, got {q.dtype}"
            )
        if out_dtype not in (None, q.dtype):
            raise ValueError(f"out_dtype must be that of q, {q.dtype}, got {out_dtype}")
        return (None, None, None), None
    if out_dtype not in (None, *OUT_DTYPES):
        raise TypeError(f"out_dtype must be one of {OUT_DTYPES}, got {out_dtype}")
    heads = (q.shape[-2], k.shape[-2], k.shape[-2])
    for name, scale, n in zip(("q_scale", "k_scale", "v_scale"), scales, heads, strict=True):
        if scale is not None:
            check_dtype(name, scale, torch.float32)
            check_shape(name, scale, 1 if scale.numel() == 1 else n)
            check_device(name, scale, q.device)
    one = torch.ones(1, device=q.device) if any(s is not None for s in scales) else None
    of_q, of_k, of_v = (one if s is None else s for s in scales)
    return (of_q, of_k, of_v), out_dtype or torch.bfloat16
