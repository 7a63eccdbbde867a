import importlib

import pytest
import torch
import torch.nn.functional as F
import triton

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.errors import UnsupportedError
from tlk.kernels import _scaled
from tlk.kernels._op import count_ops
from tlk.kernels._scaled import launch
from tlk.kernels.act_quant import quantize_act
from tlk.kernels.aot import dry_run, isolated, measure
from tlk.kernels.matmul import activate_reference
from tlk.kernels.scaled_mm import (
    CUBLAS,
    candidates,
    choose,
    default_config,
    scaled_mm,
    scaled_mm_reference,
)

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.scaled_mm")

FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
KINDS = ["fp8", "block", "int8"]
OUT = [torch.float32, torch.float16, BF16]
ACTIVATIONS = [None, "silu", "gelu", "gelu_tanh", "relu_squared"]


def cdiv(a, b):
    return -(-a // b)


def codes(shape, kind, device):
    """8-bit values that use their whole range."""
    if kind == "int8":
        return torch.randint(-127, 128, shape, device=device, dtype=INT8)
    return (torch.randn(shape, device=device) * 60).clamp(-448, 448).to(FP8)


def mixed(shape, device):
    """Scales of which no two are alike, so that a wrong index is seen."""
    return (torch.rand(shape, device=device) + 0.5) * 10.0 ** torch.randint(
        -4, -1, shape, device=device
    )


def operands(m, n, k, kind, device):
    """x, x_scale, weight, weight_scale."""
    block = kind == "block"
    x_scale = mixed((m, cdiv(k, 128) if block else 1), device)
    weight_scale = mixed((cdiv(n, 128), cdiv(k, 128)) if block else (n, 1), device)
    return codes((m, k), kind, device), x_scale, codes((n, k), kind, device), weight_scale


def dequantized(t, scale, rows=1):
    """`t` [R, K] as float64; `scale` has an entry for every `rows` rows and every column or 128."""
    columns = 128 if scale.shape[1] > 1 or rows > 1 else t.shape[1]
    wide = scale.double().repeat_interleave(rows, 0)[: t.shape[0]]
    return t.double() * wide.repeat_interleave(columns, 1)[:, : t.shape[1]]


def product(x, x_scale, weight, weight_scale):
    rows = 1 if weight_scale.shape == (weight.shape[0], 1) else 128
    return dequantized(x, x_scale) @ dequantized(weight, weight_scale, rows).T


def exact(args, bias=None, activation=None, residual=None):
    """The answer, in float32."""
    y = product(*args)
    y = activate_reference(y if bias is None else y + bias.double(), activation)
    return (y if residual is None else y + residual.double()).float()


def plain(args, bias=None, activation=None, residual=None, out_dtype=BF16):
    """What one would do in torch: sums in float32, each step of the epilogue rounded."""
    y = product(*args).to(out_dtype)
    y = y if bias is None else y + bias.to(out_dtype)
    y = activate_reference(y, activation)
    return y if residual is None else y + residual


def check_call(args, bias=None, activation=None, residual=None, **options):
    actual = scaled_mm(*args, bias=bias, activation=activation, residual=residual, **options)
    out_dtype = options.get("out_dtype", BF16)
    epilogue = bias, activation, residual
    assert actual.is_contiguous()
    check(actual, plain(args, *epilogue, out_dtype), exact(args, *epilogue))


def epilogue(m, n, device, dtype=BF16):
    return torch.randn(n, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_reference_is_torch(kind, device):
    x, x_scale, weight, weight_scale = operands(32, 48, 64, kind, device)
    out_dtype = torch.bfloat16 if kind == "fp8" and device == "cuda" else torch.float32
    actual = scaled_mm_reference(x, x_scale, weight, weight_scale, out_dtype=out_dtype)
    if kind == "int8":
        expected = torch._int_mm(x, weight.T) * x_scale * weight_scale.T
    elif device == "cuda" or _cpu_scales_rows():
        expected = torch._scaled_mm(
            x, weight.T, x_scale, weight_scale.T.contiguous(), out_dtype=out_dtype
        )
    else:  # torch 2.11 on a CPU
        x_scale, weight_scale = x_scale[:1], weight_scale[:1]
        actual = scaled_mm_reference(
            x, x_scale.expand(32, 1), weight, weight_scale.expand(48, 1), out_dtype=out_dtype
        )
        expected = torch._scaled_mm(x, weight.T, x_scale, weight_scale, out_dtype=out_dtype)
    torch.testing.assert_close(actual, expected)


def _cpu_scales_rows() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def test_reference_of_blocks_is_a_product_of_what_was_quantized():
    x, weight = torch.randn(3, 300), torch.randn(200, 300)
    q, scale = quantize_act(x, FP8, group_size=128)
    weight_scale = torch.tensor([[0.5, 2.0, 4.0], [8.0, 0.25, 1.0]])
    coarse = weight_scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    y = scaled_mm_reference(q, scale, (weight / coarse).to(FP8), weight_scale)
    error = (y.float() - x @ weight.T).norm() / (x @ weight.T).norm()
    assert error < 0.04  # of 2⁻⁴ for one operand, at most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "m, n, k",
    [(1, 37, 130), (1, 64, 1100), (3, 576, 192), (16, 130, 400), (17, 33, 77), (64, 64, 256)],
)
def test_few_rows(m, n, k, kind, device):
    args = operands(m, n, k, kind, device)
    check_call(args)
    bias, residual = epilogue(m, n, device)
    check_call(args, bias, "silu", residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n, k", [(65, 576, 192), (130, 145, 100), (200, 40, 16), (70, 1, 1)])
def test_many_rows(m, n, k, kind, device):
    args = operands(m, n, k, kind, device)
    check_call(args, backend="triton")
    bias, residual = epilogue(m, n, device)
    check_call(args, bias, "gelu", residual, backend="triton")
    check_call(args, bias, "gelu", residual)


TILE = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 2, "PROMOTE": 128}
META = {
    "dot": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "PROMOTE": 32, "PREFETCH": 256},
    "tile": TILE,
    "wide tile": {**TILE, "BLOCK_N": 256, "PROMOTE": 0},
    "tma": {**TILE, "PARTS": 1, "FLATTEN": False, "PER_SM": 1},
    "tma in parts": {**TILE, "BLOCK_N": 256, "PARTS": 2, "FLATTEN": True, "PER_SM": 1},
    "sums": {"BLOCK_M": 16, "BLOCK_N": 8, "BLOCK_K": 64},
}
RUNS = [(name, kind) for name in META for kind in KINDS if name != "sums" or kind == "int8"]


