"""What a machine without a GPU can see of the kernel, and what it computes where it can run."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton

from tests.interpreter import interpret
from tests.kernels.quantized import ALL, decode, quantized
from tests.kernels.test_dequant_mm import check_launch, rows_of_mixed_scale
from tlk.kernels import _dequant_configs as configs
from tlk.kernels import _dequant_sm90, _dequant_wide
from tlk.kernels._dequant_ptx import OFFSETS, TABLE_PTX, decode_ptx
from tlk.kernels._dequant_sm90 import REGISTERS, missing
from tlk.kernels._dequant_sm90_configs import gluon_candidates, gluon_config
from tlk.kernels._dequant_wide import gluon_missing
from tlk.kernels.aot import _cuobjdump, _instructions, dry_run, isolated, measure
from tlk.kernels.dequant_mm import _launch

BF16 = torch.bfloat16
IDS = [f"{name} {group}" for name, group in ALL]
needs_gluon = pytest.mark.skipif(
    not triton.__version__.startswith(("3.6.", "3.7.", "3.8.")),
    reason="needs triton 3.6 to 3.8, in whose Gluon the kernel is written",
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or missing() is not None,
    reason="needs a GPU of sm_90 and triton 3.6: no interpreter runs Gluon",
)


def config(block_m, consumers=2, splits=1, stages=2, unroll=2):
    meta = {"BLOCK_M": block_m, "CONSUMERS": consumers, "SPLITS": splits, "STAGES": stages}
    meta["UNROLL"] = unroll
    return {"backend": "triton", "kernel": "wide_sm90", "meta": meta}


def emulated(ptx, inputs, dtype):
    """Outputs of PTX on words: the instructions that decode."""
    registers = {f"${number}": word for number, word in inputs.items()}

    def value(name):
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    def fma(*operands):
        halves = [
            [
                (x >> by & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double()
                for x in operands
            ]
            for by in (0, 16)
        ]
        bits = [(a * b + c).to(dtype).view(torch.int16).long() & 0xFFFF for a, b, c in halves]
        return bits[0] | bits[1] << 16

    def prmt(a, b, selector):
        both, out = a | b << 32, 0
        for i in range(4):
            digit = selector >> 4 * i & 0xF
            assert (digit < 8).all()
            out = out | (both >> 8 * digit & 0xFF) << 8 * i
        return out

    def lop3(a, b, c, table):
        return (a & b) | c if table == 0xEA else (a & b) ^ c

    operations = {
        "shr.u32": lambda a, by: a >> by,
        "shl.b32": lambda a, by: a << by & 0xFFFFFFFF,
        "and.b32": lambda a, b: a & b,
        "lop3.b32": lop3,
        "mov.b32": lambda a: a,
        "prmt.b32": prmt,
    }
    for line in ptx.strip("{ }").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            opcode, operands = line.strip().split(" ", 1)
            to, *sources = (name.strip() for name in operands.split(","))
            if opcode.startswith("fma"):
                assert opcode == ("fma.rn.bf16x2" if dtype == BF16 else "fma.rn.f16x2")
                assert not re.search("[, ]0x", operands), "fma takes registers"
            run = fma if opcode.startswith("fma") else operations[opcode]
            registers[to] = run(*map(value, sources))
    return registers


def pair_of(value, dtype):
    bits = torch.tensor(value, dtype=dtype).view(torch.int16).long() & 0xFFFF
    return bits | bits << 16


def numbers(word, dtype):
    return torch.stack(
        [
            (word >> by & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).float()
            for by in (0, 16)
        ]
    )


VALUES = {
    "int4": torch.arange(16.0) - 8,
    "mx4": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    "int8": torch.arange(256, dtype=torch.uint8).view(torch.int8).float(),
    "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8", "mx4", "nv4", "fp8"])
def test_codes_become_numbers(kind, dtype, scaled):
    """Every code, in words of random others."""
    torch.manual_seed(0)
    values, half = VALUES.get(kind, VALUES["mx4"]), dtype == torch.float16
    bits = 4 if len(values) == 16 else 8
    words = torch.randint(0, 2**32, (4096,))
    for plane in range(8 // bits):
        codes = torch.stack([words >> bits * plane + by & (2**bits - 1) for by in (0, 16)])
        for minus in (False, True) if kind.startswith("int") else (False,):
            given = [words]
            given += [pair_of(-(OFFSETS[kind, half] + 3.0), dtype)] if minus else []
            given += [pair_of(0.5, dtype)] if scaled else []
            ptx = decode_ptx(kind, half, plane, minus, scaled)
            actual = numbers(emulated(ptx, dict(enumerate(given, 1)), dtype)["$0"], dtype)
            want = values[codes]
            if minus:
                want = want + (8.0 if kind == "int4" else 0.0) - 3.0
            known = want.isfinite()
            want = (want.to(dtype).float() * (0.5 if scaled else 1.0)).to(dtype).float()
            assert torch.equal(actual[known], want[known])


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_codes_become_entries_of_a_table(dtype):
    torch.manual_seed(0)
    table = torch.randn(16).to(dtype)
    bits = table.view(torch.int16).long() & 0xFFFF
    low, high = (
        [sum((bits[4 * i + j] >> by & 0xFF) << 8 * j for j in range(4)) for i in range(4)]
        for by in (0, 8)
    )
    words = torch.randint(0, 2**32, (4096,))
    out = emulated(TABLE_PTX, dict(enumerate([words, *low, *high], 2)), dtype)
    for plane in range(2):
        want = table.float()[torch.stack([words >> 4 * plane + by & 0xF for by in (0, 8)])]
        assert torch.equal(numbers(out[f"${plane}"], dtype), want)
        kept = emulated(
            decode_ptx("table4", dtype == torch.float16, plane, False, True),
            {1: out[f"${plane}"], 2: pair_of(0.5, dtype)},
            dtype,
        )
        assert torch.equal(numbers(kept["$0"], dtype), want * 0.5)


CODE = [
    ("int4", 128, config(256, 2, 1, 3), True),
    ("int4 asymmetric", 128, config(128, 3, 2, 4), False),
    ("table4", 64, config(64, 1, 1, 4), False),
    ("fp8", 128, config(128, 2, 1, 4), False),
]


@needs_gluon
@pytest.mark.parametrize("name, group, chosen, residual", CODE, ids=lambda v: str(v)[:12])
def test_its_code(name, group, chosen, residual):
    """Compiled for sm_90: operands by TMA, no spills, and matmuls that do not wait for one another.

    The assembler waits after every wgmma if it sees registers of one written while it runs.
    """

    def compile_it():
        w = quantized(name, 1024, 1024, group, BF16)
        x, y = torch.empty(256, 1024, dtype=BF16), torch.empty(256, 1024, dtype=BF16)
        with dry_run(90) as launches:
            _launch(chosen, x, w, None, None, y, torch.empty_like(y) if residual else None, False)
        last = next(launch for launch in launches if "sm90" in launch.kernel)
        asm = last.compiled.asm
        opcodes = [x.opcode for x in _instructions(_cuobjdump(asm["cubin"], "-sass"))]
        matmuls = sum("GMMA" in opcode for opcode in opcodes)
        waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
        tma = asm["ptx"].count("cp.async.bulk.tensor")
        return last.grid, matmuls, waits, tma, measure(last.compiled)

    grid, matmuls, waits, tma, metrics = isolated(compile_it)
    meta = chosen["meta"]
    tiles = -(-1024 // (64 * meta["CONSUMERS"])) * 256 // meta["BLOCK_M"]
    assert grid == (tiles, meta["SPLITS"], 1)
    assert tma and matmuls == 16 * meta["CONSUMERS"]
    assert waits <= 5 * meta["CONSUMERS"]
    assert metrics.spill_bytes <= 64 and metrics.shared <= 227 * 1024


def test_registers_of_all_warps_fit_the_multiprocessor():
    for (consumers, _), (start, computing, copying) in REGISTERS.items():
        threads = 128 * (consumers + 1)
        assert 128 * (consumers * computing + copying) <= threads * start <= 65536
        assert start % 8 == computing % 8 == copying % 8 == 0


def test_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_dequant_sm90, "TRITON", (triton.__version__,))
    assert missing() is None
    with interpret():
        assert missing() == "Triton's interpreter has no Gluon"
    monkeypatch.setattr(_dequant_sm90, "TRITON", ("1.0.",))
    assert missing() == f"the kernel is untested with Gluon of triton {triton.__version__}"


def test_another_gluon_leaves_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(_dequant_wide, "hopper", None)
    monkeypatch.setattr(_dequant_wide, "_import_error", "no tma", raising=False)
    assert gluon_missing() == f"triton {triton.__version__} has another Gluon: no tma"
    assert chosen_for("int4", 4096, 4096, 128, 64, monkeypatch, able=False) == "wide"


def chosen_for(name, n, k, group, m, monkeypatch, able=True, sm=90):
    """The kernel that runs m rows, with the Triton that the kernel is written for if `able`."""
    if able:
        monkeypatch.setattr(_dequant_sm90, "missing", lambda: None)
    w = quantized(name, 16, k, group, BF16)
    w = replace(w, weight=w.weight[:1].expand(n, -1).contiguous(), scale=w.scale[:1].expand(n, -1))
    with interpret(sm=sm):
        return configs.choose(torch.empty(m, k, dtype=BF16), w, None).get("kernel")


@pytest.mark.parametrize(
    "name, n, k, group, m, sm, kernel",
    [
        ("int4", 4096, 1024, 128, 17, 90, "wide_sm90"),
        ("int4", 4096, 1024, 128, 1023, 90, "wide_sm90"),
        ("int4", 4096, 1024, 128, 16, 90, "mma"),
        ("int4", 4096, 1024, 128, 1024, 90, None),
        ("int4", 4096, 1024, 128, 64, 100, "wide"),
        ("int4", 4088, 1024, 128, 64, 90, "wide"),
        ("int4", 4096, 1024, 0, 64, 90, "wide_sm90"),
        ("int4", 4096, 1280, 0, 64, 90, "wide"),
        ("int8", 4096, 1040, 0, 64, 90, "wide_sm90"),
    ],
)
def test_it_is_chosen_where_it_can_run(name, n, k, group, m, sm, kernel, monkeypatch):
    assert chosen_for(name, n, k, group, m, monkeypatch, sm=sm) == kernel


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("n, k", [(64, 64), (4096, 14336), (28672, 4096)])
def test_tiles_fit(kind, n, k):
    """Stages of a ring fit the memory, tiles and splits the shape; every default is a candidate."""
    for m in (17, 64, 65, 300, 1023):
        chosen = gluon_config(132, kind, m, (n, k, 64))
        assert chosen in gluon_candidates(kind, m, (n, k, 64))
        for meta in (chosen["meta"] for chosen in gluon_candidates(kind, m, (n, k, 64))):
            codes = 64 * meta["CONSUMERS"] * (128 if kind == "int8" else 64)
            assert 2 <= meta["STAGES"] * (codes + meta["BLOCK_M"] * 256) <= 226 * 1024
            assert (meta["CONSUMERS"], meta["BLOCK_M"]) in REGISTERS and meta["STAGES"] >= 2
    assert gluon_config(132, kind, 17, (64, 64, 64))["meta"]["SPLITS"] == 1


def test_measured_configurations_of_a_neighbour_must_fit(monkeypatch):
    """A table answers for shapes nearby, whose kernel need not take these."""
    monkeypatch.setattr(_dequant_sm90, "missing", lambda: None)
    w = quantized("int4", 48, 256, 128, BF16)
    dims = 48, 256, 128
    words = {"meta": {"WORDS": 4}, "kernel": "mma", "backend": "triton"}
    assert configs.fits(words, w, dims, 32) and not configs.fits(words, w, dims, 33)
    nested = quantized("nv4", 48, 256, 16, BF16)
    assert not configs.fits(words | {"meta": {"WORDS": 2}}, nested, (48, 256, 16), 1)
    assert configs.fits(config(64), w, dims, 40)
    assert not configs.fits(config(64), w, (40, 256, 128), 40)
    low = {"meta": {"BLOCK_M": 16}, "kernel": "wide", "backend": "triton"}
    assert configs.fits(low, w, dims, 64) and not configs.fits(low, w, dims, 65)
    assert configs.fits(configs.CUBLAS, w, dims, 1)
    assert not configs.fits({"kernel": "sums", "backend": "triton", "meta": {}}, w, dims, 1)
    monkeypatch.setattr(_dequant_sm90, "missing", lambda: "untested")
    assert not configs.fits(config(64), w, dims, 40)
    monkeypatch.setattr(configs, "lookup", lambda *_: words | {"meta": {"WORDS": 8}})
    with interpret(sm=80):
        assert configs.choose(torch.empty(100, 256, dtype=BF16), w, None)["kernel"] == "wide"


TILES = [config(64, 1), config(64, 4, 1, 4), config(128, 2, 3), config(128, 3), config(256, 2, 2)]  # fmt: skip


def name_of(config):
    return " ".join(map(str, config["meta"].values()))


@needs_gpu
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_every_code_meets_its_value_of_x(name, group):
    """Rows of x that are zero but for a one return columns of W."""
    for dtype in (BF16, torch.float16):
        w = quantized(name, 208, 512, group, dtype, "cuda")
        k = torch.arange(64, device="cuda") * 37 % 512
        x = F.one_hot(k, 512).to(dtype)
        want = decode(w)[:, k].T
        y = torch.full((64, 208), torch.nan, dtype=dtype, device="cuda")
        _launch(config(64), x, w, None, None, y, None, False)
        torch.testing.assert_close(y.float(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("chosen", TILES, ids=name_of)
@pytest.mark.parametrize("name, group", [("int4", 128), ("table4", 64), ("int8 asymmetric", 64)])
def test_configurations(chosen, name, group):
    """Rows of x and of W that fill no block; inputs of several turns of the ring, and of half a step."""
    for m, n, k in ((77, 336, 2048), (300, 1040, 640), (17, 16, 192)):
        w = quantized(name, n, k, group if k % group == 0 else 64, BF16, "cuda")
        check_launch(chosen, rows_of_mixed_scale((m, k), "cuda", BF16), w)


@needs_gpu
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_kinds(name, group):
    dtype = torch.float16 if group == 0 else BF16
    w = quantized(name, 400, 1024, group, dtype, "cuda")
    for chosen in (config(128, 3), config(64, 2, 2)):
        check_launch(chosen, rows_of_mixed_scale((130, 1024), "cuda", dtype), w)


@needs_gpu
@pytest.mark.parametrize("chosen", [config(64), config(128, 2, 3), config(256)], ids=name_of)
def test_epilogues(chosen):
    w = quantized("int4", 272, 512, 128, BF16, "cuda")
    x = rows_of_mixed_scale((70, 512), "cuda", BF16)
    bias = torch.randn(272, device="cuda").to(BF16)
    residual = torch.randn(70, 290, device="cuda").to(BF16)[:, 7:279]
    check_launch(chosen, x, w, bias, "gelu", residual)
    check_launch(chosen, x, w, bias, "silu", gated=True)


@needs_gpu
def test_rows_among_others_and_other_scales():
    w = quantized("int4", 256, 512, 128, torch.float32, "cuda")
    padded = torch.zeros(256, 320, dtype=torch.uint8, device="cuda")
    padded[:, 32:288] = w.weight
    for part in (w, replace(w, weight=padded[:, 32:288])):
        check_launch(config(64), rows_of_mixed_scale((40, 512), "cuda", BF16), part)


@needs_gpu
def test_the_same_on_every_run():
    """Registers that a running matmul reads are not written: 200 runs of many programs agree."""
    w = quantized("int4", 4096, 4096, 128, BF16, "cuda")
    for m, chosen in (
        (64, config(64, 4, 1, 4)),
        (256, config(256, 2, 1, 3)),
        (250, config(128, 3, 2, 4)),
    ):
        x = rows_of_mixed_scale((m, 4096), "cuda", BF16)
        runs = []
        for _ in range(200):
            runs.append(torch.empty(m, 4096, dtype=BF16, device="cuda"))
            _launch(chosen, x, w, None, None, runs[-1], None, False)
            if len(runs) > 1:
                assert torch.equal(runs.pop(), runs[0])
        args = x, w, None, None, None, False
        check_launch(chosen, *args[:2])
