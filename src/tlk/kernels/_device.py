"""What the kernels need to know of the GPU."""

from functools import lru_cache

import torch

from tlk.kernels._op import pretended_sm


def sm(device: torch.device) -> int:
    """Compute capability of `device` as in sm_90, or the pretended one for CPU tensors."""
    if device.type == "cuda":
        return _properties(device.index or 0)[0]
    pretended = pretended_sm()
    if pretended is None:
        raise RuntimeError(f"{device} has no compute capability: kernels run on CUDA devices")
    return pretended


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 8 for CPU tensors, so that tests see several waves."""
    return _properties(device.index or 0)[1] if device.type == "cuda" else 8


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    p = torch.cuda.get_device_properties(index)
    return 10 * p.major + p.minor, p.multi_processor_count