def config_of(name):
    kernel = name.split()[-1] if "tile" in name else name.split()[0]
    return {"backend": "triton", "kernel": kernel, "meta": META[name]}


def run(name, args, kind, *rest):
    m, n = args[0].shape[0], args[2].shape[0]
    y = torch.full((m, n), torch.nan, device=args[0].device, dtype=BF16)
    bias, activation, residual = rest or (None, None, None)
    launch(config_of(name), *args, bias, activation, y, residual, kind == "block")
    return y


@pytest.mark.parametrize("name, kind", RUNS)
@pytest.mark.parametrize("even", [False, True])
def test_every_kernel(name, kind, even, device, monkeypatch):
    """Tiles and steps that nothing fills, and a few programs with much to do."""
    few = {"dot": (37, 70), "sums": (21, 20)}
    m, n = few.get(name, (130, 300))
    k = 256 if even else 272
    monkeypatch.setattr(_scaled, "sm_count", lambda device: 2)
    args = operands(m, n, k, kind, device)
    bias, residual = epilogue(m, n, device)
    check(run(name, args, kind), plain(args), exact(args))
    rest = bias, "silu", residual
    check(run(name, args, kind, *rest), plain(args, *rest), exact(args, *rest))


@pytest.mark.parametrize("name, kind", [run for run in RUNS if run[0] in ("dot", "sums")])
def test_what_earlier_kernels_wrote_is_read_after_the_wait(name, kind):
    x, x_scale, *_ = args = operands(2, 20, 200, kind, "cpu")
    _, residual = epilogue(2, 20, "cpu")
    rest = None, None, residual
    want = plain(args, *rest), exact(args, *rest)
    with interpret(), late(x_scale, residual, *(() if kind == "int8" else (x,))):
        y = run(name, args, kind, *rest)
    check(y, *want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "backend, m, kind",
    [
        *((None, 3, kind) for kind in KINDS),
        *(("triton", 70, kind) for kind in KINDS),
        ("cublas", 20, "fp8"),
        ("cublas", 20, "int8"),
    ],
)
def test_every_epilogue(backend, m, kind, activation, device):
    args = operands(m, 48, 160, kind, device)
    bias, residual = epilogue(m, 48, device)
    for b in (None, bias, bias.float()):
        for r in (None, residual):
            check_call(args, b, activation, r, backend=backend)


