"""The scheduler's decisions, one by one; test_fuzz.py has what must hold in any order of events."""

import statistics
import time
from itertools import count

import pytest

from tests.runtime.loop import Engine, chunks
from tlk.errors import CapacityError
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request
from tlk.runtime.scheduler import Scheduler


def test_a_request_alone():
    engine = Engine()
    request = engine.add(5, limit=3)
    assert engine.scheduler.waiting == 1
    step = engine.launch()
    assert chunks(step) == [("r0.0", 0, 5)] and step.chunks[0].samples and step.tokens == 5
    assert step.new_pages == [(0, 0, 0, 0), (0, 0, 1, 1)] and step.copies == []
    assert (engine.scheduler.running, engine.scheduler.waiting) == (1, 0)
    assert engine.scheduler.pages_used == [2]
    sequence = request.sequences[0]
    assert sequence.pending == 1 and sequence.computed == 5
    assert chunks(engine.launch()) == [("r0.0", 5, 6)]
    assert chunks(engine.launch()) == [("r0.0", 6, 7)]
    assert sequence.drawn == 3 == request.limit  # two of them read
    assert engine.launch() is None  # the last token is on the device
    assert sequence.output == [1, 2, 3] and sequence.finish_reason == "length"
    assert not engine.scheduler.has_work() and engine.scheduler.pages_used == [0]


def test_a_new_page_is_told_when_a_page_is_full_only():
    engine = Engine(page_size=4)
    engine.add(3, limit=8)
    told = [len(step.new_pages) for step in engine.finish()]
    assert told == [1, 0, 1, 0, 0, 0, 1, 0]


def test_a_sequence_that_ended_unknown_to_the_host_costs_one_step():
    engine = Engine()
    ended, other = engine.add(5, end=7), engine.add(3)
    engine.launch()
    step = engine.scheduler.schedule()  # before it is known that the first drew its last token
    assert chunks(step) == [("r0.0", 5, 6), ("r1.0", 3, 4)]
    engine.read(7)
    assert ended.finished and ended.sequences[0].output == [7]
    assert engine.scheduler.pages_used == [1]
    engine.flight = step
    assert chunks(engine.launch()) == [("r1.0", 4, 5)]
    assert ended.sequences[0].output == [7] and len(other.sequences[0].output) == 2


def test_decodes_go_first_and_prefills_get_what_the_budget_leaves():
    engine = Engine(budget=6)
    engine.add(4), engine.add(13), engine.add(2)
    assert chunks(engine.launch()) == [("r0.0", 0, 4), ("r1.0", 0, 2)]
    assert chunks(engine.launch()) == [("r0.0", 4, 5), ("r1.0", 2, 7)]
    assert chunks(engine.launch()) == [("r0.0", 5, 6), ("r1.0", 7, 12)]
    step = engine.launch()
    assert chunks(step) == [("r0.0", 6, 7), ("r1.0", 12, 13), ("r2.0", 0, 2)]
    assert [chunk.samples for chunk in step.chunks] == [True, True, True]


def test_a_prompt_may_be_computed_token_by_token():
    engine = Engine(budget=1, page_size=2)
    engine.add(5, limit=2)
    steps = engine.finish()
    assert [chunks(step)[0][1:] for step in steps] == [(i, i + 1) for i in range(6)]
    assert [step.chunks[0].samples for step in steps] == [False] * 4 + [True] * 2


def test_a_large_request_is_not_overtaken():
    engine = Engine(pages=(10,), enable_prefix_caching=False)
    engine.add(20, limit=4), engine.add(24, limit=2), engine.add(2, limit=2)
    order = []
    for step in engine.finish():
        order += [name for name, *_ in chunks(step) if name not in order]
    assert order == ["r0.0", "r1.0", "r2.0"]


def test_rows_are_few_and_the_lowest_is_taken():
    engine = Engine(seqs=2)
    first, second, third = engine.add(2, end=1), engine.add(2), engine.add(2)
    engine.launch()
    assert (first.sequences[0].row, second.sequences[0].row, third.sequences[0].row) == (0, 1, -1)
    assert engine.scheduler.running == 2 and engine.scheduler.waiting == 1
    engine.launch()
    assert first.finished and first.sequences[0].row == -1
    engine.launch()
    assert third.sequences[0].row == 0


