import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tests.kernels.quantized import ALL, decode, options, quantized
from tlk.kernels import _dequant_configs as configs
from tlk.kernels._op import count_ops
from tlk.kernels.dequant_mm import _launch, dequant_mm
from tlk.kernels.dequantize import dequantize

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.dequant_mm")

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
BF16 = torch.bfloat16
IDS = [f"{name} {group}" for name, group in ALL]
KINDS = [("int4", 64), ("int8", 0), ("table4", 64), ("mx4", 32), ("nv4", 16), ("fp8", 128)]
"""One variant of each kind."""


def rows_of_mixed_scale(shape, device, dtype):
    scale = 10.0 ** torch.randint(-2, 1, (*shape[:-1], 1), device=device)
    return (torch.randn(shape, device=device) * scale).to(dtype)


def size(group):
    return 192 if group <= 64 else 256


def plain(x, w, bias=None, activation=None, residual=None, gated=False, norm_weight=None, eps=0.5):
    """What torch does with the weight in the dtype of x."""
    if norm_weight is not None:
        x = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    y = F.linear(x, decode(w).to(x.dtype), bias)
    act = {None: lambda y: y, "silu": F.silu, "gelu": F.gelu}[activation]
    if gated:
        gate, up = y.chunk(2, -1)
        return act(gate) * up
    y = act(y)
    return y if residual is None else y + residual


def exact(x, w, bias=None, activation=None, residual=None, gated=False, norm_weight=None, eps=0.5):
    x, bias, residual, norm_weight = (
        None if t is None else t.float() for t in (x, bias, residual, norm_weight)
    )
    return plain(x, w, bias, activation, residual, gated, norm_weight, eps)


def check_call(x, w, backend=None, **more):
    given = options(w) | more | {"backend": backend}
    if "norm_weight" in more:
        given |= {"eps": 0.5}
    actual = dequant_mm(x, w.weight, w.scale, **given)
    check(actual, plain(x, w, **more), exact(x, w, **more))


def mma(block_m, rows, warps, tiles, words=4):
    meta = {"BLOCK_M": block_m, "ROWS": rows, "WARPS": warps, "TILES": tiles, "WORDS": words}
    return {"backend": "triton", "kernel": "mma", "meta": meta}


