import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tlk.kernels import _linear
from tlk.kernels._linear import launch
from tlk.kernels._linear_configs import CUBLAS, decode_config, default_config, tile_config
from tlk.kernels._op import count_ops
from tlk.kernels.matmul import choose, matmul, matmul_add_, matmul_reference

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.matmul")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, "silu", "gelu", "gelu_tanh", "relu_squared"]
BF16 = torch.bfloat16


def rows_of_mixed_scale(shape, device, dtype):
    scale = 10.0 ** torch.randint(-2, 1, (*shape[:-1], 1), device=device)
    return (torch.randn(shape, device=device) * scale).to(dtype)


def operands(m, n, k, device, dtype):
    x = rows_of_mixed_scale((m, k), device, dtype)
    weight = rows_of_mixed_scale((n, k), device, dtype)
    bias, residual = torch.randn(n, device=device), torch.randn(m, n, device=device)
    return x, weight, bias.to(dtype), residual.to(dtype)


def plain(x, weight, bias=None, activation=None, residual=None):
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = {
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
            "relu_squared": lambda y: F.relu(y) ** 2,
        }[activation](y)
    return y if residual is None else y + residual


def exact(x, weight, bias=None, activation=None, residual=None):
    b, r = (None if t is None else t.float() for t in (bias, residual))
    return matmul_reference(x.float(), weight.float(), b, activation, r)


def check_call(x, weight, bias=None, activation=None, residual=None, **options):
    actual = matmul(x, weight, bias, activation=activation, residual=residual, **options)
    args = x, weight, bias, activation, residual
    check(actual, plain(*args), exact(*args))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_torch(activation):
    x, weight, bias, residual = operands(3, 20, 40, "cpu", torch.float32)
    args = x, weight, bias, activation, residual
    torch.testing.assert_close(matmul_reference(*args), plain(*args))
    torch.testing.assert_close(matmul_reference(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, n, k", [(1, 37, 130), (1, 8, 1100), (2, 33, 256), (5, 50, 300), (16, 64, 512), (17, 40, 90)]
)
def test_matmul(m, n, k, dtype, device):
    x, weight, bias, residual = operands(m, n, k, device, dtype)
    check_call(x, weight)
    check_call(x, weight, bias, "silu", residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(33, 70, 90), (130, 140, 128), (1, 1, 1)])
def test_tiles(m, n, k, dtype, device):
    x, weight, bias, residual = operands(m, n, k, device, dtype)
    config = tile_config(90 if device == "cpu" else 80, dtype)
    y = torch.full_like(residual, torch.nan)
    launch(config, x, weight, bias, "gelu", y, residual)
    args = x, weight, bias, "gelu", residual
    check(y, plain(*args), exact(*args))
    check_call(x, weight, backend="triton")