def test_nobody_is_admitted_into_the_last_pages():
    engine = Engine(pages=(5,), page_size=4)
    engine.add(8), engine.add(8)
    assert len(chunks(engine.launch())) == 2  # 2 + 2 pages, and one for the first to grow
    engine = Engine(pages=(4,), page_size=4)
    engine.add(8), engine.add(8)
    assert len(chunks(engine.launch())) == 1


# Prefixes


def test_a_prefix_is_found_again():
    engine = Engine()
    engine.add(10, limit=1)
    engine.finish()
    request = engine.add(11)
    step = engine.launch()
    assert chunks(step) == [("r1.0", 8, 11)]
    assert [page for *_, page in step.new_pages][:2] == [0, 1] and len(step.new_pages) == 3
    assert request.cached_tokens == engine.scheduler.cached_tokens == 8


def test_the_last_token_is_computed_though_its_page_is_cached():
    engine = Engine()
    engine.add(8, limit=1)
    engine.finish()
    engine.add(8)
    assert chunks(engine.launch()) == [("r1.0", 4, 8)]


def test_prefixes_are_shared_while_their_owner_runs():
    engine = Engine()
    first, second = engine.add(9), engine.add(9)
    engine.launch()  # both compute the prompt: it was not known when they were admitted
    third = engine.add(9)
    assert chunks(engine.launch())[2] == ("r2.0", 8, 9)
    pages = [request.sequences[0].pages[0] for request in (first, second, third)]
    assert pages[2][:2] == pages[0][:2] != pages[1][:2]
    assert engine.scheduler.pages_used == [3 + 3 + 1]


def test_outputs_are_prefixes_too_once_they_are_known():
    engine = Engine()
    engine.add([1, 2, 3], limit=6)
    engine.finish()  # 4 … 9 are positions 3 to 8; 9 is never computed
    engine.add([1, 2, 3, 1, 2, 3, 4, 5, 6])
    assert chunks(engine.launch()) == [("r1.0", 8, 9)]


def test_a_token_on_the_device_is_in_no_prefix():
    engine = Engine()
    sequence = engine.add([1, 2, 3], limit=6).sequences[0]
    engine.launch()
    engine.launch()  # computes position 3, whose token was read afterwards only
    assert sequence.computed == 4 and not engine.scheduler.groups[0].pool.published
    engine.launch()
    assert len(engine.scheduler.groups[0].pool.published) == 1


@pytest.mark.parametrize(
    "fields", [{"salt": b"adapter"}, {"prompt_logprobs": 0}], ids=["salt", "prompt_logprobs"]
)
def test_what_must_not_use_the_prefix_computes_it(fields):
    engine = Engine()
    engine.add(10, limit=1)
    engine.finish()
    request = engine.add(10, **fields)
    assert chunks(engine.launch()) == [("r1.0", 0, 10)] and request.cached_tokens == 0


def test_prefix_caching_can_be_off():
    engine = Engine(enable_prefix_caching=False)
    engine.add(10, limit=1)
    engine.finish()
    engine.add(10)
    assert chunks(engine.launch()) == [("r1.0", 0, 10)]
    assert engine.scheduler.groups[0].pool.idle == 0


def test_cached_pages_are_evicted_for_those_who_need_them():
    engine = Engine(pages=(4,))
    engine.add(12, limit=1)
    engine.finish()
    assert engine.scheduler.groups[0].pool.idle == 3
    engine.add([7] * 12, limit=2)
    assert chunks(engine.launch()) == [("r1.0", 0, 12)]
    assert engine.scheduler.groups[0].pool.available == 1


# Preemption