@pytest.mark.parametrize("out_dtype", OUT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [2, 66])
def test_output_dtypes(m, kind, out_dtype, device):
    args = operands(m, 40, 144, kind, device)
    bias, residual = epilogue(m, 40, device, out_dtype)
    actual = scaled_mm(*args, bias=bias, residual=residual, out_dtype=out_dtype)
    assert actual.dtype == out_dtype
    if out_dtype == torch.float32:  # nearly exact, where torch in float32 is a matter of luck
        want = exact(args, bias, None, residual)
        # tensor cores add float8 products with about 13 bits before they reach float32
        atol = 5e-4 if device == "cuda" and kind != "int8" else 1e-6
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=atol * want.abs().max().item())
    else:
        rest = bias, None, residual
        check(actual, plain(args, *rest, out_dtype), exact(args, *rest))


@pytest.mark.parametrize("m", [1, 8, 70])
def test_integer_sums_are_exact(m, device):
    """Sums far beyond 2²⁴, where float32 would drop digits on the way, and beyond float16."""
    x = torch.randint(64, 128, (m, 4096), device=device, dtype=INT8)
    weight = torch.randint(64, 128, (16, 4096), device=device, dtype=INT8)
    one = torch.ones(m, 1, device=device), torch.ones(16, 1, device=device)
    actual = scaled_mm(x, one[0], weight, one[1], out_dtype=torch.float32)
    assert torch.equal(actual, (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("kind", ["fp8", "block"])
@pytest.mark.parametrize("m", [2, 70])
def test_values_of_any_size(m, kind, device):
    """The largest and smallest codes, with scales that bring them back."""
    x, x_scale, weight, weight_scale = operands(m, 40, 256, kind, device)
    x[0, ::2], weight[3] = 448.0, 2.0**-9
    check_call((x, x_scale * 1e-20, weight, weight_scale * 1e20))
    check_call((x, x_scale * 1e15, weight, weight_scale * 1e-15))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [3, 70])
def test_a_nan_reaches_the_rows_and_columns_it_belongs_to(m, kind, device):
    x, x_scale, weight, weight_scale = operands(m, 40, 256, kind, device)
    x_scale[1, -1] = torch.nan
    if kind != "int8":
        weight[5, 9] = torch.nan
    bad = scaled_mm(x, x_scale, weight, weight_scale).isnan()
    expected = torch.zeros_like(bad)
    expected[1] = True
    expected[:, 5] |= kind != "int8"
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 6, 70])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_views_of_fused_tensors(m, kind, backend, device):
    """Slices of rows and columns, of codes and of scales."""
    x, _, weight, _ = operands(m, 300, 3 * 256, kind, device)
    block = kind == "block"
    wide = torch.randn(m, 200, device=device).to(BF16)
    first = 128 if block else 120  # blocks stay whole
    x_scale, weight_scale = mixed((m, 5), device), mixed((7, 5) if block else (300, 3), device)
    part = slice(1, 2 if block else first + 100)
    args = (
        x[:, 256:512],
        x_scale[:, 2:4] if block else x_scale[:, 2:3],
        weight[first : first + 100, 256:512],
        weight_scale[part, 1:3] if block else weight_scale[first:, 2:3][:100],
    )
    check_call(args, wide[0, 9:109], "silu", wide[:, 16:116], backend=backend)
    check_call(tuple(t[:, 1:] if t.shape[1] == 256 else t for t in args), backend=backend)