@pytest.mark.parametrize("group", [1, 2, 8])
def test_grouped_order_reaches_every_tile(group, device):
    x, weight, _, residual = operands(75, 40, 32, device, torch.float32)
    meta = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": group}
    y = torch.full_like(residual, torch.nan)
    launch({"backend": "triton", "kernel": "tile", "meta": meta}, x, weight, None, None, y)
    check(y, plain(x, weight), exact(x, weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_every_epilogue(m, activation, device):
    x, weight, bias, residual = operands(m, 24, 64, device, BF16)
    for b in (None, bias):
        for r in (None, residual):
            check_call(x, weight, b, activation, r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 6, 16, 20])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_views_of_fused_tensors(m, dtype, backend, device):
    wide_x = rows_of_mixed_scale((m, 3 * 64), device, dtype)
    fused = rows_of_mixed_scale((100, 2 * 64), device, dtype)
    wide_residual = torch.randn(m, 80, device=device).to(dtype)
    check_call(
        wide_x[:, 64:128],
        fused[30:70, 64:],
        wide_residual[0, 7:47],
        "silu",
        wide_residual[:, 16:56],
        backend=backend,
    )
    check_call(wide_x[:, 64:128], fused[30:70, 64:], residual=wide_residual[:, 16:56])


@pytest.mark.parametrize("m", [1, 7, 24])
def test_sums_may_pass_the_largest_float16(m, device):
    """The running sum reaches 128 · 60 · 30 = 230400 and comes back."""
    x = torch.full((m, 256), 60.0, device=device, dtype=torch.float16)
    weight = torch.full((16, 256), 30.0, device=device, dtype=torch.float16)
    weight[:, 128:] = -29.0
    actual = matmul(x, weight, backend="triton")
    torch.testing.assert_close(actual, torch.full_like(actual, 128 * 60.0), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(shape, device):
    x = rows_of_mixed_scale(shape, device, BF16)
    weight = torch.randn(24, 64, device=device).to(BF16)
    residual = torch.randn(*shape[:-1], 24, device=device).to(BF16)
    actual = matmul(x, weight, activation="silu", residual=residual)
    assert actual.shape == residual.shape
    if actual.numel():
        check(actual, *(f(x, weight, None, "silu", residual) for f in (plain, exact)))
    assert matmul(x, weight[:0]).shape == (*shape[:-1], 0)


@pytest.mark.parametrize(
    "m, dtype, ran",
    [
        (1, BF16, "triton"),
        (16, BF16, "triton"),
        (17, BF16, "cublas"),
        (4, torch.float32, "triton"),
        (5, torch.float32, "cublas"),
    ],
)
def test_what_ran_is_counted(m, dtype, ran, device, monkeypatch):
    launched = []
    run = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launched.append(a), run(*a, **k)))
    x, weight, *_ = operands(m, 32, 64, device, dtype)
    with count_ops() as counts:
        matmul(x, weight)
    assert counts == {f"matmul[{ran}]": 1}
    assert len(launched) == (ran == "triton")


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_choice(arch, dtype):
    def kernel(m, backend=None):
        config = choose(torch.empty(m, 64, dtype=dtype), torch.empty(32, 64, dtype=dtype), backend)
        return config.get("kernel", config["backend"])

    with interpret(sm=arch):
        tensor_cores = arch >= 80 and dtype != torch.float32
        assert kernel(1) == kernel(1, "triton") == "gemv"
        assert kernel(1, "invariant") == kernel(40, "invariant") == "tile"
        assert kernel(4) == ("dot" if tensor_cores else "fma")
        assert kernel(16) == (
            "dot" if tensor_cores else "cublas" if dtype == torch.float32 else "fma"
        )
        assert kernel(17) == kernel(4096) == kernel(1, "cublas") == "cublas"
        assert kernel(17, "triton") == "tile"


@pytest.mark.parametrize("n", [3072, 4096, 6144, 28672])
def test_default_choice_of_17_to_64_rows(n):
    """On sm_90 tensor cores with W as the left operand, where W has rows for every second SM."""
    for m, least in ((17, 4096), (32, 4096), (33, 6144), (64, 6144), (65, 10**9)):
        config = default_config(90, 132, BF16, (n, 4096), m)
        assert config.get("kernel", "cublas") == ("dot" if n >= least else "cublas")
        if "meta" in config:
            assert config["meta"]["BLOCK_M"] >= m
            assert config["meta"]["BLOCK_N"] == (128 if n == 28672 else 64)
        for arch, dtype in ((80, BF16), (100, BF16), (90, torch.float32)):
            assert default_config(arch, 132, dtype, (n, 4096), m) is CUBLAS


def test_sm_75_needs_no_tensor_cores():
    with interpret(sm=75):
        for m in (3, 8, 11):
            x, weight, bias, residual = operands(m, 20, 70, "cpu", torch.float16)
            check_call(x, weight, bias, "silu", residual)
        check_call(*operands(18, 40, 70, "cpu", torch.float16)[:2], backend="triton")


@pytest.fixture(params=["fp32_precision", "legacy"])
def allow_tf32(request):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if request.param == "legacy":
        settings.allow_tf32 = True
    else:
        settings.fp32_precision = "tf32"
    yield
    settings.fp32_precision = before


