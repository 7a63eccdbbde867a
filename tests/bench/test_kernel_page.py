import re
from html.parser import HTMLParser

import pytest

from tests.bench.rows import row
from tlk.bench import kernel_page
from tlk.bench.kernel_page import page, require_plots, write_page
from tlk.errors import UnsupportedError

ABOUT = {
    "gpu": "NVIDIA <H100>", "cpu": "x", "command": "tlk bench kernels", "commit": "abc", "time": "now",
    "versions": {"torch": "2"},
    "limits": {"copy": 3e12, "read": 3.1e12, "launch": 2e-6, "matmul": {"bfloat16": 7e14}},
}  # fmt: skip
ROWS = [
    row(us=50, peers={"flashinfer": 55.0, "liger": "is <not> there"}),
    row(shape="T1-N4096", us=2, peers={"torch": 3.0}),
    row("flash_attention_", "causal", 900.0, {"fa3": 1000.0}, "TFLOP/s", 800, flops=10**11),
    row("flash_attention_", "short", 9.0, {}, "TB/s", 8),
]
PNG = b"\x89PNG\r\n"


class Tags(HTMLParser):
    """Every tag that is opened is closed, and the sources of images."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(text):
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def test_a_plot_for_each_op_and_a_page_that_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra tlk[bench]")
    write_page(tmp_path, ROWS, ABOUT, ["goal a: met", "goal <b>: missed"])
    assert {f.name for f in tmp_path.iterdir()} == {
        "rms_norm.png",
        "flash_attention.png",
        "index.html",
    }
    assert all(f.read_bytes().startswith(PNG) for f in tmp_path.glob("*.png"))
    text = (tmp_path / "index.html").read_text()
    tags = parsed(text)
    assert len(tags.images) == 2 and all(
        x.startswith("data:image/png;base64,") for x in tags.images
    )
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "NVIDIA <H100>" in tags.text and "goal <b>: missed" in tags.text


def test_the_page_says_it_all(tmp_path):
    image = tmp_path / "x.png"
    image.write_bytes(PNG)
    text = page(ROWS[:2], ABOUT, [], {"rms_norm": image})
    assert "copy 3.00 TB/s, read 3.10 TB/s, launch 2.00 µs, bfloat16 700 TFLOP/s" in text
    assert "<td>1.10</td>" in text and 'title="is &lt;not&gt; there">–</td>' in text
    assert "<td>80% of copy</td>" in text and "<td>45–55</td>" in text
    assert 'title="no such peer"' in text  # torch was measured at another shape only
    parsed(text)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_page, "find_spec", lambda name: None)
    for call in (require_plots, lambda: write_page(tmp_path, ROWS, ABOUT, [])):
        with pytest.raises(UnsupportedError, match=r"pip install 'tlk\[bench\]'"):
            call()
