import json
import timeit

import pytest
import torch

from tests.interpreter import interpret
from tlk.kernels import tuning
from tlk.kernels.tuning import bucket, cache_dir, lookup, tables

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
    assert best < 5e-6  # about 1 µs; the margin is for busy machines
