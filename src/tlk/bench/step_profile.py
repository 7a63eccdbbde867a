"""Where the time of a decode step goes: kernel time by what the kernels do, and the time beside them.

The kernels of some steps are timed by torch.profiler. It slows the host down, so the length of a step is
measured without it: idle is that length less the time in which a kernel ran. On a CPU tlk's ops take
the place of kernels, and idle is everything else. Where kernels overlap (launched dependently, the next
one starts while one still runs, and waits for it), the time counts for the one that started first.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tlk.bench.ceilings import synchronize

CATEGORIES = (
    ("attention", r"attention|flash|fmha|combine|paged_prefill"),
    ("sampling", r"sample|penalt|logprob|threshold|argmax|likeliest|pieces|topk|softmax"),
    ("linears", r"matmul|linear|gemm|gemv|nvjet|cutlass|splitk|_tile_|_dot_|_fma_|epilogue|cublas"),
    ("norms", r"norm"),
    ("other", r""),
)
"""Name and pattern, the first that matches; a norm folded into a matmul counts as the matmul."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Microseconds of one step, on average over `steps` of them.

    gaps: between kernels in the trace, an upper bound of what they are without the profiler.
    kernels: by category. busy: some kernel ran. step: from one step to the next, without the
    profiler. names: the kernels that took longest, and how long.
    """

    steps: int
    step: float
    busy: float
    gaps: float
    kernels: dict[str, float]
    names: dict[str, float]

    @property
    def idle(self) -> float:
        """Microseconds of a step in which no kernel ran."""
        return max(self.step - self.busy, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "steps": self.steps,
            "step_us": self.step,
            "busy_us": self.busy,
            "kernel_us": self.kernels,
            "idle_us": self.idle,
            "gaps_us": self.gaps,
            "share_outside_kernels": self.idle / self.step,
            "longest_us": self.names,
        }


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> StepProfile:
    """Run `step` 2 · `steps` times, first alone and then with the profiler beside it."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    length = (time.perf_counter() - started) / steps * 1e6
    gpu = device.type == "cuda"
    kind = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[kind], acc_events=True) as recorded:  # without, torch 2.11 warns
        for _ in range(steps):
            step()
        synchronize(device)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or ()
        if (event.device_type == DeviceType.CUDA if gpu else event.name.startswith("tlk::"))
    ]
    return summarize(spans, steps, length)


def summarize(spans: Iterable[tuple[str, float, float]], steps: int, length: float) -> StepProfile:
    """The profile of kernels named and timed (start and end, µs) over steps of `length` µs."""
    kernels = {name: 0.0 for name, _ in CATEGORIES}
    names: dict[str, float] = defaultdict(float)
    ordered = sorted(spans, key=lambda span: span[1])
    begun = ordered[0][1] if ordered else 0.0
    busy, reached = 0.0, begun
    for name, start, end in ordered:
        # One that was launched while its predecessor still ran has only waited until then.
        own = max(end - max(start, reached), 0.0) / steps
        kernels[category(name)] += own
        names[name] += own
        busy += own
        reached = max(reached, end)
    longest = dict(sorted(names.items(), key=lambda item: -item[1])[:20])
    gaps = (reached - begun) / steps - busy
    return StepProfile(steps, length, busy, gaps, kernels, longest)


def table(profiled: Mapping[str, Any]) -> str:
    """What `to_dict` gave, as text."""
    step = profiled["step_us"]
    rows = [*profiled["kernel_us"].items(), ("idle", profiled["idle_us"])]
    lines = [f"one step, {step:.1f} µs, on average over {profiled['steps']}:"]
    lines += [f"  {name:10s} {us:9.1f} µs {us / step:7.1%}" for name, us in rows]
    return "\n".join(lines)


def category(name: str) -> str:
    """What the kernel of that name does."""
    return next(kind for kind, pattern in CATEGORIES if re.search(pattern, name, re.IGNORECASE))
