"""10,000 steps of the fuzzer find nothing in the scheduler, and find each bug planted in it."""

from itertools import count

import pytest

from tests.runtime.fuzz import Case, Run, draw_case, failure, fuzz, shrink
from tlk.runtime.scheduler import Scheduler

STEPS = 10_000


class FreesTwice(Scheduler):
    """A preempted sequence's pages are given back, and again: whoever shares them has lost them."""

    def _preempt(self, sequence):
        tables = [table.copy() for table in sequence.pages]
        super()._preempt(sequence)
        for group, table in zip(self.groups, tables, strict=True):
            for page in table:
                if page >= 0 and group.pool.owners[page]:
                    group.pool.release(page)


class FreesDroppedPagesTwice(Scheduler):
    """What a window has passed is given back, but the table does not forget it."""

    def _tidy(self, sequence):
        tables = [table.copy() for table in sequence.pages]
        super()._tidy(sequence)
        for old, table in zip(tables, sequence.pages, strict=True):
            table[:] = old


class LosesAbort(Scheduler):
    """A request is only aborted where it waits for its first turn."""

    def abort(self, request_id):
        return super().abort(request_id) if request_id in self._new else True


class AbortsOnlyWhatRuns(Scheduler):
    """A sequence that was preempted, or waits for a row, keeps its place when aborted."""

    def abort(self, request_id):
        returning = self._returning.copy()
        known = super().abort(request_id)
        self._returning[:] = returning
        return known


class ServesTheLatest(Scheduler):
    """The newest request goes first, so that an old one may wait for ever."""

    def _next_waiting(self):
        return next(reversed(self._new.values()), None) or super()._next_waiting()

    def _start(self, sequence, blocks):
        if sequence in self._new.values() and self._returning:
            self._returning.insert(0, sequence)
            del self._new[sequence.request.id]
        super()._start(sequence, blocks)


class OvertakesLargeRequests(Scheduler):
    """A request that does not fit is passed by those behind it that do."""

    def _fits(self, sequence, blocks):
        if fits := super()._fits(sequence, blocks):
            return fits
        if sequence.request.id in self._new and self._running:
            self._new.move_to_end(sequence.request.id)
        return fits


class ForgetsThePreempted(Scheduler):
    """A preempted sequence finds no place to wait."""

    def _preempt(self, sequence):
        super()._preempt(sequence)
        self._returning.remove(sequence)


class PublishesTheUnknown(Scheduler):
    """A block is published with a token that is still on the device."""

    def _extend_keys(self, sequence):
        output = sequence.output
        sequence.output = [*output, *[1] * sequence.pending]
        super()._extend_keys(sequence)
        sequence.output = output


class SharesWithoutCopying(Scheduler):
    """Sequences of one prompt write to its last page, all of them."""

    def schedule(self):
        step = super().schedule()
        if step is not None:
            step.copies.clear()
        return step


def test_nothing_is_found():
    counts = fuzz(0, STEPS)
    rare = ("preemptions", "copies", "cached_tokens", "aborts", "late_ends", "failures")
    assert all(counts[name] > 20 for name in rare), counts


@pytest.mark.parametrize(
    "planted",
    [
        FreesTwice,
        FreesDroppedPagesTwice,
        LosesAbort,
        AbortsOnlyWhatRuns,
        ServesTheLatest,
        OvertakesLargeRequests,
        ForgetsThePreempted,
        PublishesTheUnknown,
        SharesWithoutCopying,
    ],
)
def test_planted_bugs_are_found(planted):
    with pytest.raises(AssertionError, match=r"^seed 0, case .* reduced to"):
        fuzz(0, STEPS, planted)


def test_a_report_has_the_seed_and_few_steps():
    with pytest.raises(AssertionError) as found:
        fuzz(0, STEPS, ForgetsThePreempted)
    first, case, what, *steps = str(found.value).splitlines()
    assert first.startswith("seed 0, case ")
    assert case.startswith("Case(seed='0.")
    assert "Error: " in what
    assert 1 <= len(steps) <= 20


def test_shrink_keeps_what_fails():
    case = next(c for i in count() if len((c := draw_case(f"7.{i}")).arrivals) > 10)

    def fails(case: Case) -> bool:
        return any(arrival.limit > 2 for arrival in case.arrivals)

    small = shrink(case, fails)
    assert fails(small) and len(small.arrivals) == 1
    assert small.arrivals[0].limit in (3, 4) and len(small.arrivals[0].prompt) == 1


def test_a_case_can_be_run_again():
    first, second = Run(draw_case("3.1")), Run(draw_case("3.1"))
    assert failure(first) is None and failure(second) is None
    assert first.log == second.log and first.counts["steps"] > 0
