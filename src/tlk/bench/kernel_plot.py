"""The picture of one op: its speed over size beside its peers, and the ceiling of the same run.

Rows that form a series (`kernel_series`) are lines over their size, a panel for each family of shapes;
the others are bars, those that memory bounds apart from those that the tensor cores bound. The ceiling
is dashed. Needs matplotlib: ``pip install 'tlk[bench]'``.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tlk.bench.kernel_series import Family, families, speed
from tlk.bench.kernel_table import short
from tlk.bench.kernels import Row

UNITS = ("TB/s", "TFLOP/s")
COLUMNS = 4  # panels of lines side by side
LINES, BARS = (3.4, 2.9), (0.62, 3.9)  # inches: of a panel, and of a shape by a panel of bars
OURS, CEILING = "black", "dimgrey"
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#bcbd22", "#17becf"),
)
MARKERS = "osD^vP*Xp"
MANY = 6  # sizes: more of them stand aslant, lest they touch
LOG_FROM = 20.0  # a linear axis hides what is so many times smaller than the rest


def plot(rows: Sequence[Row], about: Mapping[str, Any], file: Path) -> None:
    """Draw the rows of one op, measured in the run `about`, into `file`."""
    series, alone = families(rows)
    bars = [panel for unit in UNITS if (panel := [r for r in alone if r.bound.unit == unit])]
    columns = min(COLUMNS, len(series)) or 1
    lines = -(-len(series) // columns)
    heights = [LINES[1]] * lines + [BARS[1]] * len(bars)
    widths = [3.0 + BARS[0] * len(panel) for panel in bars]
    width = max(7.0, LINES[0] * columns * bool(series), min(26.0, max(widths, default=0.0)))
    figure = import_module("matplotlib.figure").Figure(
        figsize=(width, 1.1 + sum(heights)), layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    styles = _styles(rows)
    for i, family in enumerate(series):
        _draw_lines(figure.add_subplot(grid[i // columns, i % columns]), family, styles)
    for i, panel in enumerate(bars):
        _draw_bars(figure.add_subplot(grid[lines + i, :]), sorted(panel, key=_work), styles)
    _finish(figure, rows[0].op, about, styles)
    figure.savefig(file, dpi=110)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every peer that has a time, the same in all panels."""
    names = list(dict.fromkeys(name for r in rows for name in r.peers if r.ratio(name)))
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)
    }


def _finish(
    figure: Any, op: str, about: Mapping[str, Any], styles: Mapping[str, tuple[str, str]]
) -> None:
    """Title, what it was measured on, and one legend for all panels."""
    commit = str(about.get("commit") or "unknown")
    commits = ", ".join(one.strip()[:8] for one in commit.split(";"))
    where = f"{about['gpu'] or about['cpu']}, commit {commits}"
    figure.suptitle(
        f"{op}: speed, more is better\n{where}; CUDA graphs, cold L2, medians", fontsize=10
    )
    entries = _legend(styles)
    figure.legend(
        handles=entries, loc="outside lower center", fontsize=8, frameon=False,
        ncols=min(len(entries), 2 + int(figure.get_figwidth() / 2)),
    )  # fmt: skip


def _legend(styles: Mapping[str, tuple[str, str]]) -> list[Any]:
    """One entry for each name, also for those with an underscore first, which axes leave out."""
    line = import_module("matplotlib.lines").Line2D
    entries = [line([], [], color=OURS, marker="o", lw=2.0, label="tlk")]
    entries += [
        line([], [], color=colour, marker=marker, ms=5, label=name)
        for name, (colour, marker) in styles.items()
    ]
    return [*entries, line([], [], ls="--", color=CEILING, label="ceiling of the same run")]


def _draw_lines(ax: Any, family: Family, styles: Mapping[str, tuple[str, str]]) -> None:
    """A line for tlk and one for each peer over the sizes of a family, the ceiling dashed."""
    unit, sizes, rows = family.unit, family.sizes, family.rows
    ceiling = [speed(r, unit, r.bound.seconds) for r in rows]
    drawn = [*ceiling]
    ax.plot(sizes, ceiling, "--", color=CEILING, lw=1.0)
    for name, (colour, marker) in styles.items():
        timed = [
            (size, speed(row, unit, taken.median))
            for size, row in zip(sizes, rows, strict=True)
            if name in row.peers and (taken := row.peers[name].seconds) is not None
        ]
        if timed:
            drawn += [value for _, value in timed]
            ax.plot(*zip(*timed, strict=True), color=colour, marker=marker, ms=4, lw=1.1)
    ours = [speed(r, unit, r.seconds.median) for r in rows]
    drawn += ours
    ax.plot(sizes, ours, color=OURS, marker="o", ms=4.5, lw=2.0, zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [_size(n) for n in sizes], minor=False)
    if len(sizes) > MANY:
        ax.tick_params(axis="x", labelrotation=60)
    ax.minorticks_off()
    if max(drawn) > LOG_FROM * min(drawn):
        ax.set_yscale("log")
        ticker = import_module("matplotlib.ticker")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        ax.set_ylim(0, 1.06 * max(drawn))
    ax.margins(x=0.07)
    ax.grid(alpha=0.25, lw=0.6)
    ax.tick_params(labelsize=8)
    ax.set_title(family.name, fontsize=9)
    ax.set_xlabel(family.axis, fontsize=8)
    ax.set_ylabel(unit, fontsize=8)


def _size(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _work(row: Row) -> tuple[float, str]:
    return (row.flops if row.bound.unit == "TFLOP/s" else row.bytes), row.shape


def _draw_bars(ax: Any, rows: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
    """Groups of bars, tlk's first, and over each group its ceiling."""
    names = [name for name in styles if any(r.ratio(name) for r in rows)]
    width = 0.8 / (1 + len(names))
    at = range(len(rows))
    unit = rows[0].bound.unit
    left = [i - 0.4 + width / 2 for i in at]
    ax.bar(left, [r.speed() for r in rows], width, color=OURS)
    for n, name in enumerate(names):
        timed = [(i, r.speed() / ratio) for i, r in enumerate(rows) if (ratio := r.ratio(name))]
        left = [i - 0.4 + width * (n + 1.5) for i, _ in timed]
        ax.bar(left, [value for _, value in timed], width, color=styles[name][0])
    for i, row in enumerate(rows):
        top = row.speed(row.bound.seconds)
        ax.plot([i - 0.45, i + 0.45], [top, top], "--", color=CEILING, lw=1.0)
    shapes = [r.shape for r in rows]
    labels = [f"{r.shape} {short(r.dtype)}" * (shapes.count(r.shape) > 1) or r.shape for r in rows]
    ax.set_xticks(list(at), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    ax.tick_params(axis="y", labelsize=8)
    ax.margins(x=0.02)
    ax.grid(axis="y", alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