@pytest.mark.parametrize("m", [2, 40])
def test_float32_stays_ieee_when_torch_allows_tf32(m, device, allow_tf32):
    x, weight, *_ = operands(m, 32, 64, device, torch.float32)
    assert choose(x, weight, None)["backend"] == "triton"
    want = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(matmul(x, weight), want)
    x, weight = x.to(BF16), weight.to(BF16)
    assert choose(x, weight, None)["backend"] == ("cublas" if m == 40 else "triton")


def test_a_table_decides(device, monkeypatch):
    measured = {16: CUBLAS, 40: {**decode_config(90, 8, BF16, 16, 48, 64)}}
    asked = []

    def lookup(op, version, device, dtype, dims, running):
        asked.append((op, dims))
        return measured[running]

    monkeypatch.setattr(module, "lookup", lookup)
    for m, ran in ((16, "cublas"), (40, "triton")):
        x, weight, bias, residual = operands(m, 48, 64, device, BF16)
        with count_ops() as counts:
            check_call(x, weight, bias, "silu", residual)
        assert counts == {f"matmul[{ran}]": 1}
    assert set(asked) == {("matmul", (48, 64))}


META = {
    "gemv": {"BLOCK_N": 4, "PER_SM": 1, "MOST_TILES": 9},
    "fma": {"BLOCK_M": 2, "BLOCK_N": 4, "BLOCK_K": 64},
    "dot": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "PREFETCH": 128},
}


@pytest.mark.parametrize("kernel", META)
@pytest.mark.parametrize("n, k", [(66, 300), (64, 256), (5, 40)])
def test_decode_kernels(kernel, n, k, device, monkeypatch):
    """Rows of W that fill no tile and K steps that fill no block, and those that do."""
    monkeypatch.setattr(_linear, "sm_count", lambda device: 8)  # few programs with much to do
    m = 1 if kernel == "gemv" else 5
    x, weight, bias, residual = operands(m, n, k, device, BF16)
    y = torch.full_like(residual, torch.nan)
    config = {"backend": "triton", "kernel": kernel, "meta": META[kernel]}
    launch(config, x, weight, bias, "silu", y, residual)
    args = x, weight, bias, "silu", residual
    check(y, plain(*args), exact(*args))


@pytest.mark.parametrize("kernel", META)
def test_what_earlier_kernels_wrote_is_read_after_the_wait(kernel):
    x, weight, bias, residual = operands(1, 20, 96, "cpu", BF16)
    y = torch.empty_like(residual)
    with interpret(), late(x, residual):
        config = {"backend": "triton", "kernel": kernel, "meta": META[kernel]}
        launch(config, x, weight, bias, None, y, residual)
    args = x, weight, bias, None, residual
    check(y, plain(*args), exact(*args))


def test_rows_too_long_for_registers(device):
    for dtype, k in ((BF16, 16392), (torch.float32, 8200)):
        x, weight, *_ = operands(1, 3, k, device, dtype)
        assert choose(x, weight, None)["kernel"] == "fma"
        assert choose(x[:, : k - 8], weight[:, : k - 8], None)["kernel"] == "gemv"
        check_call(x, weight)
        check_call(x[:, : k - 8], weight[:, : k - 8])


def test_a_measured_gemv_is_for_one_row(device, monkeypatch):
    meta = {"BLOCK_N": 32, "PER_SM": 1, "MOST_TILES": 9, "num_warps": 1}
    gemv = {"backend": "triton", "kernel": "gemv", "meta": meta}
    monkeypatch.setattr(module, "lookup", lambda *_: gemv)
    x, weight, *_ = operands(2, 8, 64, device, BF16)
    assert choose(x[:1], weight, None) is gemv
    assert choose(x, weight, None)["kernel"] == "dot"
    check_call(x, weight)
    check_call(x[:1], weight)


