"""A model-based fuzzer of the scheduler and its pages: `python -m tests.runtime.fuzz SEED STEPS`.

A case is drawn from a seed: sizes of the pools, windows, a token budget, requests that share prefixes,
aborts, steps that cannot be launched. The real scheduler runs it under an engine that reads tokens one
step late, on a device that is simulated slot by slot: each slot of each page remembers of which prefix
its keys and values are. After every step the fuzzer checks that all a chunk looks at is where its page
table says, that the pools account for every page, and that service is in order. A case that fails is
reduced to a short one, and reported with its seed and its steps.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from tlk.errors import CapacityError
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, Sequence, Step
from tlk.runtime.scheduler import Scheduler

END = 0  # the token that ends a text
VOCAB = 4
CONTEXT = 64
SHRINKING_RUNS = 400
Reads = list[tuple[Sequence, int]]  # what a launched step drew


class ViolationError(AssertionError):
    """The scheduler broke a rule of the model."""


def demand(holds: bool, rule: str, *got: object) -> None:
    if not holds:
        raise ViolationError(rule + "".join(f", got {g}" for g in got))


@dataclass(frozen=True)
class Arrival:
    """A request that comes before step `at`, and is aborted `abort` steps later if that is not None."""

    at: int
    prompt: tuple[int, ...]
    limit: int
    n: int = 1
    salt: bytes = b""
    prompt_logprobs: bool = False
    abort: int | None = None


@dataclass(frozen=True)
class Case:
    """What one run of the fuzzer does; `end_chance` of 256 tokens drawn end their text."""

    seed: str
    num_pages: tuple[int, ...]
    windows: tuple[int, ...]
    page_size: int
    max_num_seqs: int
    budget: int
    caching: bool
    end_chance: int
    arrivals: tuple[Arrival, ...]
    failures: tuple[int, ...] = ()

    def scheduler(self, kind: type[Scheduler]) -> Scheduler:
        return kind(
            self.num_pages,
            self.windows,
            self.page_size,
            self.max_num_seqs,
            self.budget,
            CONTEXT,
            enable_prefix_caching=self.caching,
        )

    def draw(self, number: int, index: int, position: int) -> int:
        """The token that sequence `index` of a request draws at a position, whatever ran before."""
        name = f"{self.seed} {number} {index} {position}".encode()
        end, token = blake2b(name, digest_size=2).digest()
        return END if end < self.end_chance else 1 + token % VOCAB

    def expected(self, number: int, index: int) -> list[int]:
        """What a request's sequence generates when nobody aborts it."""
        arrival, output = self.arrivals[number], []
        while len(output) < arrival.limit and END not in output[-1:]:
            output.append(self.draw(number, index, len(arrival.prompt) + len(output)))
        return output

    @property
    def patience(self) -> int:
        """Steps after which the oldest request must have had another turn."""
        longest = max((len(a.prompt) + a.limit for a in self.arrivals), default=0)
        return self.max_num_seqs * longest + 10


