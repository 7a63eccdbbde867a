"""Times of tokens become the figures of a serving benchmark, under the names that vLLM uses.

TTFT: from a request's arrival to its first token. TPOT: the time of every later token, on average over a
request. ITL: the time between two successive tokens. Each as mean, median and 99th percentile, in ms.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Served:
    """One request: tokens of its prompt, when it arrived, and when each token came, in seconds."""

    prompt: int
    arrival: float
    tokens: list[float]


@dataclass(frozen=True, slots=True)
class Run:
    """Requests that were served together, and the seconds from the first arrival to the last token."""

    elapsed: float
    requests: Sequence[Served]


def times(runs: Iterable[Run]) -> dict[str, float]:
    """TTFT, TPOT and ITL over the requests of all runs."""
    ttft, tpot, itl = [], [], []
    for run in runs:
        for r in run.requests:
            ttft.append(r.tokens[0] - r.arrival)
            if len(r.tokens) > 1:
                tpot.append((r.tokens[-1] - r.tokens[0]) / (len(r.tokens) - 1))
                itl += [b - a for a, b in zip(r.tokens[:-1], r.tokens[1:], strict=True)]
    figures = {}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        if values:
            figures[f"mean_{name}_ms"] = 1000 * statistics.fmean(values)
            figures[f"median_{name}_ms"] = 1000 * statistics.median(values)
            figures[f"p99_{name}_ms"] = 1000 * percentile(values, 99)
    return figures


def throughput(runs: Sequence[Run]) -> dict[str, float | list[float]]:
    """Rates of the run of median length, the spread of all, and the times of all their tokens."""
    middle = sorted(runs, key=lambda run: run.elapsed)[len(runs) // 2]
    return {
        "completed": len(middle.requests),
        "duration": middle.elapsed,
        "durations": [run.elapsed for run in runs],
        **rates(middle.elapsed, middle.requests),
        **times(runs),
    }


def rates(elapsed: float, requests: Sequence[Served]) -> dict[str, float]:
    """Requests and tokens per second."""
    prompts = sum(r.prompt for r in requests)
    tokens = sum(len(r.tokens) for r in requests)
    return {
        "request_throughput": len(requests) / elapsed,
        "output_throughput": tokens / elapsed,
        "total_token_throughput": (prompts + tokens) / elapsed,
    }


def latency(runs: Sequence[Run]) -> dict[str, float | list[float]]:
    """Seconds of a whole batch (mean and percentiles), tokens/s of the median one, times of tokens."""
    seconds = [run.elapsed for run in runs]
    middle = statistics.median(seconds)
    tokens = sum(len(r.tokens) for r in runs[0].requests)
    return {
        "avg_latency": statistics.fmean(seconds),
        **{f"p{p}_latency": percentile(seconds, p) for p in (10, 25, 50, 75, 90, 99)},
        "latencies": seconds,
        "output_throughput": tokens / middle,
        **times(runs),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
