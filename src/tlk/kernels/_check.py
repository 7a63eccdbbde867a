"""Argument checks of the public kernel functions: name the argument, what was expected, what came."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless `tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{name} must be {expected}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; None stands for any size."""
    if tensor.shape == expected:  # the usual case, in C
        return
    if len(tensor.shape) != len(expected) or any(
        e is not None and e != n for n, e in zip(tensor.shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """Raise ValueError unless `tensor` is on the `expected` device."""
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected}, got {tensor.device}")


def check_last_dim_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless neighbours in the last dimension of `tensor` lie next to each other."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got {tensor.stride()}")