@pytest.mark.parametrize("k, fits", [(2048, False), (4096, True), (8192, True), (16384, False)])
def test_a_measured_gemv_is_for_rows_of_a_like_length(k, fits, monkeypatch):
    """128 or 256 bytes of W a thread: with fewer it waits, and more do not fit its registers."""
    meta = {"BLOCK_N": 4, "PER_SM": 1, "MOST_TILES": 9, "num_warps": 8}
    gemv = {"backend": "triton", "kernel": "gemv", "meta": meta}
    monkeypatch.setattr(module, "lookup", lambda *_: gemv)
    with interpret(sm=90):
        config = choose(torch.empty(1, k, dtype=BF16), torch.empty(8, k, dtype=BF16), None)
    assert (config is gemv) == fits


@pytest.mark.parametrize("n, fits", [(3264, False), (3456, True)])
def test_a_measured_dot_is_for_as_many_tiles_as_half_the_sms(n, fits, monkeypatch):
    dot = {"backend": "triton", "kernel": "dot", "meta": META["dot"] | {"BLOCK_N": 64}}
    monkeypatch.setattr(module, "lookup", lambda *_: dot)
    monkeypatch.setattr(module, "sm_count", lambda device: 132)
    with interpret(sm=90):
        config = choose(torch.empty(16, 64, dtype=BF16), torch.empty(n, 64, dtype=BF16), None)
    assert (config is dot) == fits