@pytest.mark.parametrize("m", [2, 70])
def test_one_scale_for_a_whole_tensor(m, device):
    """Expanded, as formats with a scale per tensor hold it: strides of 0."""
    x, _, weight, _ = operands(m, 48, 160, "fp8", device)
    one = torch.tensor([[0.25]], device=device)
    args = x, (one * 3).expand(m, 1), weight, one.expand(48, 1)
    check_call(args)
    check_call(args, backend="triton")
    if m > 16:
        check_call(args, backend="cublas")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(shape, kind, device):
    x, weight = codes(shape, kind, device), codes((24, 64), kind, device)
    x_scale = mixed((*shape[:-1], 1), device)
    weight_scale = mixed((1 if kind == "block" else 24, 1), device)
    residual = torch.randn(*shape[:-1], 24, device=device).to(BF16)
    y = scaled_mm(x, x_scale, weight, weight_scale, activation="silu", residual=residual)
    assert y.shape == residual.shape
    if y.numel():
        args = x.reshape(-1, 64), x_scale.reshape(-1, 1), weight, weight_scale
        rest = None, "silu", residual.reshape(-1, 24)
        check(y.reshape(-1, 24), plain(args, *rest), exact(args, *rest))
    none = weight_scale[:0]
    assert scaled_mm(x, x_scale, weight[:0], none).shape == (*shape[:-1], 0)


