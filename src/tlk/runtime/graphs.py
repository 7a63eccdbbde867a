"""CUDA graphs of a decoder's step: which shapes are captured, and which one serves a step.

A graph replays the launches of one shape: tokens, sequences and the longest query are fixed, the data
lies at fixed addresses. A step runs in the smallest shape that holds it, its missing rows being padding
that writes nowhere. Decode shapes have one token for each sequence. Mixed shapes hold up to
`MIXED_TOKENS` tokens in any division; beyond, the GPU takes longer than the host needs to launch the
kernels one by one. All graphs share one memory pool, because only one runs at a time.
"""

import gc
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEW_SEQUENCES = 16
MIXED_TOKENS = (16, 32, 64, 128, 256, 512, 1024)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace (32 MiB on sm_90) for each one it has seen."""
    return torch.cuda.Stream(device)


class Shape(NamedTuple):
    """Tokens T, sequences S and the longest query of a step; R rows of it have logits.

    pages: of the longest sequence; the page tables are no wider.
    """

    tokens: int
    sequences: int
    max_q: int
    logit_rows: int
    pages: int


class Outputs(NamedTuple):
    """The residual stream [T, hidden] and the logits [R, vocab] of a step."""

    hidden: Tensor
    logits: Tensor


def decode_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that are captured: 1, 2, 4, then multiples of 8, of 16 from 64, of 32 from 256."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    below = [n for n in sizes if n < max_num_seqs]
    return [*below, max_num_seqs]


def decode_shapes(max_num_seqs: int, pages: int, short_pages: int) -> list[Shape]:
    """Decode shapes for sequences of `pages`, and small ones also for `short_pages`, if that is less.

    A few sequences that could be long have their keys split over programs, whose results a second
    kernel combines. Those known to be short are spared its latency.
    """
    sizes = decode_sizes(max_num_seqs)
    shapes = [Shape(n, n, 1, n, pages) for n in sizes]
    if 0 < short_pages < pages:
        shapes += [Shape(n, n, 1, n, short_pages) for n in sizes if n <= FEW_SEQUENCES]
    return shapes


def mixed_shapes(max_num_seqs: int, max_tokens: int, pages: int) -> list[Shape]:
    """Mixed shapes up to the token budget, each for as many sequences as it may have."""
    shapes = []
    for tokens in MIXED_TOKENS:
        if tokens <= max_tokens:
            sequences = min(tokens, max_num_seqs)
            shapes.append(Shape(tokens, sequences, tokens, sequences, pages))
    return shapes


class Graphs:
    """Captured steps by shape, captured when they are asked for."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        self._shapes = sorted(shapes, key=lambda s: (s.max_q > 1, s.tokens, s.sequences, s.pages))
        self._captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._pool: Any = None
        self.replays = 0
        self.dropped: list[Shape] = []

    @property
    def shapes(self) -> list[Shape]:
        """What can be captured, largest first, so that later graphs fit into the pool of the first."""
        return sorted(self._shapes, key=lambda s: (s.tokens, s.sequences, s.pages), reverse=True)

    def shape_for(self, step: Shape) -> Shape | None:
        """The smallest shape that holds the step, or None."""
        decodes = step.max_q == 1 and step.logit_rows == step.sequences
        for shape in self._shapes:
            if (
                (shape.max_q == 1) == decodes
                and shape.tokens >= step.tokens
                and shape.sequences >= step.sequences
                and shape.pages >= step.pages
            ):
                return shape
        return None

    def clear(self) -> None:
        """Give back all graphs and their memory."""
        self._captured.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, shape: Shape, forward: Callable[[Shape], Outputs]) -> bool:
        """Capture `forward` of a shape; False if memory ran out, and the shape is given up."""
        if shape in self._captured:
            return True
        try:
            self._captured[shape] = self._capture(shape, forward)
        except torch.OutOfMemoryError:
            self._shapes.remove(shape)
            self.dropped.append(shape)
            gc.collect()
            torch.cuda.empty_cache()
            return False
        return True

    def _capture(
        self, shape: Shape, forward: Callable[[Shape], Outputs]
    ) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward(shape)  # kernels compile and libraries set themselves up outside the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            outputs = forward(shape)
        return graph, outputs

    def replay(self, shape: Shape) -> Outputs:
        """Run a captured shape on what lies in the inputs now."""
        graph, outputs = self._captured[shape]
        graph.replay()
        self.replays += 1
        return outputs
