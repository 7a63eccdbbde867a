"""The loop around a scheduler, without a device."""

from itertools import count

from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, Step
from tlk.runtime.scheduler import Scheduler


class Engine:
    """A scheduler and the loop around it: tokens 1, 2, 3, … are read a step after they were drawn."""

    def __init__(
        self, pages=(64,), windows=(0,), page_size=4, seqs=4, budget=64, context=200, **options
    ):
        self.scheduler = Scheduler(pages, windows, page_size, seqs, budget, context, **options)
        self.flight: Step | None = None
        self.tokens = count(1)
        self.names = count()

    def add(self, length: int | list[int], limit=8, n=1, end=-1, **fields) -> Request:
        name = f"r{next(self.names)}"
        prompt = length if isinstance(length, list) else [100 + i for i in range(length)]
        params = SamplingParams(n=n, prompt_logprobs=fields.pop("prompt_logprobs", None))
        groups = len(self.scheduler.groups)
        request = Request(name, prompt, params, limit, frozenset({end}), groups=groups, **fields)
        self.scheduler.add(request)
        return request

    def launch(self) -> Step | None:
        """Schedule and launch a step; read the tokens of the one before."""
        step = self.scheduler.schedule()
        self.read()
        self.flight = step
        return step

    def read(self, token: int | None = None) -> None:
        chunks = self.flight.chunks if self.flight else []
        self.flight = None
        for chunk in chunks:
            if chunk.samples and not chunk.sequence.finished:
                chunk.sequence.append(next(self.tokens) if token is None else token)
                if chunk.sequence.finished:
                    self.scheduler.finish(chunk.sequence)

    def finish(self) -> list[Step]:
        """Every step until nothing is left."""
        steps = []
        while self.scheduler.has_work():
            if step := self.launch():
                steps.append(step)
        return steps


def chunks(step: Step | None) -> list[tuple[str, int, int]]:
    """(sequence, start, stop) of a step's chunks."""
    assert step is not None
    return [
        (f"{c.sequence.request.id}.{c.sequence.index}", c.start, c.start + c.count)
        for c in step.chunks
    ]