def test_blocks_and_rows_of_a_small_weight(device):
    """[1, 1] scales of a single block are no scales of rows."""
    for n in (1, 3):
        x, x_scale, weight, weight_scale = operands(2, n, 100, "block", device)
        assert weight_scale.shape == x_scale[:1].shape == (1, 1)
        check_call((x, x_scale, weight, weight_scale))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_by_the_kernels_before_it(kind, device):
    """The whole way of a linear layer, against the layer in float32."""
    dtype, group = (INT8 if kind == "int8" else FP8), (128 if kind == "block" else None)
    x = torch.randn(9, 320, device=device) * 10.0 ** torch.randint(-3, 3, (9, 1), device=device)
    weight = torch.randn(160, 320, device=device)
    if kind == "block":
        weight_scale = torch.full((2, 3), 1 / 64, device=device)
        q = (weight * 64).to(FP8)
    else:
        q, weight_scale = quantize_act(weight, dtype)
    y = scaled_mm(*quantize_act(x, dtype, group_size=group), q, weight_scale)
    want = F.linear(x, weight)
    error = (y.float() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < (0.015 if kind == "int8" else 0.045)


@pytest.mark.parametrize(
    "m, kind, backend, kernel",
    [
        (1, "fp8", None, "_dot_kernel"),
        (64, "block", None, "_dot_kernel"),
        (65, "fp8", "triton", "_tma_kernel"),
        (65, "int8", None, "_tma_kernel"),
        (70, "block", None, "_tma_kernel"),
    ],
)
def test_the_kernel_ran_and_not_its_reference(m, kind, backend, kernel, device, monkeypatch):
    where = _scaled
    if kernel == "_dot_kernel" and has_ring():
        where, kernel = _scaled.hopper, "_few_rows_sm90_kernel"
    launched = record_launches(monkeypatch, where, kernel)
    with count_ops() as counts:
        scaled_mm(*operands(m, 32, 64, kind, device), backend=backend)
    assert counts == {"scaled_mm[triton]": 1} and len(launched) == 1


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_cublas_is_counted(kind, device):
    with count_ops() as counts:
        check_call(operands(20, 32, 64, kind, device), backend="cublas")
    assert counts == {"scaled_mm[cublas]": 1}


def chosen(m, kind, arch, backend=None, n=32, k=64):
    args = operands(m, n, k, kind, "cpu")
    with interpret(sm=arch):
        config = choose(args[0], args[2], args[3], BF16, backend)
        return config.get("kernel", config["backend"])


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_default_choice(arch):
    few = "sums" if arch < 80 else "dot"
    many = "sums" if arch < 80 else "tma" if arch in (90, 100) else "tile"
    assert chosen(1, "int8", arch) == chosen(16, "int8", arch) == few
    assert chosen(17, "int8", arch, "cublas") == "cublas"
    assert chosen(17, "int8", arch) == ("cublas" if arch < 80 else "dot")
    if arch >= 89:
        block = default_config(arch, 132, FP8, (4096, 4096), 512, blockwise=True)
        assert block["kernel"] == many
        assert default_config(arch, 132, FP8, (4096, 4096), 513, blockwise=True) == CUBLAS
    assert chosen(65, "int8", arch, "triton") == many
    assert chosen(65, "int8", arch) == ("tma" if arch in (90, 100) else "cublas")
    assert chosen(65, "int8", arch, k=72) == ("tile" if arch in (90, 100) else "cublas")
    assert chosen(65, "int8", arch, k=70) == ("sums" if arch < 80 else "tile")
    if arch >= 89:
        assert chosen(1, "fp8", arch) == chosen(64, "block", arch) == "dot"
        assert chosen(65, "fp8", arch, "triton") == chosen(65, "block", arch) == many
        assert chosen(65, "fp8", arch) == "cublas"
        assert chosen(65, "fp8", arch, n=40) == many


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_gluon_takes_few_rows_on_sm_90(m, dtype, monkeypatch):
    monkeypatch.setattr(module, "ring_missing", lambda: None)
    module.triton_config.cache_clear()
    config = default_config(90, 132, dtype, (4096, 4096), m)
    assert config["kernel"] == "ring" and config["meta"]["BLOCK_M"] == max(m, 8)
    assert default_config(90, 132, dtype, (4096, 4096 + 8), m)["kernel"] == "dot"
    assert default_config(100, 148, dtype, (4096, 4096), m)["kernel"] == "dot"
    module.triton_config.cache_clear()


def has_ring():
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and _scaled.ring_missing() is None
    )


@pytest.mark.skipif(not has_ring(), reason="needs sm_90 and a Triton that is known to run it")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, block_m", [(1, 8), (5, 16), (64, 64), (70, 32)])
@pytest.mark.parametrize("n, k", [(300, 272), (66, 64), (64, 4096), (1, 16)])
def test_ring(n, k, m, block_m, kind):
    """More stages than steps, fewer, tiles that nothing fills; twice, as steps follow each other."""
    for block_k, stages in ((128, 3), (128, 9), (256, 2))[: 2 if kind == "block" else 3]:
        args = operands(m, n, k, kind, "cuda")
        bias, residual = epilogue(m, n, "cuda")
        for rest in ((), (bias, "silu", residual)):
            for _ in range(2):
                y = torch.full((m, n), torch.nan, device="cuda", dtype=BF16)
                meta = {"BLOCK_M": block_m, "BLOCK_K": block_k, "STAGES": stages}
                config = {"backend": "triton", "kernel": "ring", "meta": meta}
                b, act, r = rest or (None, None, None)
                launch(config, *args, b, act, y, r, kind == "block")
                check(y, plain(args, *rest), exact(args, *rest))


