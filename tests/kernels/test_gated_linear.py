import importlib

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tlk.kernels import _linear
from tlk.kernels._linear import launch
from tlk.kernels._op import count_ops
from tlk.kernels.gated_linear import gated_linear, gated_linear_reference

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.gated_linear")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16 = torch.bfloat16
EPS = 0.5  # large enough that forgetting it fails
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def operands(m, size, k, device, dtype):
    """x, the weight of both halves, their bias and a norm's weight."""
    scale = 10.0 ** torch.randint(-2, 2, (m, 1), device=device)
    x = torch.randn(m, k, device=device) * scale
    weight, bias = torch.randn(2 * size, k, device=device) / k**0.5, torch.randn(2 * size)
    norm_weight = torch.randn(k, device=device)
    return tuple(t.to(device, dtype) for t in (x, weight, bias, norm_weight))


def plain(x, weight, bias, activation, norm_weight=None, eps=EPS, weight_offset=0.0):
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight + weight_offset, eps)
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def exact(x, weight, bias, activation, norm_weight=None, eps=EPS, weight_offset=0.0):
    x, weight, bias, norm_weight = (
        None if t is None else t.float() for t in (x, weight, bias, norm_weight)
    )
    return gated_linear_reference(
        x, weight, bias, activation, norm_weight, eps, weight_offset, "invariant"
    )  # fmt: skip


def check_call(x, weight, bias, activation, norm_weight=None, weight_offset=0.0, **options):
    args = x, weight, bias, activation, norm_weight, EPS, weight_offset
    actual = gated_linear(
        x, weight, bias, activation=activation, norm_weight=norm_weight, eps=EPS,
        weight_offset=weight_offset, **options,
    )  # fmt: skip
    check(actual, plain(*args), exact(*args))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_torch(activation):
    x, weight, bias, norm_weight = operands(3, 20, 40, "cpu", torch.float32)
    for norm in (None, norm_weight):
        for b in (None, bias):
            args = x, weight, b, activation, norm, EPS, 1.0
            torch.testing.assert_close(gated_linear_reference(*args), plain(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, size, k",
    [(1, 37, 130), (1, 8, 1100), (1, 3, 8200), (2, 33, 256), (5, 50, 300), (16, 40, 512), (17, 20, 90)],
)  # fmt: skip
def test_gated_linear(m, size, k, dtype, device):
    x, weight, bias, norm_weight = operands(m, size, k, device, dtype)
    check_call(x, weight, bias, "silu")
    check_call(x, weight, None, "silu", norm_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 3, 18])
def test_every_activation(m, activation, dtype, device):
    x, weight, bias, norm_weight = operands(m, 24, 64, device, dtype)
    check_call(x, weight, bias, activation, norm_weight * 0.1, 1.0)


META = {
    "gemv": {"BLOCK_N": 4, "PER_SM": 1, "MOST_TILES": 9},
    "fma": {"BLOCK_M": 2, "BLOCK_N": 4, "BLOCK_K": 64},
    "dot": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "PREFETCH": 128},
}


@pytest.mark.parametrize("kernel", META)
@pytest.mark.parametrize("size", [5, 37, 48])
def test_kernels(kernel, size, device, monkeypatch):
    monkeypatch.setattr(_linear, "sm_count", lambda device: 8)  # few programs with much to do
    m = 1 if kernel == "gemv" else 5
    x, weight, bias, norm_weight = operands(m, size, 96, device, BF16)
    norm = (norm_weight, EPS, 0.0) if kernel in _linear.NORMED else None
    norm_weight = None if norm is None else norm_weight
    y = torch.full((m, size), torch.nan, device=device, dtype=BF16)
    config = {"backend": "triton", "kernel": kernel, "meta": META[kernel]}
    launch(config, x, weight, bias, "gelu", y, norm=norm, gated=True)
    args = x, weight, bias, "gelu", norm_weight
    check(y, plain(*args), exact(*args))


@pytest.mark.parametrize("kernel", META)
def test_what_earlier_kernels_wrote_is_read_after_the_wait(kernel):
    x, weight, bias, norm_weight = operands(1, 20, 96, "cpu", BF16)
    norm = (norm_weight, EPS, 0.0) if kernel in _linear.NORMED else None
    norm_weight = None if norm is None else norm_weight
    y = torch.full((1, 20), torch.nan, dtype=BF16)
    with interpret(), late(x):
        config = {"backend": "triton", "kernel": kernel, "meta": META[kernel]}
        launch(config, x, weight, bias, "gelu", y, norm=norm, gated=True)
    args = x, weight, bias, "gelu", norm_weight
    check(y, plain(*args), exact(*args))


@pytest.mark.parametrize("m", [1, 4, 20])
def test_views_of_fused_tensors(m, device):
    wide_x = torch.randn(m, 192, device=device).to(BF16)
    fused = torch.randn(100, 128, device=device).to(BF16) / 8
    wide_bias = torch.randn(80, device=device).to(BF16)
    check_call(wide_x[:, 64:128], fused[30:70, 64:], wide_bias[7:47], "silu")


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(shape, device):
    x = torch.randn(shape, device=device).to(BF16)
    _, weight, bias, norm_weight = operands(1, 24, 64, device, BF16)
    for norm in (None, norm_weight):
        y = gated_linear(x, weight, bias, activation="gelu", norm_weight=norm)
        assert y.shape == (*shape[:-1], 24)
        if y.numel():
            check_call(x, weight, bias, "gelu", norm)
    assert gated_linear(x, weight[:0], activation="silu").shape == (*shape[:-1], 0)