def test_a_measured_kernel_for_few_rows_is_not_for_many(device, monkeypatch):
    for kernel, most in (("fma", 16), ("dot", 64)):
        config = {"backend": "triton", "kernel": kernel, "meta": META[kernel]}
        monkeypatch.setattr(module, "lookup", lambda *_, config=config: config)
        x, weight, *_ = operands(65, 8, 64, device, BF16)
        assert choose(x[:most], weight, None) is config
        assert choose(x[: most + 1], weight, None) is not config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_rows_do_not_depend_on_their_number(dtype, device):
    x, weight, bias, residual = operands(150, 40, 300, device, dtype)
    with count_ops() as counts:
        check_call(x, weight, bias, "silu", residual, backend="invariant")
        whole = matmul(x, weight, bias, residual=residual, backend="invariant")
        for rows in (slice(0, 1), slice(3, 5), slice(7, 31), slice(100, 150)):
            part = matmul(x[rows], weight, bias, residual=residual[rows], backend="invariant")
            assert torch.equal(part, whole[rows])
    assert counts == {"matmul[invariant]": 6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_on_a_cpu(dtype):
    x, weight, bias, _ = operands(70, 40, 500, "cpu", dtype)
    whole = matmul(x, weight, bias, activation="gelu", backend="invariant")
    for i in (0, 33, 69):
        part = matmul(x[i : i + 1], weight, bias, activation="gelu", backend="invariant")
        assert torch.equal(part, whole[i : i + 1])
    check(whole, plain(x, weight, bias, "gelu"), exact(x, weight, bias, "gelu"))


def test_registration(device):
    for m in (3, 20):
        x, weight, bias, residual = operands(m, 24, 32, device, torch.float32)
        args = x, weight, bias, "silu", residual
        torch.library.opcheck(torch.ops.tlk.matmul.default, args)
        compiled = torch.compile(
            lambda x, w, b, a, r: matmul(x, w, b, activation=a, residual=r) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(compiled(*args), 2 * exact(*args))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", [None, "triton", "cublas", "invariant"])
@pytest.mark.parametrize("m", [1, 7, 20])
def test_in_place_is_what_is_returned_otherwise(m, backend, biased, activation, device):
    x, weight, bias, residual = operands(m, 40, 64, device, BF16)
    bias = bias if biased else None
    options = {"activation": activation, "backend": backend}
    want = matmul(x, weight, bias, residual=residual, **options)
    with count_ops() as counts:
        assert matmul_add_(residual, x, weight, bias, **options) is residual
    assert torch.equal(residual, want)
    assert next(iter(counts)).startswith("matmul_add_[") and counts.total() == 1


def test_cublas_adds_in_place_without_a_copy(device):
    x, weight, _, residual = operands(33, 40, 64, device, BF16)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket)
            return func(*args, **kwargs or {})

    with Record():
        module._cublas(x, weight, None, None, residual, in_place=True)
    assert torch.ops.aten.addmm_ in called and torch.ops.aten.copy_ not in called


def test_in_place_of_three_dimensions_and_of_nothing(device):
    x = rows_of_mixed_scale((2, 3, 64), device, BF16)
    weight = torch.randn(24, 64, device=device).to(BF16)
    residual = torch.randn(2, 3, 24, device=device).to(BF16)
    want = matmul(x, weight, residual=residual)
    assert torch.equal(matmul_add_(residual, x, weight), want)
    assert matmul_add_(residual[:0], x[:0], weight).shape == (0, 3, 24)


def test_in_place_registration(device):
    for m in (3, 20):
        x, weight, bias, residual = operands(m, 24, 32, device, torch.float32)
        args = residual, x, weight, bias, "silu"
        torch.library.opcheck(torch.ops.tlk.matmul_add_.default, args)
        compiled = torch.compile(
            lambda r, x, w, b: matmul_add_(r * 1, x, w, b, activation="silu") * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        want = 2 * exact(x, weight, bias, "silu", residual)
        torch.testing.assert_close(compiled(residual, x, weight, bias), want)


def test_in_place_says_what_does_not_fit():
    x, weight, _, residual = operands(3, 8, 8, "cpu", BF16)
    for wrong, message in (
        (residual.T, "residual must have shape"),
        (
            torch.empty(3, 16, dtype=BF16)[:, :8],
            r"residual must be contiguous, got strides \(16, 1\)",
        ),
        (x, "residual must not be x"),
        (residual.float(), "residual must be bfloat16, got float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            matmul_add_(wrong, x, weight)
    with pytest.raises(ValueError, match="backend must be one of"):
        matmul_add_(residual, x, weight, backend="x")


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        bad("x must be float32 or float16 or bfloat16, got int32", TypeError, x=torch.int32),
        bad(r"x must have at least one dimension", x=()),
        bad(r"weight must have shape \(any, 64\), got \(32, 63\)", weight=(32, 63)),
        bad(r"weight must have shape \(any, 64\), got \(64,\)", weight=(64,)),
        bad("weight must be float32, got float16", TypeError, weight=torch.float16),
        bad(r"bias must have shape \(32\), got \(31,\)", bias=(31,)),
        bad("bias must be float32, got bfloat16", TypeError, bias=BF16),
        bad(r"residual must have shape \(2, 32\), got \(32,\)", residual=(32,)),
        bad("residual must be float32, got float16", TypeError, residual=torch.float16),
        bad("residual must be on .*, got meta", residual="meta"),
        bad("weight must be on .*, got meta", weight="meta"),
        bad("activation must be None or one of .*, got 'tanh'", activation="tanh"),
        bad("backend must be one of .*'invariant'.*, got 'cudnn'", backend="cudnn"),
    ],
)
def test_bad_input(changes, error, message, device):
    shapes = {"x": (2, 64), "weight": (32, 64), "bias": (32,), "residual": (2, 32)}
    args = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    for name, change in changes.items():
        if name not in shapes:
            args[name] = change
        elif isinstance(change, tuple):
            args[name] = torch.zeros(change, device=device)
        else:
            args[name] = args[name].to(change)
    with pytest.raises(error, match=message):
        matmul(args.pop("x"), args.pop("weight"), args.pop("bias"), **args)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_the_last_dimension_must_be_contiguous(name, device):
    args = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "residual": torch.zeros(2, 4)}
    args = {key: value.to(device) for key, value in args.items()}
    args[name] = args[name].T.contiguous().T
    with pytest.raises(ValueError, match=f"{name} must have stride 1 in its last dimension"):
        matmul(args.pop("x"), args.pop("weight"), **args)


def test_no_rows_are_counted_too(device):
    """What would run is named for any shape, an empty one included."""
    x, w = torch.zeros(0, 64, device=device), torch.zeros(32, 64, device=device)
    with count_ops() as counts:
        assert matmul(x, w).shape == (0, 32)
    assert len(counts) == 1