def test_the_youngest_gives_way_and_comes_back_at_its_place():
    engine = Engine(pages=(6,), seqs=3, enable_prefix_caching=False)
    old, young, late = engine.add(8, limit=8), engine.add(7, limit=6), engine.add(2, limit=2)
    assert chunks(engine.launch()) == [("r0.0", 0, 8), ("r1.0", 0, 7)]  # 2 + 2 pages of 6
    engine.launch(), engine.launch()  # 3 + 3 pages
    while engine.scheduler.preemptions == 0:
        engine.launch()
    assert old.sequences[0].row == 0 and young.sequences[0].row == -1
    assert young.sequences[0].computed == 0 and young.sequences[0].pages == [[]]
    later = [name for step in engine.finish() for name, *_ in chunks(step)]
    assert later.index("r1.0") < later.index("r2.0")
    for request in (old, young, late):
        assert request.sequences[0].finish_reason == "length"
    assert sorted(s for r in (old, young, late) for s in r.sequences[0].output) == list(
        range(1, 17)
    )


def test_a_preempted_sequence_waits_for_its_token():
    engine = Engine(pages=(4,), enable_prefix_caching=False)
    engine.add(4, limit=9), engine.add(3, limit=6)
    young = engine.scheduler._requests["r1"].sequences[0]
    while engine.scheduler.preemptions == 0:
        step = engine.scheduler.schedule()
        if young.row >= 0:
            engine.read()
            engine.flight = step
    assert young.pending == 1 and young.drawn == 1 + len(young.output)
    engine.read()
    assert young.pending == 0
    engine.flight = step
    again = [c for step in engine.finish() for c in chunks(step) if c[0] == "r1.0"]
    assert again[0] == ("r1.0", 0, young.request.limit + 3 - len(again))
    assert len(young.output) == 6


def test_a_preempted_sequence_finds_its_own_pages():
    engine = Engine(pages=(6,), seqs=3)
    engine.add([1] * 8, limit=9), engine.add([2] * 7, limit=6)
    steps = engine.finish()
    assert engine.scheduler.preemptions == 1
    starts = [start for step in steps for name, start, stop in chunks(step) if name == "r1.0"]
    resumed = next(i for i in range(1, len(starts)) if starts[i] <= starts[i - 1])
    assert starts[resumed] in (4, 8)


def test_a_preempted_sequence_is_not_resumed_while_its_token_is_on_the_device():
    engine = Engine(pages=(4,), enable_prefix_caching=False)
    old, young = engine.add(4, limit=9), engine.add(3, limit=6)
    while not engine.scheduler.preemptions:
        engine.read()
        engine.flight = engine.scheduler.schedule()
    young.sequences[0].output.pop()
    young.sequences[0].pending += 1  # as if its last token was not read yet
    engine.scheduler.abort(old.id)
    assert engine.scheduler.schedule() is None and young.sequences[0].row == -1
    young.sequences[0].append(1)
    assert chunks(engine.scheduler.schedule())[0][0] == "r1.0"


def test_what_a_preempted_sequence_computes_again_is_published_again():
    engine = Engine(pages=(6,))
    engine.add([1] * 8, limit=16), engine.add([2] * 7, limit=6)  # the first needs all pages
    engine.finish()
    assert engine.scheduler.preemptions == 1
    engine.add([2] * 7)
    assert chunks(engine.launch()) == [("r2.0", 4, 7)]


# Several continuations


@pytest.mark.parametrize("caching", [True, False])
def test_continuations_share_the_prompt_and_copy_what_they_write_to(caching):
    engine = Engine(enable_prefix_caching=caching)
    request = engine.add(6, n=3)
    assert chunks(engine.launch()) == [("r0.0", 0, 6)]
    assert engine.scheduler.pages_used == [2] and engine.scheduler.waiting == 2
    step = engine.launch()
    assert chunks(step) == [("r0.0", 6, 7), ("r0.1", 5, 6), ("r0.2", 5, 6)]
    assert step.copies == [(0, 1, 2), (0, 1, 3)]  # the last to write keeps the page
    assert [s.pages[0] for s in request.sequences] == [[0, 2], [0, 3], [0, 1]]
    assert step.new_pages == [(0, 0, 1, 2), (0, 1, 0, 0), (0, 1, 1, 3), (0, 2, 0, 0), (0, 2, 1, 1)]
    engine.finish()
    assert [len(s.output) for s in request.sequences] == [8, 8, 8]
    assert engine.scheduler.pages_used == [0]