@pytest.mark.parametrize(
    "m, dtype, normed, options, ran",
    [
        (1, BF16, True, {}, "triton"),
        (16, BF16, True, {}, "rms_norm+triton"),
        (16, BF16, False, {}, "triton"),
        (4, torch.float32, False, {}, "triton"),
        (5, torch.float32, False, {}, "cublas+gelu_and_mul"),
        (17, BF16, False, {}, "cublas+gelu_and_mul"),
        (17, BF16, True, {}, "rms_norm+cublas+gelu_and_mul"),
        (3, BF16, True, {"backend": "invariant"}, "rms_norm+invariant+gelu_and_mul"),
        (3, BF16, False, {"backend": "invariant"}, "invariant+gelu_and_mul"),
    ],
)
def test_what_ran_is_counted(m, dtype, normed, options, ran, device, monkeypatch):
    launched = []
    run = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launched.append(a), run(*a, **k)))
    x, weight, bias, norm_weight = operands(m, 24, 64, device, dtype)
    with count_ops() as counts:
        check_call(x, weight, bias, "gelu", norm_weight if normed else None, **options)
    assert counts == {f"gated_linear[{ran}]": 1}
    assert len(launched) == ran.endswith("triton")


def test_a_table_decides(device, monkeypatch):
    dot = {"backend": "triton", "kernel": "dot", "meta": META["dot"]}
    fma = {"backend": "triton", "kernel": "fma", "meta": META["fma"]}
    tables = {2: module.SEPARATE, 20: dot, 40: fma}
    asked = []

    def measured(op, version, x, weight):
        asked.append((op, tuple(weight.shape)))
        return tables[len(x)]

    monkeypatch.setattr(module, "measured", measured)
    for m, ran in ((2, "rms_norm+triton+silu_and_mul"), (20, "rms_norm+triton"), (40, "triton")):
        x, weight, bias, norm_weight = operands(m, 24, 64, device, BF16)
        with count_ops() as counts:
            check_call(x, weight, bias, "silu", norm_weight)
        assert counts == {f"gated_linear[{ran}]": 1}
    assert set(asked) == {("gated_linear", (48, 64))}


@pytest.mark.parametrize("m", [3, 11])
def test_sm_75_needs_no_tensor_cores(m):
    with interpret(sm=75):
        x, weight, bias, norm_weight = operands(m, 21, 70, "cpu", torch.float16)
        check_call(x, weight, bias, "silu", norm_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interpreted", [False, True])
def test_invariant_rows_do_not_depend_on_their_number(dtype, normed, interpreted, request):
    device = request.getfixturevalue("device") if interpreted else "cpu"
    x, weight, bias, norm_weight = operands(40, 20, 96, device, dtype)
    options = {"activation": "silu", "norm_weight": norm_weight if normed else None}
    whole = gated_linear(x, weight, bias, **options, backend="invariant")
    for rows in (slice(0, 1), slice(7, 30)):
        part = gated_linear(x[rows], weight, bias, **options, backend="invariant")
        assert torch.equal(part, whole[rows])


def test_registration(device):
    for m in (3, 20):
        x, weight, bias, norm_weight = operands(m, 24, 32, device, torch.float32)
        args = x, weight, bias, "silu", norm_weight, EPS, 1.0
        torch.library.opcheck(torch.ops.tlk.gated_linear.default, args)
        compiled = torch.compile(
            lambda x, w, b, s: (
                gated_linear(x, w, b, activation="silu", norm_weight=s, eps=EPS, weight_offset=1.0) * 2
            ),
            fullgraph=True,
            backend="aot_eager",
        )  # fmt: skip
        torch.testing.assert_close(compiled(x, weight, bias, norm_weight), 2 * exact(*args))


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("weight", (31, 64), ValueError, "weight must have an even number of rows, got 31"),
        ("weight", (32, 63), ValueError, r"weight must have shape \(any, 64\), got \(32, 63\)"),
        ("bias", (16,), ValueError, r"bias must have shape \(32\), got \(16,\)"),
        ("norm_weight", (32,), ValueError, r"norm_weight must have shape \(64\), got \(32,\)"),
        ("norm_weight", BF16, TypeError, "norm_weight must be float32, got bfloat16"),
        ("activation", "relu_squared", ValueError, "activation must be one of .*, got 'relu_squ"),
        ("backend", "cublas", ValueError, "backend must be one of .*, got 'cublas'"),
    ],
)
def test_bad_input(name, value, error, message, device):
    shapes = {"x": (2, 64), "weight": (32, 64), "bias": (32,), "norm_weight": (64,)}
    args = {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}
    args["activation"] = "silu"
    if isinstance(value, str):
        args[name] = value
    elif isinstance(value, tuple):
        args[name] = torch.zeros(value, device=device)
        if name == "weight":
            del args["bias"]
    else:
        args[name] = args[name].to(value)
    with pytest.raises(error, match=message):
        gated_linear(**args)
