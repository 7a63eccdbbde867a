import importlib

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret
from tests.kernels.check import check
from tlk.kernels._linear_configs import decode_config
from tlk.kernels._op import count_ops
from tlk.kernels.norm_linear import norm_linear, norm_linear_reference

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.norm_linear")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16 = torch.bfloat16
EPS = 0.5  # large enough that forgetting it fails


def operands(m, n, k, device, dtype):
    scale = 10.0 ** torch.randint(-2, 2, (m, 1), device=device)
    x = torch.randn(m, k, device=device) * scale
    weight = torch.randn(n, k, device=device) / k**0.5
    norm_weight, bias = torch.randn(k, device=device), torch.randn(n, device=device)
    return tuple(t.to(dtype) for t in (x, norm_weight, weight, bias))


def plain(x, norm_weight, weight, bias=None, eps=EPS, weight_offset=0.0, activation=None):
    h = F.rms_norm(x, x.shape[-1:], norm_weight + weight_offset, eps)
    y = F.linear(h, weight, bias)
    return y if activation is None else getattr(F, activation)(y)


def check_call(x, norm_weight, weight, bias=None, eps=EPS, weight_offset=0.0, activation=None):
    actual = norm_linear(
        x, norm_weight, weight, bias, eps=eps, weight_offset=weight_offset, activation=activation
    )
    args = x, norm_weight, weight, bias
    options = eps, weight_offset, activation
    exact = norm_linear_reference(*(None if t is None else t.float() for t in args), *options)
    check(actual, plain(*args, *options), exact)


def test_reference_is_torch():
    args = operands(3, 20, 40, "cpu", torch.float32)
    for options in ((EPS, 0.0, None), (1e-5, 1.0, "silu")):
        torch.testing.assert_close(norm_linear_reference(*args, *options), plain(*args, *options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, n, k", [(1, 37, 130), (1, 8, 1100), (2, 33, 256), (5, 50, 300), (16, 64, 512), (17, 40, 90)]
)
def test_norm_linear(m, n, k, dtype, device):
    x, norm_weight, weight, bias = operands(m, n, k, device, dtype)
    check_call(x, norm_weight, weight)
    check_call(x, norm_weight, weight, bias, 1e-6, 0.0, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 18])
def test_weight_offset(m, dtype, device):
    x, norm_weight, weight, bias = operands(m, 24, 72, device, dtype)
    check_call(x, norm_weight * 0.1, weight, bias, weight_offset=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 18])
@pytest.mark.parametrize("x_scale, norm_scale", [(3e4, 1e3), (1e-4, 1e-3), (3e4, 1e-3)])
def test_products_outside_of_float16(m, x_scale, norm_scale, dtype, device):
    """x · w alone over- or underflows; the normalized result does not."""
    x, norm_weight, weight, bias = operands(m, 24, 600, device, torch.float32)
    x = x.clamp(-2, 2) * x_scale / x.abs().amax(-1, keepdim=True)
    args = (x, norm_weight * norm_scale, weight / norm_scale, bias)
    check_call(*(t.to(dtype) for t in args), eps=1e-12)


