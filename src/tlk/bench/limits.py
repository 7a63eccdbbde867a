"""What kernels are judged by, measured in the same run: bandwidths, the launch floor, matmul rates.

A case cannot end before its bytes have moved, one launch after another, nor before the tensor cores
have done its products:

    limit = max(launch + bytes / bandwidth, flops / rate)

Bandwidth is that of a copy, or of a read where a case writes next to nothing: of a kernel, for what a
graph makes of `Tensor.copy_` is slower (H100: 2.43 TB/s where kernels write at 3.0). The launch is that of a
kernel that reads one line, in a CUDA graph: the ramp that programmatic dependent launch leaves
where the GPU has it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.bench.ceilings import ceilings
from tlk.bench.timing import Call, time_calls
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous

LARGE_BYTES = 2 << 30
SIZES = (4096, 8192)
REPEATS = 10
CPU_LAUNCH = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes/s of a copy (read + written) and of a read; seconds of a launch; FLOP/s by dtype."""

    copy: float
    read: float
    launch: float
    matmul: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in self.matmul.items())
        return (
            f"copy {self.copy / 1e12:.2f} TB/s, read {self.read / 1e12:.2f} TB/s, "
            f"launch {self.launch * 1e6:.2f} µs, matmul TFLOP/s: {rates}"
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """The seconds that a case needs at least, what sets them, and the unit of its speed."""

    seconds: float
    by: str
    unit: str


def bound(limits: Limits, nbytes: int, flops: int, written: int, operands: str) -> Bound:
    """The limit of `nbytes` moved, of which `written`, and `flops` on `operands` (a dtype's name)."""
    by, bandwidth = ("read", limits.read) if written * 20 < nbytes else ("copy", limits.copy)
    move = limits.launch + nbytes / bandwidth
    rate = limits.matmul.get({"float16": "bfloat16"}.get(operands, operands))
    if rate is not None and flops / rate > move:
        return Bound(flops / rate, f"{operands} matmul", "TFLOP/s")
    return Bound(move, by, "TB/s")


def kernel_limits(device: torch.device) -> Limits:
    """Measure them: about three seconds on a GPU."""
    if device.type != "cuda":
        rough = ceilings(device)
        copy = rough["copy_bytes_per_s"]
        return Limits(copy, copy, CPU_LAUNCH, {"float32": rough["matmul_flops"]})
    copy, read, launch = _bandwidths(device)
    torch.cuda.empty_cache()
    rates = {name: _matmul_rate(make, device) for name, make in MATMULS.items()}
    torch.cuda.empty_cache()
    return Limits(copy, read, launch, {name: rate for name, rate in rates.items() if rate})


def _bandwidths(device: torch.device) -> tuple[float, float, float]:
    """Bytes/s of a copy and of a read, and seconds of a launch that reads one line."""
    source = torch.zeros(LARGE_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = min(_seconds([partial(_copy, source, target, n)], device) for n in (2048, 8192))
    read = _seconds([partial(_read, source, False)], device)
    launch = _seconds([partial(_read, source[:32], pdl(device))] * 100, device)
    return 2 * source.nbytes / copy, source.nbytes / read, launch


def _seconds(calls: list[Call], device: torch.device) -> float:
    return time_calls(calls, REPEATS, device).median


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    allow_next(PDL)
    wait_for_previous(PDL)
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + program, tl.sum(tl.load(x_ptr + at, mask=at < n, other=0)))


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0), mask=at < n)


def _copy(x: Tensor, y: Tensor, block: int) -> None:
    """Write `x` to `y`, `block` elements a program."""
    _copy_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), BLOCK=block, num_warps=8)


def _read(x: Tensor, dependent: bool) -> Tensor:
    """Sums of 8192 elements each: one launch that reads `x` and writes next to nothing."""
    sums = torch.empty(triton.cdiv(x.numel(), 8192), dtype=x.dtype, device=x.device)
    _read_kernel[sums.shape](
        x, sums, x.numel(), BLOCK=8192, PDL=dependent, num_warps=8, launch_pdl=dependent
    )
    return sums


def _float(n: int, dtype: torch.dtype, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b.t()


def _fp8(n: int, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(n, 1, device=device), torch.ones(1, n, device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8(n: int, device: torch.device) -> Call:
    a, b = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


MATMULS: dict[str, Callable[[int, torch.device], Call]] = {
    "bfloat16": partial(_float, dtype=torch.bfloat16),
    "float32": partial(_float, dtype=torch.float32),
    "float8_e4m3fn": _fp8,
    "int8": _int8,
}


def _matmul_rate(make: Callable[..., Call], device: torch.device) -> float | None:
    """The best FLOP/s of square products; None where the GPU or torch has none of this dtype."""
    try:
        return max(2 * n**3 / _seconds([make(n, device=device)], device) for n in SIZES)
    except (RuntimeError, NotImplementedError):
        return None