def wide(splits, group_n=1):
    meta = {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_N": group_n, "SPLITS": splits}
    return {"backend": "triton", "kernel": "wide", "meta": meta | {"WARPS": 4, "STAGES": 2}}


SUMS = {
    "backend": "triton",
    "kernel": "sums",
    "meta": {"BLOCK_M": 2, "BLOCK_N": 4, "RUN": 32, "RUNS": 2},
}


def check_launch(config, x, w, bias=None, activation=None, residual=None, gated=False):
    n = w.shape[0] // (2 if gated else 1)
    y = torch.full((*x.shape[:-1], n), torch.nan, dtype=x.dtype, device=x.device)
    _launch(config, x, w, bias, activation, y, residual, gated)
    args = x, w, bias, activation, residual, gated
    check(y, plain(*args), exact(*args))


@pytest.mark.parametrize("m, dtype", [(1, BF16), (3, torch.float16), (16, BF16)])
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_few_rows(name, group, m, dtype, device):
    w = quantized(name, 37, size(group), group, dtype, device)
    check_call(rows_of_mixed_scale((m, size(group)), device, dtype), w)


@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_wide(name, group, device):
    """Blocks that nothing fills: 17 rows of x, 70 of W, and for some kinds half a tile of inputs."""
    dtype = torch.float16 if group == 0 else BF16
    w = quantized(name, 70, size(group) - 32 * (group == 32), group, dtype, device)
    x = rows_of_mixed_scale((17, w.shape[1]), device, dtype)
    check_launch(wide(1), x, w)


@pytest.mark.parametrize("name, group, m", [("int4", 128, 257), ("fp8", 0, 64), ("nv4", 16, 33)])
def test_more_rows(name, group, m, device):
    w = quantized(name, 37, size(group), group, BF16, device)
    check_call(rows_of_mixed_scale((m, size(group)), device, BF16), w)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_every_code_meets_its_value_of_x(name, group, dtype, device):
    """Rows of x that are zero but for a one return columns of W."""
    w = quantized(name, 20, size(group), group, dtype, device)
    k = torch.arange(16, device=device) * 11 % w.shape[1]
    x = F.one_hot(k, w.shape[1]).to(dtype)
    want = decode(w)[:, k].T
    for config in (mma(16, 1, 2, 1), wide(1)):
        y = torch.full((16, 20), torch.nan, dtype=dtype, device=device)
        _launch(config, x, w, None, None, y, None, False)
        torch.testing.assert_close(y.float(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [mma(1, 1, 1, 8), mma(1, 2, 4, 2), mma(2, 1, 2, 4), mma(4, 1, 2, 2, 2), mma(8, 2, 1, 1), mma(16, 1, 4, 2)],
    ids=lambda c: " ".join(map(str, c["meta"].values())),
)  # fmt: skip
@pytest.mark.parametrize("name, group", [("int4", 128), ("table4", 64), ("int8 asymmetric", 64)])
def test_configurations(config, name, group, device):
    """Steps of tiles that the inputs fill, and that they do not, and rows of x that fill no block."""
    for n, k in ((20, 1024), (35, 640)):
        w = quantized(name, n, k, group, BF16, device)
        m = config["meta"]["BLOCK_M"]
        check_launch(config, rows_of_mixed_scale((max(m - 1, 1), k), device, BF16), w)


@pytest.mark.parametrize("config", [mma(4, 1, 2, 2), wide(1)], ids=["mma", "wide"])
@pytest.mark.parametrize("group", [32, 128, 0])
def test_scales_of_another_dtype(config, group, device):
    for dtype in (torch.float32, torch.float16):
        w = quantized("int4", 20, 256, group, dtype, device)
        check_launch(config, rows_of_mixed_scale((3, 256), device, BF16), w)


def test_blocks_of_fp8(device):
    """Rows and inputs of two blocks, the second one not full."""
    w = quantized("fp8", 150, 192, 128, BF16, device)
    actual = dequantize(w.weight, w.scale, dtype=BF16, **options(w))
    assert torch.equal(actual, decode(w).to(BF16))
    x = rows_of_mixed_scale((2, 192), device, BF16)
    for config in (mma(2, 2, 2, 1), wide(1), {**SUMS, "meta": SUMS["meta"] | {"RUN": 128}}):
        check_launch(config, x, w)


@pytest.mark.parametrize("splits, group_n", [(1, 2), (3, 1)])
def test_splits_and_grouped_order(splits, group_n, device):
    w = quantized("int4 asymmetric", 140, 384, 128, BF16, device)
    x = rows_of_mixed_scale((37, 384), device, BF16)
    residual = torch.randn(37, 140, device=device).to(BF16)
    check_launch(wide(splits, group_n), x, w, None, "silu", residual)


@pytest.mark.parametrize("config", [mma(8, 1, 2, 1), wide(1), wide(2), SUMS], ids=str)
def test_epilogues(config, device):
    w = quantized("int4", 46, 192, 64, BF16, device)
    x = rows_of_mixed_scale((5, 192), device, BF16)
    bias = torch.randn(46, device=device).to(BF16)
    residual = torch.randn(5, 60, device=device).to(BF16)[:, 7:53]
    check_launch(config, x, w, bias, "gelu", residual)
    check_launch(config, x, w, bias, "silu", gated=True)


@pytest.mark.parametrize("m", [2, 19])
@pytest.mark.parametrize("name, group", KINDS)
def test_norm_and_gate(name, group, m, device):
    w = quantized(name, 46, size(group), group, BF16, device)
    x = rows_of_mixed_scale((m, size(group)), device, BF16)
    norm_weight = torch.randn(size(group), device=device).to(BF16)
    check_call(x, w, norm_weight=norm_weight, activation="silu", gated=True)


@pytest.mark.parametrize("backend", [None, "cublas", "invariant"])
def test_backends(backend, device):
    w = quantized("int4", 46, 192, 64, BF16, device)
    x = rows_of_mixed_scale((3, 192), device, BF16)
    norm_weight = torch.randn(192, device=device).to(BF16)
    check_call(x, w, backend, norm_weight=norm_weight, activation="gelu", gated=True)
    check_call(x, w, backend, activation="silu", residual=torch.ones_like(x[:, :46]))


@pytest.mark.parametrize("name, group", KINDS)
def test_without_tensor_cores(name, group):
    w = quantized(name, 21, size(group), group, torch.float16)
    with interpret(sm=75):
        for m in (1, 7):
            check_call(rows_of_mixed_scale((m, size(group)), "cpu", torch.float16), w)
    with interpret():
        w = quantized(name, 21, size(group), group, torch.float32)
        check_call(rows_of_mixed_scale((3, size(group)), "cpu", torch.float32), w)


def test_rows_that_no_words_fit(device):
    """Bytes of a row that are no multiple of 16, and rows that start between words."""
    x = rows_of_mixed_scale((3, 100), device, BF16)
    w = quantized("int8", 30, 100, 0, BF16, device)
    assert configs.choose(x, w, None)["kernel"] == "sums"
    check_call(x, w)
    wide_w = quantized("int4", 30, 256, 128, BF16, device)
    shifted = torch.empty(30, 136, dtype=torch.uint8, device=device)[:, 3:131]
    shifted.copy_(wide_w.weight)
    for start, kernel in ((3, "sums"), (16, "mma")):
        rows = torch.empty(30, 160, dtype=torch.uint8, device=device)[:, start : start + 128]
        x = torch.empty(3, 256, device=device, dtype=BF16)
        assert configs.choose(x, replace(wide_w, weight=rows), None)["kernel"] == kernel
    x = rows_of_mixed_scale((3, 256), device, BF16)
    for m in (3, 1):
        actual = dequant_mm(x[:m], shifted, wide_w.scale, **options(wide_w))
        check(actual, plain(x[:m], wide_w), exact(x[:m], wide_w))


@pytest.mark.parametrize("m", [1, 6, 18])
def test_views_of_fused_tensors(m, device):
    w = quantized("int4", 90, 256, 128, BF16, device)
    padded = torch.zeros(90, 160, dtype=torch.uint8, device=device)
    padded[:, 16:144] = w.weight
    part = quantized("int4", 90, 256, 128, BF16, device)
    rows = slice(30, 70)
    x = rows_of_mixed_scale((m, 3 * 256), device, BF16)[:, 256:512]
    residual = torch.randn(m, 80, device=device).to(BF16)[:, 16:56]
    actual = dequant_mm(
        x, padded[rows, 16:144], part.scale[rows], residual=residual, kind="int4", group_size=128
    )
    args = x, quantized("int4", 90, 256, 128, BF16, device)
    like, want = plain(*args)[:, rows] + residual, exact(*args)[:, rows] + residual.float()
    check(actual, like, want)


@pytest.mark.parametrize("config", [mma(8, 1, 1, 1), wide(1)], ids=["mma", "wide"])
def test_sums_may_pass_the_largest_float16(config, device):
    """The running sum reaches 128 · 60 · 7 · 8 and comes back."""
    w = quantized("int4", 16, 256, 128, torch.float16, device)
    w.weight.copy_(torch.tensor(0xFF, dtype=torch.uint8))
    w.scale.fill_(8.0)
    x = torch.full((3, 256), 60.0, device=device, dtype=torch.float16)
    x[:, 128:] = -59.0
    y = torch.empty(3, 16, device=device, dtype=torch.float16)
    _launch(config, x, w, None, None, y, None, False)
    torch.testing.assert_close(y, torch.full_like(y, 128 * 7 * 8.0), rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("name, group", KINDS)
def test_zero_scales(name, group, m, device):
    w = quantized(name, 20, size(group), group, BF16, device)
    zero = 0 if name == "mx4" else 0.0
    w.scale.view(torch.uint8).fill_(0) if name in ("mx4", "nv4") else w.scale.fill_(zero)
    x = torch.randn(m, size(group), device=device).to(BF16)
    bias = torch.arange(20.0, device=device).to(BF16)
    y = dequant_mm(x, w.weight, w.scale, bias=bias, **options(w))
    torch.testing.assert_close(y, bias.expand(m, 20), rtol=0, atol=1e-30)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (0, 256), (2, 0, 256)], ids=str)
def test_leading_dimensions(shape, device):
    w = quantized("int4", 24, 256, 128, BF16, device)
    x = rows_of_mixed_scale(shape, device, BF16)
    actual = dequant_mm(x, w.weight, w.scale, **options(w))
    assert actual.shape == (*shape[:-1], 24)
    if actual.numel():
        check(actual, plain(x, w), exact(x, w))


@pytest.mark.parametrize("config", [mma(1, 1, 2, 1), wide(1), wide(2), SUMS], ids=str)
def test_what_earlier_kernels_wrote_is_read_after_the_wait(config):
    w = quantized("int4", 20, 192, 64, BF16)
    x, residual = torch.randn(1, 192).to(BF16), torch.randn(1, 20).to(BF16)
    with interpret(), late(x, residual):
        y = torch.empty_like(residual)
        _launch(config, x, w, None, None, y, residual, False)
    args = x, w, None, None, residual
    check(y, plain(*args), exact(*args))


def test_nested_scales_are_read_after_the_wait(monkeypatch):
    """They come from the kernel before."""
    w = quantized("table4 nested", 20, 192, 64, BF16)
    x = torch.randn(1, 192).to(BF16)
    with interpret():
        made = module.unnested(w)
        monkeypatch.setattr(module, "unnested", lambda w: made)
        with late(made.scale):
            y = torch.empty(1, 20, dtype=BF16)
            _launch(wide(1), x, w, None, None, y, None, False)
    check(y, plain(x, w), exact(x, w))


@pytest.mark.parametrize("group, words", [(64, 2), (64, 4), (128, 4), (32, 4), (0, 2)])
def test_nested_scales_of_two_blocks(group, words, device):
    """A block of 256 scales ends within a row, and within the tiles of a step."""
    w = quantized("table4 nested", 20, 1024, group, BF16, device)
    w.nested[1].copy_(256 - torch.arange(20, device=device)[:, None])
    for config in (mma(1, 1, 2, 4, words), mma(16, 2, 1, 2, words)):
        x = rows_of_mixed_scale((config["meta"]["BLOCK_M"], 1024), device, BF16)
        check_launch(config, x, w)


@pytest.mark.parametrize(
    "m, dtype, backend, ran",
    [
        (1, BF16, None, "triton"),
        (16, BF16, None, "triton"),
        (17, BF16, None, "triton"),
        (5000, BF16, None, "dequantize+cublas"),
        (1, BF16, "cublas", "dequantize+cublas"),
        (1, BF16, "invariant", "dequantize+invariant"),
        (3, torch.float32, None, "triton"),
        (30, torch.float32, None, "dequantize+cublas"),
    ],
)
def test_what_ran_is_counted(m, dtype, backend, ran, device, monkeypatch):
    launched = []
    run = module._launch
    monkeypatch.setattr(module, "_launch", lambda *a: (launched.append(a), run(*a)))
    w = quantized("int4", 16, 64, 32, dtype, device)
    with count_ops() as counts:
        dequant_mm(torch.ones(m, 64, dtype=dtype, device=device), w.weight, w.scale, backend=backend, **options(w))  # fmt: skip
    assert counts[f"dequant_mm[{ran}]"] == 1
    assert len(launched) == (ran == "triton")


def test_a_table_decides(device, monkeypatch):
    measured = {2: configs.CUBLAS, 30: mma(16, 1, 2, 1), 3: None}
    asked = []

    def lookup(op, version, device, dtype, dims, running):
        asked.append((op, dims))
        return measured[running]

    monkeypatch.setattr(configs, "lookup", lookup)
    for name, group in (("int4", 64), ("fp8", 0)):
        w = quantized(name, 30, 192, group, BF16, device)
        for m, ran in ((2, "dequantize+cublas"), (30, "triton"), (3, "triton")):
            with count_ops() as counts:
                check_call(rows_of_mixed_scale((m, 192), device, BF16), w)
            assert counts[f"dequant_mm[{ran}]"] == 1
    assert set(asked) == {("dequant_mm.int4", (30, 192, 64)), ("dequant_mm.fp8", (30, 192, 192))}


@pytest.mark.parametrize("m", [1, 4, 16, 40, 600])
@pytest.mark.parametrize("kind, group", [("int4", 128), ("table4", 64), ("fp8", 4096)])
def test_candidates_hold_the_default_kernel(kind, group, m):
    args = 90, 132, BF16, (4096, 4096, group), m
    found = configs.candidates(*args, kind=kind)
    kernels = {config.get("kernel") for config in found}
    assert configs.default_config(*args, kind=kind)["kernel"] in kernels
    assert configs.CUBLAS in found
    assert all(c["meta"]["BLOCK_M"] >= min(m, 16) for c in found if c != configs.CUBLAS)


def test_registration(device):
    w = quantized("table4 nested", 24, 128, 64, BF16, device)
    x = torch.randn(3, 128, device=device).to(BF16)
    stored = w.weight, w.scale, w.zero, w.table, w.global_scale, w.nested, w.kind, w.group_size
    torch.library.opcheck(torch.ops.tlk.dequant_mm.default, (x, *stored))
    torch.library.opcheck(torch.ops.tlk.dequantize.default, (*stored, BF16))
    compiled = torch.compile(
        lambda x: dequant_mm(x, w.weight, w.scale, **options(w)) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    check(compiled(x), 2 * plain(x, w), 2 * exact(x, w))


def test_invariant_rows_do_not_depend_on_their_number(device):
    w = quantized("int4", 40, 256, 128, BF16, device)
    x = rows_of_mixed_scale((50, 256), device, BF16)
    whole = dequant_mm(x, w.weight, w.scale, backend="invariant", **options(w))
    part = dequant_mm(x[3:5], w.weight, w.scale, backend="invariant", **options(w))
    assert torch.equal(part, whole[3:5])


def bad(message, name="int4", group=64, error=ValueError, **changes):
    return pytest.param(name, group, changes, error, message, id=message)


@pytest.mark.parametrize(
    "name, group, changes, error, message",
    [
        bad("kind must be one of .*, got 'int3'", kind="int3"),
        bad("group_size of int4 must be one of .*, got 48", group_size=48),
        bad("group_size of int8 must be 192 or a power of two from 16, got 96", "int8", 0, group_size=96),
        bad(r"scale must have shape \(32, 3\), got \(32, 2\)", scale=torch.zeros(32, 2)),
        bad("scale must be float32 or float16 or bfloat16, got uint8", error=TypeError, scale=torch.zeros(32, 3, dtype=torch.uint8)),
        bad("scale must be contiguous", scale=torch.zeros(3, 32, dtype=BF16).T),
        bad("weight must be uint8, got int8", error=TypeError, weight=torch.zeros(32, 96, dtype=torch.int8)),
        bad(r"x must have shape \(2, 192\), got \(2, 191\)", x=torch.zeros(2, 191, dtype=BF16)),
        bad("x must have at least one dimension", x=torch.zeros((), dtype=BF16)),
        bad("kind table4 needs table", "table4", table=None),
        bad("kind int4 takes no table", table=torch.zeros(1, 16)),
        bad("kind nv4 needs global_scale", "nv4", 16, global_scale=None),
        bad("kind mx4 takes no zero", "mx4", 32, zero=torch.zeros(32, 6, dtype=torch.uint8)),
        bad("zero must be uint8, got int8", error=TypeError, zero=torch.zeros(32, 3, dtype=torch.int8)),
        bad("kind int4 takes no nested", nested=(torch.zeros(1),) * 4),
        bad("nested must be absmax, start, map and offset, got 3 tensors", "table4 nested", nested=(torch.zeros(32, 1),) * 3),
        bad(r"bias must have shape \(32\), got \(31,\)", bias=torch.zeros(31, dtype=BF16)),
        bad(r"residual must have shape \(2, 32\), got \(32,\)", residual=torch.zeros(32, dtype=BF16)),
        bad("activation must be one of .*None.*, got 'tanh'", activation="tanh"),
        bad("activation must be one of .*, got None", gated=True),
        bad("gated takes an even number of rows and no residual", gated=True, activation="silu", residual=torch.zeros(2, 32, dtype=BF16)),
        bad("backend must be one of .*, got 'cudnn'", backend="cudnn"),
        bad("scale must be on cpu, got meta", scale=torch.zeros(32, 3, dtype=BF16, device="meta")),
    ],
)  # fmt: skip
def test_bad_input(name, group, changes, error, message):
    w = quantized(name, 32, 192, group, BF16)
    args = {"x": torch.zeros(2, 192, dtype=BF16), "weight": w.weight, "scale": w.scale}
    args |= options(w) | changes
    with pytest.raises(error, match=message):
        dequant_mm(**args)
