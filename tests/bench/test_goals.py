import re

import pytest

from tests.bench.rows import row
from tlk.bench.case import load_cases
from tlk.bench.goals import GOALS, LAYERS, Goal, Target, judge, lacking
from tlk.bench.kernel_peers import peers_of
from tlk.bench.limits import Limits

LIMITS = Limits(copy=4e12, read=4.4e12, launch=1e-6, matmul={})
CASES = {(case.op, case.shape): case for cases in load_cases().values() for case in cases}
NORM = Goal(
    "norm", "rms_norm", ("T8192-N4096",), ("flashinfer",), Target("peer", 1.0), Target("copy", 0.92)
)
SUM = Goal(
    "linears", "matmul", tuple(f"M1-{n}" for n in LAYERS), ("torch", "other"), Target("µs", 114),
    Target("µs", 110), peer_us=120,
)  # fmt: skip


@pytest.mark.parametrize("goal", GOALS, ids=lambda g: g.name)
def test_every_goal_has_its_cases_and_they_its_peers(goal):
    for shape in goal.shapes:
        case = CASES[goal.op, shape]
        assert goal.dtype in {str(d).removeprefix("torch.") for d in case.dtypes}
        assert set(goal.peers) <= {peer.name for peer in peers_of(case)}


def test_goals_have_names_of_their_own():
    assert len({goal.name for goal in GOALS}) == len(GOALS)


@pytest.mark.parametrize(
    ("us", "must", "stretch"), [(50, True, False), (56, False, False), (36, True, True)]
)
def test_a_ratio_and_a_share_of_the_copy(us, must, stretch):
    (verdict,) = judge(
        [NORM], [row(us=us, peers={"flashinfer": 55.0}, bound_us=30)], LIMITS, "H100"
    )
    # 134 MB at 0.92 of 4 TB/s are 36.5 µs
    assert (verdict.must, verdict.stretch) == (must, stretch)
    assert verdict.ratio == pytest.approx(55 / us) and verdict.best_peer == "flashinfer"
    assert ("met" if must else "missed") in str(verdict)


def test_no_goal_lies_beyond_the_ceiling():
    rows = [row(us=50, peers={"flashinfer": 45.0}, bound_us=48.6)]
    assert judge([NORM], rows, LIMITS, "H100")[0].must is True  # 48.6 / 0.97 is 50.1
    rows = [row(us=50, peers={"flashinfer": 45.0}, bound_us=48.0)]
    assert judge([NORM], rows, LIMITS, "H100")[0].must is False


def layers(us, **peers):
    return [row("matmul", shape, us, peers, bound_us=1) for shape in SUM.shapes]


@pytest.mark.parametrize(
    ("gpu", "us", "torch", "must", "stretch"),
    [
        ("NVIDIA H200", 28, 20, True, False),  # 112 µs, whatever the peers took there
        ("NVIDIA H200", 29, 99, False, False),
        ("NVIDIA H100 80GB HBM3", 38, 40, True, False),  # 160 · 114 / 120 = 152 µs
        ("NVIDIA H100 80GB HBM3", 39, 40, False, False),
        ("NVIDIA H100 80GB HBM3", 36, 40, True, True),
    ],
)
def test_a_sum_counts_there_and_its_ratio_elsewhere(gpu, us, torch, must, stretch):
    (verdict,) = judge([SUM], layers(us, torch=torch, other=torch + 1), LIMITS, gpu)
    assert (verdict.must, verdict.stretch) == (must, stretch)
    assert verdict.seconds == pytest.approx(4 * us * 1e-6) and verdict.best_peer == "torch"


def test_a_peer_that_lacks_one_row_of_a_sum_is_not_the_best():
    rows = layers(28, torch=40, other=30)
    rows[2].peers["other"] = row(peers={"other": "no kernel"}).peers["other"]
    assert judge([SUM], rows, LIMITS, "H100")[0].best_peer == "torch"


def test_without_peers_or_rows_nothing_is_judged():
    (verdict,) = judge([NORM], [row(peers={"flashinfer": "absent"})], LIMITS, "H100")
    assert verdict.must is None and verdict.stretch is False and "not judged" in str(verdict)
    (verdict,) = judge([SUM], layers(28, torch=40)[:3], LIMITS, "H100")
    assert verdict.must is None and str(verdict) == "linears: not measured"
    assert judge([NORM], [row(shape="T1-N4096"), row(dtype="float16")], LIMITS, "H100") == []


def test_rows_lack_the_peers_that_their_goals_name():
    assert lacking(row(peers={"flashinfer": 3.0}), [NORM]) == {}
    assert lacking(row(peers={"flashinfer": "absent"}), [NORM]) == {"flashinfer": "absent"}
    assert lacking(row(), [NORM]) == {"flashinfer": "was not asked for"}
    assert lacking(row(shape="T1-N4096"), [NORM]) == {}
    assert lacking(layers(1, torch=2)[0], [SUM, NORM]) == {"other": "was not asked for"}


def test_targets_read_well():
    assert [str(Target(kind, 0.92)) for kind in ("peer", "copy", "µs")] == [
        "0.92× the best peer", "0.92 of copy", "0.92 µs",
    ]  # fmt: skip
    assert all(re.search(r"[=\d]", goal.name) for goal in GOALS)
