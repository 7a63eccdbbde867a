from itertools import pairwise

import pytest

from tests.bench.rows import row
from tlk.bench.kernel_plot import plot

figures = pytest.importorskip("matplotlib.figure", reason="needs the extra tlk[bench]")
ABOUT = {"gpu": "NVIDIA H100", "cpu": "x", "commit": "0123456789; abcdefghij"}


def drawn(monkeypatch, rows):
    kept = {}
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, file, **k: kept.update(figure=self))
    plot(rows, ABOUT, "somewhere.png")
    kept["figure"].draw_without_rendering()
    return kept["figure"]


def lines(ax):
    return [
        (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in ax.lines
    ]


def test_speed_over_size_beside_peers_under_the_ceiling(monkeypatch):
    rows = [
        row(shape="T16-N4096", us=2.0, bound_us=1.0, nbytes=2_000_000, peers={"_mm": 4.0}),
        row(shape="T1-N4096", us=1.0, bound_us=0.5, nbytes=1_000_000, peers={"_mm": "absent"}),
    ]
    figure = drawn(monkeypatch, rows)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "16"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("N4096", "tokens", "TB/s")
    ceiling, peer, ours = lines(ax)
    assert ceiling == ([1, 16], pytest.approx([2.0, 2.0]), "--")
    assert peer == ([16], pytest.approx([0.5]), "-")
    assert ours == ([1, 16], pytest.approx([1.0, 1.0]), "-")
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["tlk", "_mm", "ceiling of the same run"]
    title = figure.get_suptitle()
    assert title.startswith("rms_norm: speed") and "NVIDIA H100, commit 01234567, abcdefgh" in title


def test_rows_of_no_series_are_bars_by_what_bounds_them_and_by_size(monkeypatch):
    op = "flash_attention"
    rows = [
        row(op, "causal", 900.0, {"fa3": 1000.0}, "TFLOP/s", 800, flops=10**11),
        row(op, "short", 9.0, {}, "TB/s", 8),
        row(op, "tiny", 3.0, {}, "TB/s", 2, nbytes=5),
    ]
    upper, lower = drawn(monkeypatch, rows).axes
    assert [ax.get_ylabel() for ax in (upper, lower)] == ["TB/s", "TFLOP/s"]
    assert [label.get_text() for label in upper.get_xticklabels()] == ["tiny", "short"]
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([1e11 / 9e8, 1e11 / 1e9])
    (ceiling,) = lines(lower)
    assert ceiling[1] == pytest.approx([1e11 / 8e8] * 2) and ceiling[2] == "--"


def test_a_wide_range_is_logarithmic_and_zero_is_shown_else(monkeypatch):
    def panel(*speeds):
        rows = [
            row(shape=f"T{2**i}-N8", us=1.0, bound_us=1.0, nbytes=n) for i, n in enumerate(speeds)
        ]
        return drawn(monkeypatch, rows).axes[0]

    assert panel(10**4, 10**6).get_yscale() == "log"
    near = panel(10**5, 10**6)
    assert near.get_yscale() == "linear" and near.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "sizes", [(1, 16, 64, 256, 4096, 8192), (1, 2, 4, 8, 16, 32, 64, 128, 256, 4096)]
)
def test_labels_do_not_overlap(monkeypatch, sizes):
    rows = [
        row("dequant_mm", f"int4-M{m}-N{n}-K4096", peers={"a peer with a long name": 70.0, "b": 90.0})
        for m in sizes
        for n in (4096, 6144, 28672, 1024, 2048)
    ] + [row("dequant_mm", f"mx4-g{g}-M1-N4096-K4096-with-a-residual") for g in range(12)]  # fmt: skip
    figure = drawn(monkeypatch, rows)
    for ax in figure.axes:
        labels = [label for label in ax.get_xticklabels() if label.get_text()]
        if labels[0].get_rotation() == 0:
            boxes = [label.get_window_extent() for label in labels]
            assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    apart = [not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert all(apart)
