"""Start a runner: find out what it needs, size the cache with what is left, capture its graphs.

Graphs bake in the addresses of the pools, so their memory is measured first: the two largest shapes are
captured on pools of one page and given up again. The first tells what the shared pool takes, the second
what each further graph adds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from tlk.runtime.graphs import Graphs, Shape
from tlk.runtime.memory import (
    CPU_CACHE_BYTES,
    MemoryLedger,
    fit_model_len,
    free_bytes,
    pages_for,
    used_bytes,
)
from tlk.runtime.runner import Runner


@dataclass(slots=True)
class Started:
    """What the start of a runner settled, and what it took.

    pages: of each cache group. timings: seconds of each phase. notices: what a user should know.
    """

    max_model_len: int
    pages: list[int]
    ledger: MemoryLedger
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def start(runner: Runner, *, progress: bool = False) -> Started:
    """Warm up, allocate the pools, and capture the graphs unless they come lazily.

    Raises CapacityError if not one page of the cache fits.
    """
    options, device = runner.options, runner.device
    timings: dict[str, float] = {}
    wanted = _wanted_length(runner)
    runner.decoder.prepare(wanted)
    weights = sum(p.numel() * p.element_size() for p in runner.decoder.parameters())
    activations, memory = 0, options.kv_cache_memory
    if device.type == "cuda" and (memory is None or not options.lazy_graphs):
        with _timed(timings, "warm-up", progress):
            activations, spare = _measure(runner, wanted)
        memory = spare if memory is None else memory
    memory = CPU_CACHE_BYTES if memory is None else memory
    budget = options.max_num_batched_tokens
    pages = pages_for(memory, runner.specs, wanted, options.max_num_seqs, budget)
    length, notice = fit_model_len(wanted, pages, runner.specs, memory)
    runner.decoder.prepare(length)
    runner.allocate(pages, length)
    before, notices = used_bytes(device), [notice] if notice else []
    if runner.graphs is not None and not options.lazy_graphs:
        with _timed(timings, "capture", False):
            runner.idle()
            _capture(runner.graphs, runner, progress)
        notices += [_dropped(shape) for shape in runner.graphs.dropped]
    ledger = MemoryLedger(
        weights=weights,
        graphs=max(used_bytes(device) - before, 0),
        activations=activations,
        kv_cache=sum(layer.k.nbytes + layer.v.nbytes for layer in runner.cache.layers),
        free=free_bytes(device),
    )
    return Started(length, pages, ledger, timings, notices)


def _wanted_length(runner: Runner) -> int:
    made_for = runner.decoder.config.max_position_embeddings
    wanted = runner.options.max_model_len or made_for
    if wanted > made_for:
        raise ValueError(
            f"max_model_len must be at most the model's {made_for} positions, got {wanted}"
        )
    return wanted


def _measure(runner: Runner, wanted: int) -> tuple[int, int]:
    """Bytes that the largest step's activations take, and bytes that the cache may have."""
    options, device = runner.options, runner.device
    total = torch.cuda.mem_get_info(device)[1]
    runner.allocate([1] * len(runner.groups), wanted)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    runner.rehearse(wanted)
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - resting
    torch.cuda.empty_cache()
    used = used_bytes(device)
    graphs = 0
    if runner.graphs is not None:
        runner.idle()
        graphs = _graph_bytes(runner.graphs, runner, device)
        runner.graphs.clear()
    spare = int(total * options.gpu_memory_utilization) - used - activations - graphs
    return activations, max(spare, 0)


def _graph_bytes(graphs: Graphs, runner: Runner, device: torch.device) -> int:
    """What all graphs will take, from the two largest."""
    shapes, taken = graphs.shapes, [used_bytes(device)]
    for shape in shapes[:2]:
        graphs.capture(shape, runner.forward)
        taken.append(used_bytes(device))
    more = max(taken[2] - taken[1], 0) if len(taken) > 2 else 0
    return max(taken[1] - taken[0], 0) + more * (len(shapes) - 1)


def _capture(graphs: Graphs, runner: Runner, progress: bool) -> None:
    for shape in tqdm(graphs.shapes, "capturing graphs", disable=not progress, unit="graph"):
        graphs.capture(shape, runner.forward)


def _dropped(shape: Shape) -> str:
    kind = "decode" if shape.max_q == 1 else "mixed"
    return (
        f"no CUDA graph for {kind} steps of {shape.tokens} tokens: memory ran out at its capture; "
        "lower gpu_memory_utilization to make room"
    )


@contextmanager
def _timed(timings: dict[str, float], phase: str, progress: bool) -> Iterator[None]:
    started = time.perf_counter()
    bar = tqdm(desc=phase, total=1, disable=not progress, bar_format="{desc}: {elapsed}")
    yield
    bar.update()
    bar.close()
    timings[phase] = time.perf_counter() - started