needs_gluon = pytest.mark.skipif(
    not triton.__version__.startswith(("3.6.", "3.7.")),
    reason="needs triton 3.6 or 3.7, whose Gluon the kernel is written in",
)


@needs_gluon
@pytest.mark.parametrize("kind, m", [("fp8", 1), ("int8", 16), ("block", 64)])
def test_code_of_ring(kind, m, monkeypatch):
    """Compiled for sm_90: wgmma, W asked for before the wait, no spills, and it fits an SM."""
    monkeypatch.setattr(module, "ring_missing", lambda: None)
    module.triton_config.cache_clear()

    def compile_it():
        args = operands(m, 4096, 4096, kind, "cpu")
        with dry_run(90) as launches:
            scaled_mm(*args)
        (launch,) = launches
        return launch.kernel, launch.grid, launch.compiled.asm["ptx"], measure(launch.compiled)

    kernel, grid, ptx, metrics = isolated(compile_it)
    module.triton_config.cache_clear()
    assert kernel == "_few_rows_sm90_kernel" and grid == (64, 1, 1)
    before = ptx[: ptx.index("griddepcontrol.wait")]
    stages = module._ring_meta(m, kind == "block")["STAGES"]
    assert before.count("cp.async.bulk.tensor") == stages and "ld.global" not in before
    assert "wgmma.mma_async" in ptx and metrics.dependent
    assert metrics.spill_bytes == 0 and metrics.shared <= 227 * 1024


def test_ring_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_scaled.hopper, "TRITON", (triton.__version__,))
    assert _scaled.ring_missing() is None
    monkeypatch.setattr(_scaled.hopper, "TRITON", ("0.",))
    assert "untested with Gluon" in _scaled.ring_missing()
    with interpret():
        assert _scaled.ring_missing() == "Triton's interpreter has no Gluon"
    monkeypatch.setattr(_scaled, "hopper", None)
    monkeypatch.setattr(_scaled, "_import_error", "moved", raising=False)
    assert "another Gluon: moved" in _scaled.ring_missing()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and module._is_new(torch.device("cuda"))),
    reason="needs sm_90 and CUDA 12.9",
)
@pytest.mark.parametrize("m, n, k", [(16, 128, 512), (100, 640, 1024), (516, 256, 4096)])
def test_cublas_multiplies_blocks(m, n, k):
    args = operands(m, n, k, "block", "cuda")
    bias, residual = epilogue(m, n, "cuda")
    check_call(args, backend="cublas")
    check_call(args, bias, "silu", residual, backend="cublas")


