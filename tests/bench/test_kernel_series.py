import pytest

from tests.bench.rows import row
from tlk.bench.case import load_cases
from tlk.bench.kernel_series import families, speed


def names(rows):
    found, alone = families(rows)
    return [(f.name, f.axis, f.sizes) for f in found], [r.shape for r in alone]


def test_a_family_differs_in_one_size():
    rows = [
        row("dequant_mm", shape)
        for shape in (
            *("int4-M64-N6144-K4096", "int4-M1-N6144-K4096", "nf4-M1-N6144-K4096"),
            *("int4-M1-N4096-K4096", "nf4-M16-N6144-K4096", "int4-M1-N28672-K4096-norm"),
        )
    ]
    assert names(rows) == (
        [("int4-N6144-K4096", "rows", (1, 64)), ("nf4-N6144-K4096", "rows", (1, 16))],
        ["int4-M1-N4096-K4096", "int4-M1-N28672-K4096-norm"],
    )
    assert [r.shape for r in families(rows)[0][0].rows] == [
        "int4-M1-N6144-K4096",
        "int4-M64-N6144-K4096",
    ]


def test_dtypes_are_families_of_their_own():
    rows = [row(shape=f"T{t}-N8", dtype=d) for d in ("bfloat16", "float16") for t in (1, 2)]
    assert names(rows)[0] == [("N8, bf16", "tokens", (1, 2)), ("N8, fp16", "tokens", (1, 2))]


def test_lengths_of_attention_and_rows_of_logits():
    flash = [row("flash_attention", f"{n}") for n in ("mha-4096", "mha-full-4096", "mha-16384")]
    assert names(flash) == ([("mha", "length of the sequence", (4096, 16384))], ["mha-full-4096"])
    sample = [row("sample", f"S{s}-V128256-k50-p0.9") for s in (512, 1)]
    assert names(sample)[0] == [("V128256-k50-p0.9", "rows", (1, 512))]


def test_batch_and_length_at_once_are_no_series():
    shapes = ["decode-B1-S4096", "decode-B128-S1024", "decode-B128-S8192"]
    assert names([row("paged_attention", shape) for shape in shapes]) == ([], shapes)


def test_head_dims_and_other_letters_are_no_lengths():
    """Of the cases as they are: each number alone is a length, each of M, T and S a count of rows."""
    for cases in load_cases().values():
        for family in families([row(case.op, case.shape) for case in cases])[0]:
            lengths = family.axis == "length of the sequence"
            assert not lengths or (family.rows[0].op, min(family.sizes) >= 512) == (
                "flash_attention",
                True,
            ), family


def test_one_unit_for_a_family_that_memory_and_products_bound():
    small = row("matmul", "M1-N8-K8", nbytes=10**9, flops=10**9)
    large = row("matmul", "M64-N8-K8", nbytes=10**9, flops=10**12, unit="TFLOP/s")
    assert families([small, large])[0][0].unit == "TFLOP/s"
    assert speed(small, "TFLOP/s", 1e-3) == speed(small, "TB/s", 1e-3) == pytest.approx(1.0)
    assert speed(large, "TFLOP/s", 1e-3) == pytest.approx(1000.0)
    assert families([small, row("matmul", "M64-N8-K8")])[0][0].unit == "TB/s"
