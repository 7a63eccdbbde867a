import dataclasses

import pytest
import torch

from tests.bench.rows import row
from tlk.bench import kernels
from tlk.bench.case import Case, Inputs
from tlk.bench.kernel_peers.peer import Peer, plain
from tlk.bench.kernels import (
    Bench,
    WrongResultError,
    checked,
    difference,
    dtypes_of,
    name_of,
    seeded,
    small,
)
from tlk.bench.limits import Limits
from tlk.errors import UnsupportedError

CPU = torch.device("cpu")
LIMITS = Limits(copy=1e10, read=2e10, launch=1e-6, matmul={"float32": 1e11})
NEW = Inputs("cpu", torch.float32)


def double(x):
    return x * 2


def case(run=double, reference=double, **changes):
    made = Case(
        "double", "N64", lambda new: (new.randn(64),), run, lambda size: 128 * size, reference,
        dtypes=(torch.float32, torch.float16),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def in_place(x):
    x.mul_(2)


@pytest.fixture
def peers(monkeypatch):
    """What a case is measured against, as the test fills it."""
    made = []
    monkeypatch.setattr(kernels, "peers_of", lambda case: made)
    return made


def test_a_row(peers):
    peers.append(Peer("twice", plain(lambda x: x + x)))
    found = Bench(CPU, LIMITS, repeats=3).row(case(), torch.float32)
    assert (found.op, found.shape, found.dtype, found.operands) == (
        "double",
        "N64",
        "float32",
        "float32",
    )
    assert found.bytes == 512 and found.seconds.repeats == 3 and found.bound.by == "copy"
    assert found.bound.seconds == pytest.approx(1e-6 + 512 / 1e10)
    assert found.ratio("twice") == found.peers["twice"].seconds.median / found.seconds.median
    assert found.of_limit() == found.bound.seconds / found.seconds.median
    assert found.speed() == pytest.approx(512 / found.seconds.median / 1e12)


def test_what_is_written_decides_which_bandwidth_counts(peers):
    total = case(lambda x: x.sum(), lambda x: x.sum(), bytes=lambda size: 65 * size)
    assert Bench(CPU, LIMITS, 1).row(total, torch.float32).bound.by == "read"


def test_speed_is_in_the_unit_of_what_bounds(peers):
    heavy = case(flops=10**9)
    found = Bench(CPU, LIMITS, 1).row(heavy, torch.float32)
    assert found.bound.unit == "TFLOP/s"
    assert found.speed(found.bound.seconds) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x * 2.1, r"double-N64: tensor 0 is off by 5\.0"),
        (lambda x: torch.full_like(x, torch.nan), "off by nan"),
        (lambda x: (x * 2)[:32], r"tensor 0 is torch.float32 \(32,\), not torch.float32 \(64,\)"),
        (lambda x: (x * 2).double(), "tensor 0 is torch.float64"),
        (lambda x: (x * 2, x), "3 tensors, its reference has 2"),
        (lambda x: x.mul_(2).clone(), "tensor 1 is off"),  # writes to an input
    ],
)
def test_a_wrong_result_is_an_error(peers, run, message, monkeypatch):
    monkeypatch.setattr(kernels, "time_calls", lambda *a: pytest.fail("timed a wrong result"))
    with pytest.raises(WrongResultError, match=message):
        Bench(CPU, LIMITS, 1).row(case(run), torch.float32)


def test_a_case_says_how_exact_it_is(peers):
    peers.append(Peer("p", plain(lambda x: x * 2.6)))
    found = Bench(CPU, LIMITS, 1).row(case(lambda x: x * 2.3, tolerance=0.2), torch.float32)
    assert found.ratio("p") is not None  # off by 30 %, of twice 20
    with pytest.raises(WrongResultError, match="off by 15"):
        Bench(CPU, LIMITS, 1).row(case(lambda x: x * 2.3, tolerance=0.1), torch.float32)


def test_ops_in_place_are_compared_by_what_they_write():
    assert checked(case(in_place, in_place), NEW)[2] == 512
    with pytest.raises(WrongResultError, match="tensor 0 is off"):
        checked(case(lambda x: None, in_place), NEW)


