"""Rows of one op that differ in one size only: what a plot can draw as lines over that size.

The size is read from the shape's name: "int4-M16-N6144-K4096" belongs to the family int4-N6144-K4096
at 16 rows, "mha-full-4096" to mha-full at a length of 4096. Shapes that name a batch (B) vary in two
sizes at once, and stand alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tlk.bench.kernel_table import short
from tlk.bench.kernels import Row

# A part of a shape that may vary, by its letter; a number alone is the length of a sequence.
AXES = {"M": "rows", "T": "tokens", "S": "rows", "": "length of the sequence"}
SIZE = re.compile(r"([A-Za-z]*)(\d+)")


@dataclass(frozen=True, slots=True)
class Family:
    """`rows` from the smallest size to the largest, one for each of `sizes`."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def unit(self) -> str:
        """Of all its rows: TFLOP/s where memory bounds some of them and products others."""
        units = {row.bound.unit for row in self.rows}
        return "TFLOP/s" if "TFLOP/s" in units and all(r.flops for r in self.rows) else "TB/s"


def families(rows: Sequence[Row]) -> tuple[list[Family], list[Row]]:
    """The families of two sizes and more, in the order of their first rows, and the rows of none."""
    found: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        if (place := _place(row)) is not None:
            found.setdefault(place[0], {})[place[1]] = row
    several = [
        Family(_label(key, rows), AXES[key[1]], tuple(sorted(by)), tuple(by[n] for n in sorted(by)))
        for key, by in found.items()
        if len(by) > 1
    ]
    taken = {str(row) + row.operands for family in several for row in family.rows}
    return several, [row for row in rows if str(row) + row.operands not in taken]


def speed(row: Row, unit: str, seconds: float) -> float:
    """What the row's work in `seconds` comes to, in `unit`."""
    return (row.flops if unit == "TFLOP/s" else row.bytes) / seconds / 1e12


def _place(row: Row) -> tuple[tuple[str, ...], int] | None:
    """The family of the row, with the letter of its axis, and the row's size in it."""
    parts = row.shape.split("-")
    sizes = {i: match for i, part in enumerate(parts) if (match := SIZE.fullmatch(part))}
    if any(match[1] == "B" for match in sizes.values()):
        return None
    for letter in AXES:
        for i, match in sorted(sizes.items(), reverse=True):
            if match[1] == letter:
                others = "-".join(parts[:i] + parts[i + 1 :])
                return (others, letter, row.dtype, row.operands), int(match[2])
    return None


def _label(key: tuple[str, ...], rows: Sequence[Row]) -> str:
    """The family's part of the shape, and its dtype where the op was measured in several."""
    parts = [key[0]] if key[0] else []
    if len({(row.dtype, row.operands) for row in rows}) > 1:
        parts.append(short(key[2] if key[2] == key[3] else key[3]))
    return ", ".join(parts)
