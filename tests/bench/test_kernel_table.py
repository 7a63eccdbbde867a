from tests.bench.rows import row
from tlk.bench.goals import Goal, Target, Verdict
from tlk.bench.kernel_table import HEADER, absent, line, short, us, verdicts


def test_a_line():
    text = line(row(us=50, peers={"flashinfer": 55.0, "liger": "absent", "torch": 100.0}))
    assert text.split() == [
        "rms_norm", "T8192-N4096", "bf16", "50", "45–55", "2.68", "TB/s", "80%", "flashinfer", "1.10,",
        "torch", "2.00",
    ]  # fmt: skip
    assert text.index("80%") + 3 == HEADER.index("ceiling") + len("ceiling")


def test_operands_of_8_bits_are_named():
    import dataclasses

    eight = dataclasses.replace(row(), operands="float8_e4m3fn")
    assert " fp8 " in line(eight) and short("int8") == "int8"


def test_microseconds():
    assert [us(x) for x in (1.2345e-6, 12.346e-6, 123.46e-6, 12345.6e-6)] == [
        "1.234", "12.35", "123.5", "12346",
    ]  # fmt: skip


def test_what_is_absent_is_counted():
    rows = [row(peers={"liger": "absent", "torch": 1.0})] * 2 + [
        row("sample", peers={"liger": "no"})
    ]
    assert absent(rows) == ["rms_norm: no liger (2 rows): absent", "sample: no liger (1 row): no"]


def test_missed_goals_come_first():
    goal = Goal("g", "op", ("s",), ("p",), Target("peer", 1.0))
    found = [Verdict(goal, 1e-6, "p", 2.0, must) for must in (True, None, False)]
    lines = verdicts(found)
    assert "missed" in lines[0] and "not judged" in lines[1] and lines[2].endswith(" met")
    assert all(
        text.startswith("goal g: 1.0 µs, 2.00× p, must (1× the best peer)") for text in lines
    )
