import json
import multiprocessing
import os
import subprocess
import sys
import timeit
from functools import partial

import pytest
import torch

from tests.interpreter import interpret
from tlk.kernels import tuning
from tlk.kernels.tuning import (
    Entry,
    bucket,
    cache_dir,
    consulted,
    forced,
    lookup,
    record,
    source_of,
    tables,
)

DEVICE, BF16 = torch.device("cpu"), torch.bfloat16
HERE, ELSEWHERE = "cpu", "NVIDIA H200"


def entry(name, *, dims=(4096, 4096), at=4, device=HERE, dtype="bfloat16", version=1):
    return {
        "version": version,
        "device": device,
        "dtype": dtype,
        "dims": list(dims),
        "bucket": at,
        "config": {"backend": name},
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a table: `write(entry(...), ..., shipped=True, arch=90)`; lookups then read it."""
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")

    def write(*entries, shipped=True, arch=90, op="matmul"):
        folder = tmp_path / ("shipped" if shipped else "user/tuned") / f"sm_{arch}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{op}.json").write_text(json.dumps(entries))
        tuning.forget()
        return folder / f"{op}.json"

    tuning.forget()
    with interpret(sm=90):
        yield write
    tuning.forget()


def found(dims=(4096, 4096), running=16, dtype=BF16, version=1, op="matmul"):
    config = lookup(op, version, DEVICE, dtype, dims, running)
    return config and config["backend"]


def test_cache_dir_is_the_users_or_the_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("TLK_CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tlk"


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [0, 1, 2, 2, 3, 3, 4, 4, 5]


def test_nothing_measured_is_none(write):
    assert found() is None


def test_the_users_table_comes_first_then_this_device_then_this_sm(write):
    write(entry("other device", device=ELSEWHERE))
    assert found() == "other device"
    write(entry("other device", device=ELSEWHERE), entry("this device, a bit off", at=5))
    assert found() == "this device, a bit off"
    write(entry("mine, further off", at=6), shipped=False)
    assert found() == "mine, further off"


def test_a_users_table_from_another_gpu_is_no_better_than_the_shipped_one(write):
    write(entry("shipped"))
    write(entry("mine, from another GPU", device=ELSEWHERE), shipped=False)
    assert found() == "shipped"


def test_the_nearest_shape_answers(write):
    write(
        entry("small", dims=(1024, 4096), at=0),
        entry("wide", dims=(8192, 4096), at=0),
        entry("tall", dims=(4096, 8192), at=0),
        entry("many", dims=(4096, 4096), at=2),
    )
    assert found(dims=(1100, 4096), running=1) == "small"
    assert found(dims=(7000, 4100), running=1) == "wide"
    assert found(dims=(4100, 7000), running=1) == "tall"
    assert found(dims=(4096, 4096), running=3) == "many"


@pytest.mark.parametrize(
    "call", [{"running": 128}, {"dims": (4096, 256)}, {"dims": (65536, 4096)}, {"dims": (4096,)}]
)
def test_a_far_shape_is_no_evidence(write, call):
    write(entry("decode"))
    assert found() == "decode"
    assert found(**call) is None


def test_other_dtypes_versions_and_ops_do_not_answer(write):
    write(entry("bf16"))
    assert found(dtype=torch.float16) is None
    assert found(version=2) is None
    assert found(op="norm_linear") is None


def test_an_sm_never_reads_anothers_table(write):
    write(entry("hopper"))
    assert found() == "hopper"
    with interpret(sm=120):
        assert found() is None


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"a": 1}', '[{"dims": [1]}]', '[{"dims": 3}]', '[{"op": "x", "dims": []}]'],
)
def test_a_corrupt_table_is_named(write, text):
    path = write(entry("good"))
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuning table .*sm_90/matmul\.json must be a list"):
        found()


def test_tables_lists_files_with_their_entries(write):
    shipped = write(entry("a"), entry("b"))
    mine = write(entry("c"), shipped=False, op="norm_linear")
    write(entry("d"), arch=80)
    listed = [(t.op, t.path, [e.config["backend"] for e in t.entries]) for t in tables(DEVICE)]
    assert listed == [("norm_linear", mine, ["c"]), ("matmul", shipped, ["a", "b"])]


def test_shipped_tables_parse():
    for path in tuning.SHIPPED.glob("*/*.json"):
        assert tuning._entries(path), path


def test_a_repeated_lookup_is_cheap(write):
    write(*(entry("x", at=b) for b in range(14)))
    found()
    call = lambda: lookup("matmul", 1, DEVICE, BF16, (4096, 4096), 16)  # noqa: E731
    best = min(timeit.repeat(call, number=1000, repeat=20)) / 1000
    assert best < 2e-6  # about 0.5 µs; the best of 20, for busy machines


def test_a_first_lookup_neither_compiles_nor_times(write, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("not in a lookup")

    write(entry("x"))
    monkeypatch.setattr("triton.compile", refuse)
    monkeypatch.setattr("triton.compiler.compile", refuse)
    monkeypatch.setattr("triton.testing.do_bench", refuse)
    monkeypatch.setattr(torch.cuda, "Event", refuse)
    assert found() == "x"


def test_where_a_configuration_comes_from(write):
    def source(running=16):
        return source_of("matmul", 1, DEVICE, BF16, (4096, 4096), running)

    assert source() == "heuristic"
    write(entry("other device", device=ELSEWHERE))
    assert source() == "table for this SM"
    write(entry("this device"))
    assert source() == "shipped table for this device"
    write(entry("mine, from another GPU", device=ELSEWHERE), shipped=False)
    assert source() == "shipped table for this device"
    write(entry("mine"), shipped=False)
    assert source() == "user cache"
    assert source(running=8192) == "heuristic"


def test_forced_configurations_are_for_their_op_and_block(write):
    write(entry("table"), entry("table", dtype="float16"))
    with forced("matmul", {"backend": "mine"}):
        assert found() == found(dtype=torch.float32, dims=(1,), running=9999) == "mine"
        assert source_of("matmul", 1, DEVICE, BF16, (4096, 4096), 16) == "forced"
        assert found(op="norm_linear") is None
        with forced("norm_linear", {"backend": "other"}), forced("matmul", None):
            assert (found(), found(op="norm_linear")) == (None, "other")
        assert found() == "mine"
    assert found() == "table"
    with pytest.raises(KeyError), forced("matmul", {"backend": "mine"}):
        raise KeyError
    assert found() == "table"


def test_sources_of_a_blocks_lookups_are_collected(write):
    write(entry("table"))
    with consulted() as seen:
        found()
        found(running=8192)
        with forced("norm_linear", None), consulted() as inner:
            found(op="norm_linear")
        found(op="gated_linear")
    found(op="other")
    assert inner == {("norm_linear", "forced")}
    assert seen == {
        ("matmul", "shipped table for this device"),
        ("matmul", "heuristic"),
        ("gated_linear", "heuristic"),
    }


def measured(name="x", *, dims=(8, 8), at=0, device=HERE, dtype="bfloat16", version=1, **more):
    return Entry(version, device, dtype, dims, at, {"backend": name}, **more)


def test_records_are_found_at_once(write, tmp_path):
    path = tuning.table_path("matmul", 90)
    assert found(dims=(8, 8), running=1) is None
    record(path, [measured("new", us=1.5, triton="3.7.1")])
    assert found(dims=(8, 8), running=1) == "new"
    assert tuning.read(path) == (measured("new", us=1.5, triton="3.7.1"),)


def test_a_table_is_sorted_one_entry_a_line_and_the_same_for_the_same_entries(tmp_path):
    entries = [
        measured(dims=(64, 8), at=1),
        measured(dims=(64, 8), at=10),
        measured(dims=(64, 8), at=2),
        measured(dims=(8, 8), device=ELSEWHERE),
        measured(dims=(128, 8), dtype="float16"),
    ]
    forward, backward = tmp_path / "a.json", tmp_path / "b.json"
    record(forward, entries)
    for one in reversed(entries):
        record(backward, [one])
    assert forward.read_bytes() == backward.read_bytes()
    first, *lines, last = forward.read_text().splitlines()
    assert (first, last) == ("[", "]") and len(lines) == 5
    rows = [json.loads(line.rstrip(",")) for line in lines]
    assert [(r["device"], r["dtype"], r["dims"][0], r["bucket"]) for r in rows] == [
        (ELSEWHERE, "bfloat16", 8, 0),
        (HERE, "bfloat16", 64, 1),
        (HERE, "bfloat16", 64, 2),
        (HERE, "bfloat16", 64, 10),
        (HERE, "float16", 128, 0),
    ]
    assert "us" not in rows[0]  # what is not known is not written


def test_a_newer_measurement_takes_the_olders_place(tmp_path):
    path = tmp_path / "matmul.json"
    record(path, [measured("old"), measured("old", at=1)])
    record(path, [measured("new", version=2)])
    assert [e.config["backend"] for e in tuning.read(path)] == ["new", "old"]


def test_nothing_but_the_table_is_left_in_its_folder(tmp_path):
    path = tmp_path / "sm_90" / "matmul.json"
    record(path, [measured()])
    record(path, [measured(at=1)])
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_corrupt_table_is_not_written_over(tmp_path):
    path = tmp_path / "matmul.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="must be a list"):
        record(path, [measured()])
    assert path.read_text() == "{"


def record_some(path, start):
    for i in range(start, start + 10):
        record(path, [measured(at=i)])


def test_processes_may_record_at_once(tmp_path):
    path = tmp_path / "matmul.json"
    fork = multiprocessing.get_context("fork")
    run = partial(fork.Process, target=record_some)
    processes = [run(args=(path, start)) for start in range(0, 50, 10)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        assert len(tuning.read(path)) >= seen  # never a part of a table
        seen = len(tuning.read(path))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [e.bucket for e in tuning.read(path)] == list(range(50))


COLD = """
import json, sys
from pathlib import Path
import torch
from triton import knobs
from tlk.kernels import matmul, tuning
from tlk.kernels.aot import dry_run

compiled = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: compiled.append(cache_hit)
tuning.SHIPPED = Path(sys.argv[1])
BF16 = torch.bfloat16

with dry_run(90) as launches:  # which refuses to tune
    for tokens in (1, 16, 15, 1, 16):
        x = torch.empty(tokens, 256, dtype=BF16)
        for n in (512, 256):
            matmul(x, torch.empty(n, 256, dtype=BF16))
    sources = [
        tuning.source_of("matmul", 2, x.device, BF16, (n, 256), m) for n in (512, 256) for m in (1, 15)
    ]
print(json.dumps({
    "in_cache": compiled,
    "warps": sorted({(x.kernel, x.num_warps) for x in launches}),
    "launches": len(launches),
    "kernels": len({x.compiled.hash for x in launches}),
    "sources": sources,
}))
"""


def test_a_cold_process_compiles_each_kernel_of_a_shipped_table_once_and_tunes_nothing(tmp_path):
    gemv = {"BLOCK_N": 16, "PER_SM": 1, "MOST_TILES": 3, "num_warps": 2}
    dot = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "PREFETCH": 0, "num_warps": 8}
    for at, kernel, meta in ((0, "gemv", gemv), (4, "dot", dot)):
        config = {"backend": "triton", "kernel": kernel, "meta": meta}
        entry = Entry(2, HERE, "bfloat16", (512, 256), at, config)
        record(tmp_path / "shipped/sm_90/matmul.json", [entry])
    folders = {"TLK_CACHE_DIR": str(tmp_path / "tlk"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, "-c", COLD, str(tmp_path / "shipped")]

    def fresh_process():
        done = subprocess.run(
            command, env={**os.environ, **folders}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    cold = fresh_process()
    assert cold["sources"] == ["shipped table for this device"] * 4
    assert cold["warps"] == [["_dot_kernel", 8], ["_gemv_kernel", 2]]
    assert (cold["launches"], cold["kernels"]) == (10, 2)
    assert cold["in_cache"] == [False] * 2
    assert not (tmp_path / "tlk").exists()
    warm = fresh_process()
    assert warm["in_cache"] == [True] * 2