def test_a_whole_last_page_is_not_copied_for_its_first_token():
    engine = Engine()
    engine.add(5, n=2)
    engine.launch()
    assert engine.launch().copies == []  # position 4 is the first of its page


def test_continuations_wait_for_rows_before_new_requests_do():
    engine = Engine(seqs=2)
    engine.add(4, limit=3, n=2), engine.add(4, limit=3)
    assert chunks(engine.launch()) == [("r0.0", 0, 4)]
    assert [name for name, *_ in chunks(engine.launch())] == ["r0.0", "r0.1"]


def test_continuations_that_wait_give_their_pages_back_if_need_be():
    engine = Engine(pages=(4,), seqs=2, enable_prefix_caching=False)
    request = engine.add(7, limit=9, n=2)
    engine.launch()
    engine.finish()
    assert engine.scheduler.preemptions > 0
    assert [len(s.output) for s in request.sequences] == [9, 9]


def test_continuations_outlive_the_first():
    engine = Engine(budget=6)
    request = engine.add(6, limit=1, n=3)
    engine.launch()
    engine.read()
    assert request.sequences[0].finished and not request.finished
    engine.finish()
    assert [len(s.output) for s in request.sequences] == [1, 1, 1]


# Windows


def test_a_window_keeps_only_what_it_sees():
    engine = Engine(pages=(64, 4), windows=(0, 5), page_size=2, budget=3)
    sequence = engine.add(20, limit=12).sequences[0]
    while engine.scheduler.has_work():
        if step := engine.launch():
            stop = chunks(step)[0][2]
            assert len(sequence.pages[0]) == -(-stop // 2)
            held = [page for page in sequence.pages[1] if page >= 0]
            assert len(held) <= 4
    assert len(sequence.output) == 12


def test_a_chunk_is_no_longer_than_a_small_pool_holds_beside_the_window():
    assert Engine(pages=(64, 4), windows=(0, 5), page_size=2, budget=50).scheduler.max_chunk == 3
    assert Engine(pages=(64, 400), windows=(0, 5), page_size=2, budget=50).scheduler.max_chunk == 50
    engine = Engine(pages=(2,), windows=(50,), page_size=2, budget=50)  # all it takes is short
    assert engine.scheduler.max_chunk == 50
    engine.add(3, limit=2)
    assert chunks(engine.launch()) == [("r0.0", 0, 3)]


def test_a_prefix_needs_the_window_only():
    engine = Engine(pages=(16,), windows=(3,), page_size=2)
    engine.add(9, limit=1)
    engine.finish()
    pool = engine.scheduler.groups[0].pool
    first = engine.scheduler.groups[0].pool.published
    for key in list(first)[:3]:  # as if evicted
        del pool.published[key]
    sequence = engine.add(9).sequences[0]
    assert chunks(engine.launch()) == [("r1.0", 8, 9)]
    assert sequence.pages[0][:3] == [-1, -1, -1] and sequence.pages[0][3] >= 0


# The end of requests


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("n", [1, 3])
def test_abort_at_any_time(n, steps):
    engine = Engine(budget=3, seqs=3)
    other, request = engine.add(2, limit=20), engine.add(7, limit=20, n=n)
    for _ in range(steps):
        engine.launch()
    assert engine.scheduler.abort(request.id)
    assert {s.finish_reason for s in request.sequences} == {"abort"}
    assert not any(any(s.pages) or s.row >= 0 for s in request.sequences)
    assert not engine.scheduler.abort(request.id)
    left = [name for step in engine.finish() for name, *_ in chunks(step)]
    assert set(left) == {"r0.0"} and len(other.sequences[0].output) == 20
    assert engine.scheduler.pages_used == [0] and engine.scheduler.waiting == 0


def test_what_is_aborted_unserved_holds_up_nobody():
    engine = Engine(seqs=1)
    engine.add(2, limit=2)
    waiting = [engine.add(2) for _ in range(3)]
    engine.launch()
    for request in waiting[:2]:
        assert engine.scheduler.abort(request.id)
    assert not engine.scheduler.abort("nobody")
    assert engine.scheduler.waiting == 1
    assert {name for step in engine.finish() for name, *_ in chunks(step)} == {"r0.0", "r3.0"}


def test_a_step_that_was_not_launched_fails_its_requests_and_no_others():
    engine = Engine(budget=9)
    first, second, third = engine.add(9, n=2), engine.add([1] * 9), engine.add([2] * 9)
    step = engine.scheduler.schedule()
    assert engine.scheduler.fail(step) == [first]
    assert [s.finish_reason for s in first.sequences] == ["error", "error"]
    pool = engine.scheduler.groups[0].pool
    assert engine.scheduler.pages_used == [0] and not pool.published  # nothing was computed
    engine.finish()
    assert second.sequences[0].finish_reason == third.sequences[0].finish_reason == "length"


def test_an_id_can_be_used_again():
    engine = Engine()
    request = engine.add(2)
    engine.launch()
    engine.scheduler.abort(request.id)
    engine.names = count()
    engine.add(2)
    engine.scheduler.finish(request.sequences[0])  # told twice
    assert engine.scheduler.has_work()
    engine.finish()


def test_only_the_finished_can_finish():
    engine = Engine()
    request = engine.add(2)
    with pytest.raises(ValueError, match="sequence 0 of r0 has not finished"):
        engine.scheduler.finish(request.sequences[0])


# Bad input


def test_what_cannot_be_served_is_refused():
    engine = Engine(pages=(6,), context=30)
    with pytest.raises(ValueError, match="prompt has 30 tokens and the context 30"):
        engine.add(30, limit=1)
    with pytest.raises(ValueError, match=r"limit must be at least 1 and at most 20, .* got 21"):
        engine.add(10, limit=21)
    with pytest.raises(ValueError, match=r"limit must be at least 1 .* got 0"):
        engine.add(10, limit=0)
    with pytest.raises(ValueError, match=r"n must be at most max_num_seqs \(4\), got 5"):
        engine.add(10, n=5)
    engine.add(15, limit=10)
    message = "15 tokens and 11 new ones, .* are 25 tokens: 7 pages of 4, and cache group 0 has 6"
    with pytest.raises(CapacityError, match=message):
        engine.add(15, limit=11)
    engine.names = count(4)
    with pytest.raises(ValueError, match="request id 'r4' is taken"):
        engine.add(2)
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        engine.scheduler.add(Request("two", [1], SamplingParams(), 1, groups=2))
    assert len(engine.finish()) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4], [0, 0], 4, 1, 1, 1), r"one entry per cache group, got \[4\] and \[0, 0\]"),
        (([], [], 4, 1, 1, 1), "one entry per cache group"),
        (([4], [0], 0, 1, 1, 1), "page_size at least 1"),
        (([4], [0], 4, 0, 1, 1), "max_num_seqs, .* must be positive, got 0"),
        (([4], [0], 4, 1, 0, 1), "must be positive, got 0"),
        (([4], [0], 4, 1, 1, -1), "must be positive, got -1"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(*arguments)


# Speed


def decode_seconds(waiting: int, steps: int = 40) -> float:
    """Median CPU time of a step for 256 sequences that decode, with so many requests behind them."""
    engine = Engine(pages=(8192,), page_size=16, seqs=256, budget=8192)
    for i in range(256 + waiting):
        engine.add([1 + i] * (10 + i % 16), limit=100)
    for _ in range(4):
        engine.launch()
    seconds = []
    for _ in range(steps):
        start = time.thread_time()
        step = engine.scheduler.schedule()
        seconds.append(time.thread_time() - start)
        assert len(step.chunks) == 256
        engine.read()
        engine.flight = step
    return statistics.median(seconds)


def test_a_step_takes_less_than_a_millisecond_whoever_waits():
    """0.25 ms on a core of the build machine; the best of several runs, as caches are shared too."""
    idle, busy = (min(decode_seconds(waiting) for _ in range(4)) for waiting in (0, 4096))
    assert idle < 1e-3 and busy < 1e-3 and busy < 1.5 * idle
