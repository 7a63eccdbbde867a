"""Kernel benchmarks as pictures: a plot for each op, and one page of HTML that holds them all.

The bars of a plot are the speed of each implementation at each shape, smallest first, and the line is
the ceiling that was measured in the same run. Rows that memory bounds and rows that the tensor cores
bound have a panel each. Needs matplotlib: ``pip install 'tlk[bench]'``.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tlk.bench.kernel_table import short, us
from tlk.bench.kernels import Row
from tlk.errors import UnsupportedError

UNITS = ("TB/s", "TFLOP/s")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.table { overflow-x: auto; }
img { max-width: 100%; }
small { color: #555; }
"""


def require_plots() -> None:
    """Raise UnsupportedError, naming the extra, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "plots need matplotlib, which is not installed: pip install 'tlk[bench]', "
            "or leave --out away; --json needs nothing"
        )


def write_page(
    folder: Path, rows: Sequence[Row], about: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Write `<op>.png` for each op, and index.html with all of them in it."""
    require_plots()
    images = {}
    for op in dict.fromkeys(row.op for row in rows):
        images[op] = folder / f"{op.strip('_')}.png"
        plot([row for row in rows if row.op == op], str(about["gpu"] or about["cpu"]), images[op])
    (folder / "index.html").write_text(page(rows, about, notes, images), encoding="utf-8")


def plot(rows: Sequence[Row], where: str, file: Path) -> None:
    """Draw the rows of one op into `file`."""
    panels = [[r for r in rows if r.bound.unit == unit] for unit in UNITS]
    panels = [sorted(p, key=_work) for p in panels if p]
    width = max(7.0, 2.5 + 0.65 * max(len(p) for p in panels))
    figure = import_module("matplotlib.figure").Figure(
        figsize=(min(width, 40.0), 4.6 * len(panels)), layout="constrained"
    )
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel)
    figure.suptitle(f"{rows[0].op} on {where}")
    figure.savefig(file, dpi=110)


def _work(row: Row) -> tuple[float, str]:
    return (row.flops if row.bound.unit == "TFLOP/s" else row.bytes), row.shape


def _draw(ax: Any, rows: Sequence[Row]) -> None:
    """One panel: groups of bars, tlk's first, and the ceiling as a line."""
    names = list(dict.fromkeys(name for r in rows for name in r.peers if r.ratio(name)))
    width = 0.8 / (1 + len(names))
    at = range(len(rows))
    ax.bar(
        [i - 0.4 + width / 2 for i in at],
        [r.speed() for r in rows],
        width,
        label="tlk",
        color="black",
    )
    for n, name in enumerate(names):
        speeds = [(i, r.speed() / ratio) for i, r in enumerate(rows) if (ratio := r.ratio(name))]
        left = [i - 0.4 + width * (n + 1.5) for i, _ in speeds]
        ax.bar(left, [speed for _, speed in speeds], width, label=name)
    ceilings = [r.speed(r.bound.seconds) for r in rows]
    ax.plot(list(at), ceilings, color="grey", marker="_", markersize=14, lw=0.8, label="ceiling")
    dtypes = len({(r.dtype, r.operands) for r in rows}) > 1
    labels = [f"{r.shape} {short(r.dtype)}" if dtypes else r.shape for r in rows]
    ax.set_xticks(list(at), labels, rotation=45, ha="right", fontsize=8)
    ax.set_ylabel(rows[0].bound.unit)
    ax.margins(x=0.02)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def page(
    rows: Sequence[Row], about: Mapping[str, Any], notes: Sequence[str], images: Mapping[str, Path]
) -> str:
    """The page: what was measured with what, the goals, and for each op its plot and its table."""
    where = html.escape(str(about["gpu"] or about["cpu"]))
    parts = [f"<h1>tlk kernels on {where}</h1>", _facts(about), "<ul>"]
    parts += [f"<li>{html.escape(note)}</li>" for note in notes]
    parts.append("</ul>")
    for op, image in images.items():
        data = base64.b64encode(image.read_bytes()).decode()
        parts.append(f'<h2 id="{html.escape(op)}">{html.escape(op)}</h2>')
        parts.append(f'<img alt="speed of {html.escape(op)}" src="data:image/png;base64,{data}">')
        parts.append(_table([row for row in rows if row.op == op]))
    head = f'<meta charset="utf-8"><title>tlk kernels on {where}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _facts(about: Mapping[str, Any]) -> str:
    limits = about["limits"]
    rates = ", ".join(f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in limits["matmul"].items())
    facts = {
        "command": about["command"],
        "commit": about["commit"],
        "time": about["time"],
        "versions": ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
        "ceilings of this run": f"copy {limits['copy'] / 1e12:.2f} TB/s, read "
        f"{limits['read'] / 1e12:.2f} TB/s, launch {limits['launch'] * 1e6:.2f} µs, {rates}",
        "timing": "CUDA graphs, cold L2, random data; median (20th to 80th percentile); every "
        "result was checked against a float32 reference first",
    }
    lines = "<br>".join(f"{name}: {html.escape(str(value))}" for name, value in facts.items())
    return f"<p><small>{lines}</small></p>"


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    head = ("shape", "dtype", "µs", "p20–p80", "speed", "ceiling", *(f"× {n}" for n in names))
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    for row in rows:
        cells = [
            row.shape,
            short(row.dtype),
            us(row.seconds.median),
            f"{us(row.seconds.p20)}–{us(row.seconds.p80)}",
            f"{row.speed():.3g} {row.bound.unit}",
            f"{row.of_limit():.0%} of {row.bound.by}",
        ]
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(line + "".join(_ratio(row, name) for name in names))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{body}</table></div>'


def _ratio(row: Row, peer: str) -> str:
    """How many times as fast, or in a tooltip why there is no time."""
    if (ratio := row.ratio(peer)) is not None:
        return f"<td>{ratio:.2f}</td>"
    why = row.peers[peer].reason if peer in row.peers else "no such peer"
    return f'<td title="{html.escape(str(why))}">–</td>'
