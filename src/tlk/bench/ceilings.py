"""What the machine can do, measured in the run that is judged by it: copy bandwidth, matmul rate."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from tlk import __version__


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    run: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, float]:
    """Median, least and most seconds of `run`, the device waited for."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes/s of a copy (read + written), and FLOP/s of a square matmul.

    On a GPU 4 GiB and 4096³ in bfloat16; on a CPU 64 MiB and 512³ in float32, for its L3 is no limit.
    """
    gpu = device.type == "cuda"
    source = torch.ones(2**30 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), 10, device)["median"]
    n, times = (4096, 20) if gpu else (512, 2)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(times):
            a @ b

    matmul = seconds(products, 5, device)["median"] / times
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "matmul_n": n,
        "matmul_flops": 2 * n**3 / matmul,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions, for the record of a measurement."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "tlk": __version__,
            "torch": torch.__version__,
            "triton": version("triton"),
            "transformers": version("transformers"),
        },
    }
