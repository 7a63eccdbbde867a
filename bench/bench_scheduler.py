"""Host time of a scheduling step, no GPU needed: `pytest bench/bench_scheduler.py`.

256 requests decode; more of them wait, for a state row or for pages. The table's median is what a step
costs the host, page boundaries included; it should not grow with those who wait.
"""

from typing import Any

import pytest

from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, Step
from tlk.runtime.scheduler import Scheduler

RUNNING, STEPS, PROMPT = 256, 300, 200
LIMIT = STEPS + 100
PAGES = RUNNING * (PROMPT + LIMIT) // 16  # for all that run, to the end


class Decoding:
    """A scheduler with RUNNING sequences past their prompts; each step's tokens are read a step late.

    Those that wait find no row, or with `spare_rows` are more than the pages that are left can hold.
    """

    def __init__(self, waiting: int, spare_rows: int, windows: tuple[int, ...] = (0,)) -> None:
        pages = [PAGES] * len(windows)
        self.scheduler = Scheduler(pages, windows, 16, RUNNING + spare_rows, 8192, 131072)
        self.flight: Step | None = None
        for i in range(RUNNING):
            self.add(i, PROMPT - i % 16)
        while self.scheduler.running < RUNNING or self.scheduler.waiting:
            self.launch()
            self.read()
        for i in range(RUNNING, RUNNING + waiting):
            self.add(i, LIMIT * RUNNING if spare_rows else PROMPT)
        self.launch()

    def add(self, number: int, length: int) -> None:
        groups = len(self.scheduler.groups)
        prompt = [number] * length
        self.scheduler.add(Request(str(number), prompt, SamplingParams(), LIMIT, groups=groups))

    def launch(self) -> None:
        self.flight = self.scheduler.schedule()

    def read(self) -> None:
        assert self.flight is not None
        for chunk in self.flight.chunks:
            if chunk.samples:
                chunk.sequence.append(1)


def measure(benchmark: Any, decoding: Decoding) -> None:
    before = decoding.scheduler.waiting
    benchmark.pedantic(decoding.launch, setup=decoding.read, rounds=STEPS)
    assert decoding.flight is not None and decoding.flight.tokens == RUNNING
    assert decoding.scheduler.waiting == before


@pytest.mark.parametrize("waiting", [0, 64, 512, 4096])
@pytest.mark.parametrize("lacking", ["rows", "pages"])
def test_decode(benchmark, lacking, waiting):
    measure(benchmark, Decoding(waiting, spare_rows=0 if lacking == "rows" else 64))


def test_decode_with_windows(benchmark):
    measure(benchmark, Decoding(0, spare_rows=0, windows=(0, 128)))
