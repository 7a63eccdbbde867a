"""Kernel benchmarks as text: a line for each row as it comes, then what was not measured, and the goals."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tlk.bench.goals import Verdict
from tlk.bench.kernels import Row

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8"}
HEADER = (
    f"{'op':<20} {'shape':<34} {'dtype':<6} {'µs':>9} {'p20–p80':>17} {'speed':>13} {'ceiling':>8}"
    "  times as fast as"
)


def short(dtype: str) -> str:
    """bf16 for bfloat16."""
    return SHORT.get(dtype, dtype)


def line(row: Row) -> str:
    """The row in one line, under `HEADER`."""
    seconds = row.seconds
    around = f"{us(seconds.p20)}–{us(seconds.p80)}"
    speed = f"{row.speed():.3g} {row.bound.unit}"
    ratios = [f"{name} {r:.2f}" for name in row.peers if (r := row.ratio(name)) is not None]
    dtype = short(row.operands if row.operands in ("int8", "float8_e4m3fn") else row.dtype)
    return (
        f"{row.op:<20} {row.shape:<34} {dtype:<6} {us(seconds.median):>9} {around:>17} "
        f"{speed:>13} {row.of_limit():>8.0%}  {', '.join(ratios)}"
    ).rstrip()


def us(seconds: float) -> str:
    """Microseconds with four digits."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def absent(rows: Iterable[Row]) -> list[str]:
    """One line for each peer that is not in a row and why, with how many rows lack it so."""
    counts = Counter(
        (row.op, name, peer.reason)
        for row in rows
        for name, peer in row.peers.items()
        if peer.seconds is None
    )
    return [
        f"{op}: no {name} ({count} row{'s' * (count > 1)}): {why}"
        for (op, name, why), count in counts.items()
    ]


def verdicts(found: Sequence[Verdict]) -> list[str]:
    """The goals, those missed first."""
    order = {False: 0, None: 1, True: 2}
    return [f"goal {v}" for v in sorted(found, key=lambda v: order[v.must])]
