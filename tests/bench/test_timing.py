import pytest
import torch

from tlk.bench import timing
from tlk.bench.timing import COLD_BYTES, MAX_COPIES, Spread, copies, spread, time_calls


def test_spread_of_samples():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (COLD_BYTES, 1),
        (4 * COLD_BYTES, 1),
        (COLD_BYTES - 1, 2),
        (COLD_BYTES // 7, 8),
        (16, MAX_COPIES),
    ],
)
def test_copies_exceed_the_cache(nbytes, expected):
    assert copies(nbytes) == expected
    assert expected == MAX_COPIES or expected * nbytes >= COLD_BYTES


def test_on_a_cpu_every_copy_gets_its_turn():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(2)]
    result = time_calls(calls, 4, torch.device("cpu"))
    assert seen == [0, 0, 1, 0, 1]  # the first is warm-up
    assert result.repeats == 4 and 0 <= result.p20 <= result.median <= result.p80


class Graphs:
    """Stands for the GPU: a replay of `calls * rounds` calls takes a microsecond each."""

    def __init__(self):
        self.rounds = []

    def captured(self, calls, rounds, stream):
        self.rounds.append(rounds)
        return len(calls) * rounds

    @staticmethod
    def seconds(graph):
        return graph * 1e-6


def test_short_calls_are_repeated_within_a_graph(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(timing, "_captured", graphs.captured)
    monkeypatch.setattr(timing, "_replay_seconds", graphs.seconds)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    ran = []
    calls = [lambda i=i: ran.append(i) for i in range(100)]
    result = time_calls(calls, 3, torch.device("cuda"))
    assert ran == [0, 1]  # warmed up outside of the graph
    assert graphs.rounds == [1, 21]  # 100 µs, so 21 rounds for more than 2 ms
    assert result.median == pytest.approx(1e-6) and result.repeats == 3


class FakeStream:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def synchronize(self):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_on_the_gpu_takes_what_its_bytes_take():
    x, y = (torch.empty(64 << 20, device="cuda") for _ in range(2))
    taken = time_calls([lambda: y.copy_(x)], 5, torch.device("cuda"))
    assert 2 * x.nbytes / 20e12 < taken.median < 2 * x.nbytes / 0.1e12