def draw_case(seed: str) -> Case:
    """A case of up to 30 requests on pools of a few pages."""
    r = random.Random(seed)
    page_size, budget, seqs = r.choice([1, 2, 3, 4]), r.choice([1, 2, 3, 5, 8, 20]), r.randint(1, 6)
    windows = r.choice([(0,), (0,), (0, 0), (r.randint(1, 12),), (0, r.randint(1, 12)), (3, 7)])
    longest = r.choice([6, 12, 30])
    least = -(-(longest + 12) // page_size)
    plenty = r.choice([1, 1, 2])
    pages = tuple(r.randint(least // 2, least * plenty) for _ in windows)
    stems = [tuple(r.randint(1, VOCAB) for _ in range(longest)) for _ in range(2)]
    arrivals, at = [], 0
    for _ in range(r.randint(1, 30)):
        at += r.choice([0, 0, 0, 1, 1, 2, 10])
        own = tuple(r.randint(1, VOCAB) for _ in range(r.choice([0, 1, 3])))
        arrivals.append(
            Arrival(
                at=at,
                prompt=(r.choice(stems)[: r.randint(1, longest)] + own)[:longest],
                limit=r.randint(1, 12),
                n=min(seqs, r.choice([1, 1, 1, 2, 4])),
                salt=r.choice([b"", b"", b"", b"other"]),
                prompt_logprobs=r.random() < 0.1,
                abort=r.choice([0, 1, 2, 3, 5, 10, 20]) if r.random() < 0.2 else None,
            )
        )
    return Case(
        seed=seed,
        num_pages=pages,
        windows=windows,
        page_size=page_size,
        max_num_seqs=seqs,
        budget=budget,
        caching=r.random() < 0.8,
        end_chance=r.choice([0, 10, 40]),
        arrivals=tuple(arrivals),
        failures=tuple(at for at in range(200) if r.random() < 0.02) if r.random() < 0.2 else (),
    )


class Device:
    """The runner and its memory, to the slot: `memory[g][page]` holds what its tokens' prefixes are.

    A prefix (a salt and all tokens up to a position) has a number. True tokens are known here as soon
    as they are drawn; the host reads them a step later.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.memory = [[[-1] * case.page_size for _ in range(p)] for p in case.num_pages]
        self.tables: list[list[dict[int, int]]] = [
            [{} for _ in range(case.max_num_seqs)] for _ in case.num_pages
        ]
        self.numbers: dict[tuple[int, bytes | int], int] = {}
        self.prefixes: dict[Sequence, list[int]] = {}  # of every position with a token
        self.counts: Counter[str] = Counter()

    def accept(self, request: Request) -> None:
        for sequence in request.sequences:
            prefixes = self.prefixes[sequence] = [self._number(-1, request.salt)]
            for token in request.prompt:
                prefixes.append(self._number(prefixes[-1], token))
            del prefixes[0]

    def launch(self, step: Step) -> Reads:
        """Run a step: tables, copies, writes, then reads, as the kernels are ordered."""
        for g, row, index, page in step.new_pages:
            self.tables[g][row][index] = page
        named = [(g, row, index) for g, row, index, _ in step.new_pages]
        demand(len(named) == len(set(named)), "a table entry is set once per step", step.new_pages)
        self._copy(step)
        written: set[tuple[int, int, int]] = set()
        for chunk in step.chunks:
            for g in range(len(self.memory)):
                self._write(g, chunk.sequence, chunk.start, chunk.start + chunk.count, written)
        for chunk in step.chunks:
            for g in range(len(self.memory)):
                self._read(g, chunk.sequence, chunk.start, chunk.start + chunk.count)
        return [self._sample(chunk.sequence) for chunk in step.chunks if chunk.samples]

    def _copy(self, step: Step) -> None:
        sources = {(g, source) for g, source, _ in step.copies}
        targets = {(g, target) for g, _, target in step.copies}
        demand(not sources & targets, "no page is copied both from and to", step.copies)
        demand(len(targets) == len(step.copies), "a page is copied to once", step.copies)
        for g, source, target in step.copies:
            self.memory[g][target] = self.memory[g][source].copy()
        self.counts["copies"] += len(step.copies)

    def _write(
        self, g: int, sequence: Sequence, start: int, stop: int, written: set[tuple[int, int, int]]
    ) -> None:
        table, size = self.tables[g][sequence.row], self.case.page_size
        for position in range(start, stop):
            page = table[position // size]
            slot = (g, page, position % size)
            demand(slot not in written, "a slot is written once per step", slot)
            written.add(slot)
            self.memory[g][page][position % size] = self.prefixes[sequence][position]

    def _read(self, g: int, sequence: Sequence, start: int, stop: int) -> None:
        table, size, window = (
            self.tables[g][sequence.row],
            self.case.page_size,
            self.case.windows[g],
        )
        first = max(0, start - window + 1) if window else 0
        begin = first // size * size
        seen = [
            value
            for index in range(begin // size, -(-stop // size))
            for value in self.memory[g][table.get(index, -1)]
        ][first - begin : stop - begin]
        demand(
            seen == self.prefixes[sequence][first:stop],
            f"{name(sequence)} finds the prefixes of its tokens {first} to {stop} in group {g}",
            (seen, self.prefixes[sequence][first:stop]),
        )

    def _sample(self, sequence: Sequence) -> tuple[Sequence, int]:
        prefixes = self.prefixes[sequence]
        token = self.case.draw(int(sequence.request.id), sequence.index, len(prefixes))
        prefixes.append(self._number(prefixes[-1], token))
        return sequence, token

    def _number(self, prefix: int, token: bytes | int) -> int:
        return self.numbers.setdefault((prefix, token), len(self.numbers))


@dataclass
class Run:
    """One case under the engine's loop. `step` makes a step; `log` has a line for each."""

    case: Case
    kind: type[Scheduler] = Scheduler
    now: int = 0
    flight: Reads = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = self.case.scheduler(self.kind)
        self.device = Device(self.case)
        self.counts = self.device.counts
        self.arrivals = list(enumerate(self.case.arrivals))
        self.requests: dict[int, Request] = {}  # the unfinished ones, by order of arrival
        self.content: dict[
            tuple[int, bytes], list[int]
        ] = {}  # of published pages, by group and key
        self.begun: set[int] = set()
        self.last_turn = 0

    def complete(self) -> Counter[str]:
        """Run to the end; ViolationError, or what the scheduler raises, if anything is wrong."""
        while self.arrivals or self.requests or self.flight:
            self.step()
        demand(not self.scheduler.has_work(), "no work is left at the end")
        left = (self.scheduler.running, self.scheduler.waiting, *self.scheduler.pages_used)
        demand(not any(left), "no sequence or page is left at the end", left)
        self.counts["steps"] += self.now
        self.counts["preemptions"] += self.scheduler.preemptions
        self.counts["cached_tokens"] += self.scheduler.cached_tokens
        return self.counts

    def step(self) -> None:
        """What the engine does between two launches."""
        while self.arrivals and self.arrivals[0][1].at <= self.now:
            self._add(*self.arrivals.pop(0))
        self._abort(late=False)
        before = [s for s in self._sequences() if s.row >= 0]
        step = self.scheduler.schedule()
        reads: Reads = []
        if step is None:
            demand(bool(self.flight) or not self.requests, "a step is made while there is work")
            self.log.append(f"{self.now}: nothing to schedule")
        else:
            self._check_step(step, before)
            self.log.append(f"{self.now}: {text(step)}")
            if self.now in self.case.failures:
                self._fail(step)
            else:
                reads = self.device.launch(step)
                self._check_tables()
        self._abort(late=True)
        self._read()
        self.flight = reads
        self._check_pools()
        self._check_turn(step)
        self.now += 1

    def _abort(self, late: bool) -> None:
        """Abort what is due; every other request late, when a step is launched and none read."""
        for number, request in list(self.requests.items()):
            arrival = self.case.arrivals[number]
            due = arrival.abort is not None and arrival.at + arrival.abort <= self.now
            if due and late == number % 2:
                self.counts["aborts"] += 1
                demand(self.scheduler.abort(request.id), "an unfinished request can be aborted")
                self._ended(request, "abort")
                demand(not self.scheduler.abort(request.id), "a request is aborted once")

    def _add(self, number: int, arrival: Arrival) -> None:
        params = SamplingParams(n=arrival.n, prompt_logprobs=0 if arrival.prompt_logprobs else None)
        request = Request(
            str(number),
            list(arrival.prompt),
            params,
            arrival.limit,
            frozenset({END}),
            salt=arrival.salt,
            groups=len(self.case.windows),
        )
        pages = -(-(len(arrival.prompt) + arrival.limit - 1) // self.case.page_size)
        try:
            self.scheduler.add(request)
        except CapacityError:
            demand(pages > min(self.case.num_pages), "a request that fits is taken")
            return
        self.requests[number] = request
        self.device.accept(request)

    def _fail(self, step: Step) -> None:
        self.counts["failures"] += 1
        for request in self.scheduler.fail(step):
            self._ended(request, "error")
        demand(all(c.sequence.finished for c in step.chunks), "a failed step ends its requests")

    def _ended(self, request: Request, reason: str) -> None:
        for sequence in request.sequences:
            demand(sequence.finished, f"{name(sequence)} has ended")
            demand(not any(sequence.pages), f"{name(sequence)} holds no pages")
        demand(reason in {s.finish_reason for s in request.sequences}, f"{reason} is the reason")
        del self.requests[int(request.id)]

    def _read(self) -> None:
        """Read the tokens of the step before the one just launched."""
        for sequence, token in self.flight:
            if sequence.finished:
                continue
            sequence.append(token)
            if sequence.finished:
                self.counts["late_ends"] += sequence.pending > 0
                request = sequence.request
                expected = self.case.expected(int(request.id), sequence.index)
                demand(sequence.output == expected, "the output is as expected", sequence.output)
                self.scheduler.finish(sequence)
                if request.finished:
                    del self.requests[int(request.id)]

    def _sequences(self) -> Iterator[Sequence]:
        for request in self.requests.values():
            yield from (s for s in request.sequences if not s.finished)

    def _check_step(self, step: Step, before: list[Sequence]) -> None:
        """Order, budget and rows of what was scheduled."""
        chunks = step.chunks
        sequences = [chunk.sequence for chunk in chunks]
        demand(0 < step.tokens <= self.case.budget, "a step keeps to the budget", step.tokens)
        demand(len(set(sequences)) == len(sequences), "a sequence has one chunk")
        rows = [s.row for s in self._sequences() if s.row >= 0]
        demand(len(set(rows)) == len(rows), "a row has one sequence", rows)
        for chunk in chunks:
            s, length = chunk.sequence, len(self.device.prefixes[chunk.sequence])
            demand(not s.finished and s.row >= 0 < chunk.count, f"{name(s)} runs")
            demand(chunk.start + chunk.count == s.computed <= length, "a chunk ends where it says")
            demand(chunk.samples == (s.computed == length), "a chunk samples at the end")
            demand(s.drawn <= s.request.limit, f"{name(s)} draws no more than it may", s.drawn)
            demand(s in before or s.pending == chunk.samples, f"{name(s)} starts from known tokens")
            number = int(s.request.id)
            skipped = self.requests.keys() - self.begun
            demand(
                number in self.begun or number <= min(skipped), f"request {number} waits its turn"
            )
            self.begun.add(number)
        preempted = [place(s) for s in before if s.row < 0]
        served = [place(s) for s in sequences]
        demand(
            not preempted or min(preempted) > max(served), "the youngest is preempted", preempted
        )
        due = [
            s for s in before if s.row >= 0 and (s not in sequences and s.drawn < s.request.limit)
        ]
        demand(not due or step.tokens == self.case.budget or preempted, "who runs has a chunk", due)

    def _check_tables(self) -> None:
        """The runner knows the pages of all that run."""
        for sequence in self._sequences():
            if sequence.row >= 0:
                for g, pages in enumerate(sequence.pages):
                    known = self.device.tables[g][sequence.row]
                    same = all(p < 0 or known.get(index) == p for index, p in enumerate(pages))
                    demand(same, "the runner knows all pages", known, pages)

    def _check_pools(self) -> None:
        """Every page is free, idle or owned by as many as name it; what is published stays true."""
        for g, group in enumerate(self.scheduler.groups):
            pool = group.pool
            owners = Counter(p for s in self._sequences() for p in s.pages[g] if p >= 0)
            counted = {page: n for page, n in enumerate(pool.owners) if n}
            demand(owners == counted, f"pages of group {g} have the owners that name them", counted)
            free = set(pool._free)
            states = [free, set(pool._idle), set(counted)]
            whole = len(pool._free) + len(pool._idle) + len(counted) == pool.num_pages
            demand(whole and len(set().union(*states)) == pool.num_pages, "no page is lost", states)
            demand(not free & set(pool.published.values()), "no free page is published")
            for key, page in pool.published.items():
                slots = self.device.memory[g][page]
                first = self.content.setdefault((g, key), slots.copy())
                demand(slots == first and -1 not in slots, "a key stands for one prefix", slots)

    def _check_turn(self, step: Step | None) -> None:
        oldest = min(self.requests, default=None)
        served = {int(c.sequence.request.id) for c in step.chunks} if step else set()
        if oldest is None or oldest in served:
            self.last_turn = self.now
        waited = self.now - self.last_turn
        demand(waited <= self.case.patience, f"request {oldest} is served in time", waited)


def name(sequence: Sequence) -> str:
    return f"sequence {sequence.request.id}.{sequence.index}"


def place(sequence: Sequence) -> tuple[int, int]:
    return int(sequence.request.id), sequence.index


def text(step: Step) -> str:
    chunks = (
        f"{c.sequence.request.id}.{c.sequence.index} [{c.start}, {c.start + c.count})"
        for c in step.chunks
    )
    return f"{' '.join(chunks)}; pages {step.new_pages}; copies {step.copies}"


def failure(run: Run) -> str | None:
    """What goes wrong in a run, if anything."""
    try:
        run.complete()
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def smaller(case: Case) -> Iterator[Case]:
    """Cases with less in them, those with much less first."""
    many = case.arrivals
    half = len(many) // 2
    if half > 1:
        yield replace(case, arrivals=many[:half])
        yield replace(case, arrivals=many[half:])
    for i in range(len(many)):
        yield replace(case, arrivals=many[:i] + many[i + 1 :])
    if case.failures:
        yield replace(case, failures=())
    sooner = max(0, min((a.at for a in many), default=0) - 1)
    if sooner:
        yield replace(case, arrivals=tuple(replace(a, at=a.at - sooner) for a in many))
    for i, a in enumerate(many):
        for less in (
            replace(a, abort=None),
            replace(a, n=1),
            replace(a, limit=(a.limit + 1) // 2),
            replace(a, limit=max(1, a.limit - 1)),
            replace(a, prompt=a.prompt[: (len(a.prompt) + 1) // 2]),
            replace(a, prompt=a.prompt[: max(1, len(a.prompt) - 1)]),
            replace(a, at=0),
            replace(a, at=a.at // 2),
        ):
            if less != a:
                yield replace(case, arrivals=(*many[:i], less, *many[i + 1 :]))


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A small case that still fails: take the first smaller one that does, again and again."""
    runs = 0
    candidates = smaller(case)
    while (candidate := next(candidates, None)) and runs < SHRINKING_RUNS:
        runs += 1
        if fails(candidate):
            case, candidates = candidate, smaller(candidate)
    return case


def fuzz(seed: int, steps: int, kind: type[Scheduler] = Scheduler) -> Counter[str]:
    """Run cases until so many steps were made; AssertionError reports the first that fails."""
    counts: Counter[str] = Counter()
    number = 0
    while counts["steps"] < steps:
        run = Run(draw_case(f"{seed}.{number}"), kind)
        if failure(run):
            run = Run(shrink(run.case, lambda case: failure(Run(case, kind)) is not None), kind)
            lines = "\n  ".join([failure(run) or "", *run.log])
            raise AssertionError(
                f"seed {seed}, case {number}, step {counts['steps'] + run.now}; reduced to\n{run.case}\n  {lines}"
            )
        counts += run.counts
        number += 1
    counts["cases"] = number
    return counts


if __name__ == "__main__":
    print(dict(fuzz(*map(int, sys.argv[1:] or (0, 10_000)))))