def test_every_set_of_inputs_is_reproducible_and_different():
    first, again, other = (seeded(case(), NEW, i)[0] for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_differences():
    ones = torch.ones(100)
    assert difference(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-3)
    ids = torch.arange(100)
    assert difference(ids, ids) == 0 and difference(ids // 2 * 2, ids) == pytest.approx(0.5)
    assert difference(torch.zeros(3), torch.zeros(3)) == 0
    with pytest.raises(WrongResultError, match="shape"):
        difference(ones, ones[:5])


def broken(case, inputs):
    raise RuntimeError("no kernel\n  image")


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (Peer("p", plain(double), "no-such-package", "no_such_module"), "no-such-package is not installed"),
        (Peer("p", broken), "RuntimeError: no kernel image"),
        (Peer("p", plain(lambda x: x * 2.2)), "its result is off by 10.00%"),
        (Peer("p", plain(lambda x: (x * 2, x))), "it gives 2 tensors, not 1"),
        (Peer("p", plain(lambda x: x[:3])), "WrongResultError: shape (3,), not (64,)"),
    ],
)  # fmt: skip
def test_a_peer_that_does_not_run_says_why(peers, peer, why):
    peers += [peer, Peer("good", plain(double))]
    found = Bench(CPU, LIMITS, 1).row(case(), torch.float32)
    assert found.peers["p"].seconds is None and found.peers["p"].reason.startswith(why)
    assert found.ratio("p") is None and found.ratio("good") > 0


def test_a_peer_may_be_less_exact_or_draw_its_own(peers):
    peers += [
        Peer("rough", plain(lambda x: x * 2.2), tolerance=0.2),
        Peer("random", plain(torch.rand_like), compared=False),
        Peer("shaped", plain(lambda x: (x * 2).view(8, 8))),
    ]
    found = Bench(CPU, LIMITS, 1).row(case(), torch.float32)
    assert all(found.ratio(peer.name) for peer in peers)


def test_peers_in_place_are_compared_by_what_they_write(peers):
    peers += [Peer("writes", plain(in_place)), Peer("does not", plain(lambda x: None))]
    found = Bench(CPU, LIMITS, 1).row(case(in_place, in_place), torch.float32)
    assert found.ratio("writes") and "off by" in found.peers["does not"].reason


def test_only_peers_that_are_wanted_run(peers):
    peers += [Peer("a", broken), Peer("b", plain(double))]
    found = Bench(CPU, LIMITS, 1, wanted=lambda name: name == "b").row(case(), torch.float32)
    assert set(found.peers) == {"b"}


def test_on_a_gpu_inputs_rotate(peers, monkeypatch):
    seen = {}

    def time_calls(calls, repeats, device):
        seen["results"] = [call() for call in calls]
        return row().seconds

    monkeypatch.setattr(kernels, "time_calls", time_calls)
    monkeypatch.setattr(kernels, "copies", lambda nbytes: {512: 3}[nbytes])
    bench = Bench(CPU, LIMITS, 1)
    assert bench._copies(512) == 1
    monkeypatch.setattr(Bench, "_copies", lambda self, nbytes: kernels.copies(nbytes))
    bench.row(case(), torch.float32)
    results = seen["results"]
    assert len(results) == 3 and not torch.equal(results[0], results[2])


def test_which_dtypes():
    assert list(dtypes_of(case(), None, every=False)) == [torch.float32]
    assert list(dtypes_of(case(), None, every=True)) == [torch.float32, torch.float16]
    assert list(dtypes_of(case(), torch.float16, every=False)) == [torch.float16]
    assert list(dtypes_of(case(), torch.bfloat16, every=False)) == []
    assert name_of(torch.bfloat16) == "bfloat16"


def test_what_a_cpu_can_do():
    assert small(case(), torch.float32)
    assert not small(case(flops=10**12), torch.float32)
    assert not small(case(bytes=lambda size: 1 << 30), torch.float32)


def test_errors_are_of_tlk():
    assert issubclass(WrongResultError, AssertionError)
    assert str(row()) == "rms_norm-T8192-N4096 bfloat16"
    assert UnsupportedError not in WrongResultError.__mro__
