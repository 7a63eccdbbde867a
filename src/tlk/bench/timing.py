"""How long a call takes on the GPU: CUDA graphs over rotated inputs, so that L2 is cold.

A graph holds one call for each copy of the inputs, repeated until it runs for `GRAPH_SECONDS`; each
replay is one sample, its time divided by its calls. Copies together exceed `COLD_BYTES`, more than
any L2, so that each call finds its inputs in device memory, as in a model. Launch gaps count: they
are what a graph of a model has too. On a CPU, wall-clock time of each call.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COLD_BYTES = 160 << 20  # H100 and H200 have 50 MB of L2, B200 126 MB
MAX_COPIES = 8192
GRAPH_SECONDS = 2e-3
MAX_ROUNDS = 64

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of one call: the median of `repeats` samples, and their 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    repeats: int


def spread(samples: Sequence[float]) -> Spread:
    """The median and its surroundings."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered),
        ordered[round(0.2 * last)],
        ordered[round(0.8 * last)],
        len(ordered),
    )


def copies(nbytes: int) -> int:
    """How many sets of inputs of `nbytes` make every call find a cold L2."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // max(nbytes, 1))))


def time_calls(calls: Sequence[Call], repeats: int, device: torch.device) -> Spread:
    """Seconds of one of `calls`, which do the same to different copies of the inputs."""
    if device.type == "cuda":
        return _graph_spread(calls, repeats)
    calls[0]()
    samples = []
    for i in range(repeats):
        start = time.perf_counter()
        calls[i % len(calls)]()
        samples.append(time.perf_counter() - start)
    return spread(samples)


def _graph_spread(calls: Sequence[Call], repeats: int) -> Spread:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles, tunes and allocates what a graph must not
    stream.synchronize()
    graph = _captured(calls, 1, stream)
    once = min(_replay_seconds(graph) for _ in range(2))
    rounds = min(MAX_ROUNDS, int(GRAPH_SECONDS / max(once, 1e-9)) + 1)
    if rounds > 1:
        graph = _captured(calls, rounds, stream)
    _replay_seconds(graph)
    return spread([_replay_seconds(graph) / (rounds * len(calls)) for _ in range(repeats)])


def _captured(
    calls: Sequence[Call], rounds: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