@pytest.mark.parametrize("arch", [75, 80, 89, 90, 100, 120])
@pytest.mark.parametrize("m", [1, 16, 48, 64, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_distinct_and_fit(kind, m, arch):
    dtype = INT8 if kind == "int8" else FP8
    found = candidates(arch, 132, dtype, (4096, 4096), m, blockwise=kind == "block")
    assert len({str(config) for config in found}) == len(found)
    assert (CUBLAS in found) == (kind != "int8" or m > 16)
    kernels = {config["kernel"] for config in found if config != CUBLAS}
    many = set() if arch < 80 else {"tma" if arch in (90, 100) else "tile"}
    few = {"sums"} if arch < 80 else {"dot"}
    if arch == 90 and _scaled.ring_missing() is None:
        few.add("ring")
    assert kernels == (
        (few if m <= (16 if arch < 80 else 64) else set()) | (many if m > 32 else set())
    )
    if kind == "block":
        assert {c["meta"]["BLOCK_K"] for c in found if c != CUBLAS and arch >= 80} <= {128}


def test_tiles_of_many_rows():
    """The largest of which there are more than SMs, as measured on an H100 of 132."""
    tile = {
        (m, n): tuple(module._tma_meta(132, m, n, False)[key] for key in ("BLOCK_M", "BLOCK_N"))
        for m in (128, 256, 512, 4096)
        for n in (4096, 6144, 28672)
    }
    assert tile[128, 4096] == tile[128, 6144] == tile[256, 4096] == (64, 64)
    assert tile[256, 6144] == tile[512, 4096] == (64, 128)
    assert {tile[128, 28672], tile[512, 6144], tile[4096, 4096]} == {(128, 128)}
    assert module._tma_meta(132, 4096, 4096, True)["BLOCK_M"] == 64


def test_sm_75_needs_no_tensor_cores():
    with interpret(sm=75):
        for m in (1, 3, 11):
            args = operands(m, 20, 70, "int8", "cpu")
            check_call(args, *epilogue(m, 20, "cpu")[:1], "silu")
        args = operands(18, 40, 72, "int8", "cpu")
        check_call(args)
        check_call(args, backend="triton")


@pytest.mark.parametrize("arch", [75, 80, 86])
@pytest.mark.parametrize("backend", [None, "triton", "cublas"])
def test_float8_needs_a_gpu_that_has_it(arch, backend):
    args = operands(2, 32, 64, "fp8", "cpu")
    message = rf'need sm_89 or newer, cpu is sm_{arch}: .*dequant_mm\(..., kind="fp8"\)'
    with interpret(sm=arch), pytest.raises(UnsupportedError, match=message):
        scaled_mm(*args, backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it depends on its age: needs a CPU")
@pytest.mark.parametrize(
    "m, n, k, kind, out_dtype, message",
    [
        (16, 32, 64, "int8", BF16, r"more than 16 rows .* by 8, got \(16, 32, 64\)"),
        (20, 32, 60, "int8", BF16, r"divisible by 8, got \(20, 32, 60\)"),
        (20, 40, 64, "fp8", BF16, r"divisible by 16, got \(40, 64\)"),
        (20, 32, 64, "fp8", torch.float16, "writes bfloat16, not torch.float16"),
        (20, 128, 512, "block", BF16, "scales of blocks on sm_90 with CUDA 12.9"),
    ],
)
def test_what_cublas_lacks(m, n, k, kind, out_dtype, message, device):
    args = operands(m, n, k, kind, device)
    with pytest.raises(UnsupportedError, match=message + '.*use backend="triton"'):
        scaled_mm(*args, out_dtype=out_dtype, backend="cublas")
    scaled_mm(*args, out_dtype=out_dtype)


def test_a_table_decides_where_it_can(device, monkeypatch):
    asked, measured = [], {}

    def lookup(op, version, device, dtype, dims, running):
        asked.append((op, dtype, dims, running))
        return measured.get(running)

    monkeypatch.setattr(module, "lookup", lookup)
    tma = {**config_of("tma")}
    for m, kind, k, table, ran in (
        (32, "int8", 64, CUBLAS, "cublas"),
        (33, "int8", 64, tma, "tma"),
        (34, "int8", 65, tma, "dot"),  # the TMA unit cannot read such rows
        (35, "int8", 65, CUBLAS, "dot"),
        (36, "block", 192, tma, "tma"),
        (37, "fp8", 192, None, "ring" if has_ring() else "dot"),
    ):
        measured[m] = table
        args = operands(m, 48, k, kind, device)
        config = choose(args[0], args[2], args[3], BF16, None)
        assert config.get("kernel", config["backend"]) == ran
        check_call(args, *epilogue(m, 48, device)[:1], "silu")
    assert {op for op, *_ in asked} == {"scaled_mm.int8", "scaled_mm.fp8_block", "scaled_mm.fp8"}
    assert asked[0][1:] == (INT8, (48, 64), 32)


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind, device):
    for m in (3, 70):
        args = operands(m, 32, 64, kind, device)
        bias, residual = epilogue(m, 32, device)
        tests = ("test_schema", "test_faketensor")[kind != "int8" :]  # torch compares no float8
        torch.library.opcheck(
            torch.ops.tlk.scaled_mm.default,
            (*args, bias, "silu", residual),
            test_utils=tests,
        )
    compiled = torch.compile(
        lambda *args: scaled_mm(*args, bias=bias, activation="gelu") * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    check(compiled(*args), 2 * plain(args, bias, "gelu"), 2 * exact(args, bias, "gelu"))


def call(args):
    first = [args.pop(name) for name in ("x", "x_scale", "weight", "weight_scale")]
    return scaled_mm(*first, **args)


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        bad("x must be float8_e4m3fn or int8, got float32", TypeError, x=torch.float32),
        bad(r"x must have a last dimension to sum over, got shape \(\)", x=()),
        bad("weight must be float8_e4m3fn, got int8", TypeError, weight=INT8),
        bad(r"weight must have shape \(any, 64\), got \(32, 63\)", weight=(32, 63)),
        bad(r"x_scale must have shape \(2, 1\), got \(2,\)", x_scale=(2,)),
        bad("x_scale must be float32, got bfloat16", TypeError, x_scale=BF16),
        bad(
            r"weight_scale must have shape \(32, 1\) or \(1, 1\), got \(1, 32\)",
            weight_scale=(1, 32),
        ),
        bad("weight_scale must be float32, got float16", TypeError, weight_scale=torch.float16),
        bad("weight_scale must be on .*, got meta", weight_scale="meta"),
        bad(r"bias must have shape \(32\), got \(31,\)", bias=(31,)),
        bad("bias must be float32 or .*, got int8", TypeError, bias=INT8),
        bad(r"residual must have shape \(2, 32\), got \(32,\)", residual=(32,)),
        bad("residual must be bfloat16, got float16", TypeError, residual=torch.float16),
        bad("residual must be on .*, got meta", residual="meta"),
        bad("activation must be None or one of .*, got 'tanh'", activation="tanh"),
        bad("backend must be one of .*'cublas'.*, got 'cudnn'", backend="cudnn"),
        bad("out_dtype must be .*, got torch.int8", TypeError, out_dtype=INT8),
    ],
)
def test_bad_input(changes, error, message, device):
    args = {
        "x": torch.zeros(2, 64, device=device).to(FP8),
        "x_scale": torch.ones(2, 1, device=device),
        "weight": torch.zeros(32, 64, device=device).to(FP8),
        "weight_scale": torch.ones(32, 1, device=device),
        "bias": torch.zeros(32, device=device),
        "residual": torch.zeros(2, 32, device=device, dtype=BF16),
    }
    for name, change in changes.items():
        if name not in args:
            args[name] = change
        elif isinstance(change, tuple):
            args[name] = torch.zeros(change, device=device).to(args[name].dtype)
        else:
            args[name] = args[name].to(change)
    with pytest.raises(error, match=message):
        call(args)


def test_int8_has_no_blocks(device):
    x, _, weight, _ = operands(2, 200, 256, "int8", device)
    scales = torch.ones(2, 2, device=device)
    with pytest.raises(ValueError, match=r"weight_scale must have shape \(200, 1\), got \(2, 2\)"):
        scaled_mm(x, scales, weight, scales)


@pytest.mark.parametrize("name", ["x", "weight", "x_scale", "residual"])
def test_the_last_dimension_must_be_contiguous(name, device):
    args = {
        "x": torch.zeros(2, 256).to(FP8),
        "x_scale": torch.ones(2, 2),
        "weight": torch.zeros(200, 256).to(FP8),
        "weight_scale": torch.ones(2, 2),
        "residual": torch.zeros(2, 200, dtype=BF16),
    }
    args = {key: value.to(device) for key, value in args.items()}
    args[name] = args[name].T.contiguous().T
    with pytest.raises(ValueError, match=f"{name} must have stride 1 in its last dimension"):
        call(args)
