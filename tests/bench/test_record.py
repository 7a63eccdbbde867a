import csv
import io
import json
import subprocess

import pytest

from tests.bench.rows import row
from tlk.bench.goals import GOALS
from tlk.bench.record import (
    append,
    commit,
    committed,
    from_dict,
    gpu_slug,
    read,
    to_csv,
    to_dict,
    together,
)

RUN = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "abc", "command": "tlk bench kernels"}


def test_a_row_as_json():
    record = to_dict(row(us=50, peers={"a": 100.0, "b": "absent"}), RUN)
    assert json.loads(json.dumps(record)) == record
    assert record["benchmark"] == "kernel" and record["gpu"] == RUN["gpu"]
    assert (record["median_us"], record["p20_us"], record["p80_us"]) == (50, 45, 55)
    assert record["ceiling"] == {
        "seconds": pytest.approx(40e-6),
        "by": "copy",
        "unit": "TB/s",
        "reached": 0.8,
    }
    assert record["speed"] == pytest.approx(2.6845) and record["unit"] == "TB/s"
    assert record["peers"]["a"]["ratio"] == 2.0 and record["peers"]["a"]["version"] == "1.2"
    assert record["peers"]["b"] == {"reason": "absent", "version": None}


def test_a_row_from_json():
    for made in (row(us=50, peers={"a": 100.0, "b": "absent"}), row("sample", peers={})):
        again = from_dict(json.loads(json.dumps(to_dict(made, RUN))))
        assert again.seconds.median == pytest.approx(made.seconds.median)
        assert (again.bound, again.bytes, again.operands) == (made.bound, made.bytes, made.operands)
        assert {n: p.reason for n, p in again.peers.items()} == {
            n: p.reason for n, p in made.peers.items()
        }
        assert again.ratio("a") == pytest.approx(made.ratio("a")) if "a" in made.peers else True


def test_the_last_row_of_each_case_is_read(tmp_path):
    file = tmp_path / "h100.jsonl"
    about = {**RUN, "time": "t", "cpu": "c", "versions": {}, "limits": {}}
    old = {**about, "commit": "old"}
    file.write_text('{"benchmark": "latency"}\n{"benchmark": "kernel", "op": "of an older kind"}\n')
    append(file, [row(us=50), row(shape="T1")], old, GOALS)
    append(file, [row(us=60)], about, GOALS)
    found = read(file)
    assert [(r.shape, round(r.seconds.median * 1e6), run) for r, run in found] == [
        ("T8192-N4096", 60, about),
        ("T1", 50, old),
    ]
    file.write_text('{"benchmark": "latency"}\n')
    with pytest.raises(ValueError, match="has no line that"):
        read(file)


def test_several_runs_as_one():
    """Of the newest, but all the commits and commands that its rows come from."""
    runs = [
        {**RUN, "time": "2026-11-25T19", "commit": "b", "limits": 2},
        {**RUN, "time": "2026-11-25T18", "commit": "a", "limits": 1},
        {**RUN, "time": "2026-11-25T18", "commit": None, "limits": 1},
    ]
    assert together(runs) == {**runs[0], "commit": "b; a"}
    assert together(runs[2:])["commit"] is None


def test_rows_as_csv():
    text = to_csv([row(us=50, peers={"a": 100.0, "b": "not, here"}), row(shape="T1")], "0.1")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(line["shape"], line["implementation"]) for line in lines] == [
        ("T8192-N4096", "tlk"), ("T8192-N4096", "a"), ("T8192-N4096", "b"), ("T1", "tlk"),
    ]  # fmt: skip
    assert float(lines[1]["times_as_fast"]) == 0.5 and float(lines[1]["of_ceiling"]) == 0.4
    assert lines[2]["reason"] == "not, here" and lines[2]["median_us"] == ""
    assert lines[0]["version"] == "0.1" and float(lines[0]["median_us"]) == 50


def test_lines_are_appended_anywhere(tmp_path):
    file = tmp_path / "new" / "lines.jsonl"
    for _ in range(2):
        assert append(file, [row()], {**RUN, "gpu": None, "commit": None}, GOALS) == []
    assert len(file.read_text().splitlines()) == 2


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "bench" / "results" / "h100.jsonl"


def test_kept_results_refuse_a_row_without_its_peer(kept):
    good, other = row(peers={"flashinfer": 51.0}), row(shape="T128-N7168")
    bad = row("add_rms_norm", peers={"flashinfer": "flashinfer-python is not installed"})
    (refused,) = append(kept, [good, bad, other], RUN, GOALS)
    assert refused.row is bad and "flashinfer (flashinfer-python is not installed)" in str(refused)
    assert [json.loads(x)["shape"] for x in kept.read_text().splitlines()] == [
        "T8192-N4096", "T128-N7168",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"commit": None}, "give --commit"),
        ({"gpu": "NVIDIA H200"}, "measured on NVIDIA H200"),
        ({"gpu": None}, "measured on no GPU"),
    ],
)
def test_kept_results_refuse_what_nobody_can_place(kept, change, why):
    (refused,) = append(kept, [row(peers={"flashinfer": 51.0})], RUN | change, GOALS)
    assert why in refused.why and not kept.exists()


def test_which_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert committed(tmp_path / "bench/results/h100.jsonl")
    for other in ("results/h100.jsonl", "bench/results/h100.json", "bench/h100.jsonl"):
        assert not committed(tmp_path / other)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_files_are_called_after_the_gpu(name, slug):
    assert gpu_slug(name) == slug


def test_the_commit_of_a_folder(tmp_path):
    assert commit(tmp_path) is None

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    assert len(commit(tmp_path)) == 40
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path).endswith("-dirty")
