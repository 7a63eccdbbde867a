"""Kernel benchmarks as pictures: a plot for each op, and one page of HTML that holds them all."""

import base64
import html
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tlk.bench.kernel_plot import plot
from tlk.bench.kernel_table import short, us
from tlk.bench.kernels import Row
from tlk.errors import UnsupportedError

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
        plot([row for row in rows if row.op == op], about, images[op])
    (folder / "index.html").write_text(page(rows, about, notes, images), encoding="utf-8")


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
