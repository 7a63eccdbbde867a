"""What the kernels need to know of the GPU."""

from functools import lru_cache

import torch

from tlk.kernels._op import pretended_device


def sm(device: torch.device) -> int:
    """Compute capability of `device` as in sm_90, or the pretended one for CPU tensors."""
    if device.type == "cuda":
        return _properties(device.index or 0)[0]
    pretended = pretended_device()
    if pretended is None:
        raise RuntimeError(f"{device} has no compute capability: kernels run on CUDA devices")
    return pretended[0]


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`, or the pretended ones for CPU tensors (else 8)."""
    if device.type == "cuda":
        return _properties(device.index or 0)[1]
    pretended = pretended_device()
    return 8 if pretended is None else pretended[1]


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    p = torch.cuda.get_device_properties(index)
    return 10 * p.major + p.minor, p.multi_processor_count