@pytest.mark.parametrize("m", [4, 16])
def test_the_largest_values_may_come_last(m, device):
    """The scale of float16 rows grows along K, in steps and in any of the slices."""
    x, norm_weight, weight, bias = operands(m, 24, 1024, device, torch.float32)
    growing = torch.logspace(-3, 4, 1024, device=device)
    x = torch.where(torch.arange(m, device=device)[:, None] % 2 == 0, growing, growing.flip(0)) * x
    x = x / x.abs().amax(-1, keepdim=True) * 6e4
    check_call(*(t.to(torch.float16) for t in (x, norm_weight, weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 18])
def test_a_row_of_zeros(m, dtype, device):
    x, norm_weight, weight, bias = operands(m, 24, 64, device, dtype)
    x[m // 2] = 0
    y = norm_linear(x, norm_weight, weight, bias)
    torch.testing.assert_close(y[m // 2], bias, rtol=0, atol=0)
    check_call(x, norm_weight, weight, bias)


@pytest.mark.parametrize("m", [1, 6, 20])
def test_views_of_fused_tensors(m, device):
    wide, norm_weight, _, bias = operands(m, 40, 3 * 64, device, BF16)
    fused = (torch.randn(100, 2 * 64, device=device) / 8).to(BF16)
    check_call(wide[:, 64:128], norm_weight[64:128], fused[30:70, 64:], bias, activation="gelu")


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(shape, device):
    x = torch.randn(shape, device=device).to(BF16)
    _, norm_weight, weight, bias = operands(1, 24, 64, device, BF16)
    assert norm_linear(x, norm_weight, weight, bias).shape == (*shape[:-1], 24)
    assert norm_linear(x, norm_weight, weight[:0]).shape == (*shape[:-1], 0)
    if x.numel():
        check_call(x, norm_weight, weight, bias)


@pytest.mark.parametrize(
    "m, dtype, ran",
    [
        (1, BF16, "triton"),
        (16, torch.float16, "rms_norm+triton"),
        (17, BF16, "rms_norm+cublas"),
        (4, torch.float32, "triton"),
        (5, torch.float32, "rms_norm+cublas"),
    ],
)
def test_what_ran_is_counted(m, dtype, ran, device, monkeypatch):
    calls = []
    for name in ("launch", "rms_norm", "matmul"):
        run = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _n=name, _r=run, **k: (calls.append(_n), _r(*a, **k))[1]
        )
    args = operands(m, 32, 64, device, dtype)
    with count_ops() as counts:
        norm_linear(*args)
    assert counts == {f"norm_linear[{ran}]": 1}
    assert calls == (["launch"] if ran == "triton" else ["rms_norm", "matmul"])


def test_a_table_decides(device, monkeypatch):
    fma = decode_config(75, 8, BF16, 16, 32, 64)
    tables = {2: {"backend": "unfused"}, 3: decode_config(90, 8, BF16, 16, 32, 64), 20: fma}
    assert tables[3]["kernel"] == "dot"  # which takes no norm
    asked = []

    def measured(op, version, x, weight):
        asked.append((op, tuple(weight.shape)))
        return tables[len(x)]

    monkeypatch.setattr(module, "measured", measured)
    for m, ran in ((2, "rms_norm+triton"), (3, "rms_norm+triton"), (20, "triton")):
        args = operands(m, 32, 64, device, BF16)
        with count_ops() as counts:
            check_call(*args)
        assert counts == {f"norm_linear[{ran}]": 1}
    assert set(asked) == {("norm_linear", (32, 64))}


def test_sm_75_needs_no_tensor_cores():
    with interpret(sm=75):
        for m in (3, 11):
            check_call(*operands(m, 20, 70, "cpu", torch.float16), activation="silu")


def test_registration(device):
    for m in (3, 20):
        args = operands(m, 24, 32, device, torch.float32)
        torch.library.opcheck(torch.ops.tlk.norm_linear.default, (*args, EPS, 1.0, "silu"))
        compiled = torch.compile(
            lambda x, s, w, b: norm_linear(x, s, w, b, eps=EPS, weight_offset=1.0) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(compiled(*args), 2 * norm_linear_reference(*args, EPS, 1.0))


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("norm_weight", (32,), ValueError, r"norm_weight must have shape \(64\), got \(32,\)"),
        ("norm_weight", BF16, TypeError, "norm_weight must be float32, got bfloat16"),
        ("norm_weight", "meta", ValueError, "norm_weight must be on .*, got meta"),
        ("weight", (32, 63), ValueError, r"weight must have shape \(any, 64\), got \(32, 63\)"),
        ("bias", (31,), ValueError, r"bias must have shape \(32\), got \(31,\)"),
        ("activation", "tanh", ValueError, "activation must be None or one of .*, got 'tanh'"),
    ],
)
def test_bad_input(name, value, error, message, device):
    shapes = {"x": (2, 64), "norm_weight": (64,), "weight": (32, 64), "bias": (32,)}
    args = {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}
    if name == "activation":
        args[name] = value
    elif isinstance(value, tuple):
        args[name] = torch.zeros(value, device=device)
    else:
        args[name] = args[name].to(value)
    with pytest.raises(error, match=message):
        norm_linear(**args)


def test_a_strided_norm_weight_is_refused(device):
    x, _, weight, bias = operands(3, 24, 64, device, BF16)
    strided = torch.ones(64, 2, device=device, dtype=BF16)[:, 0]
    with pytest.raises(ValueError, match="norm_weight must have stride 1 in its last dimension"):
        norm_linear(x, strided, weight, bias)
