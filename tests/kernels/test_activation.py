import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import activation
from tlk.kernels.activation import (
    default_config,
    gelu_and_mul,
    gelu_and_mul_reference,
    relu_squared,
    relu_squared_reference,
    silu_and_mul,
    silu_and_mul_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2), (3, 200), (2, 5, 128), (2, 1026), (3, 4102)]
GATED = {
    "silu": (silu_and_mul, silu_and_mul_reference, F.silu),
    "gelu": (gelu_and_mul, gelu_and_mul_reference, F.gelu),
    "gelu_tanh": (
        lambda x: gelu_and_mul(x, "tanh"),
        lambda x: gelu_and_mul_reference(x, "tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}


@pytest.fixture(autouse=True)
def quiet_overflow():
    """exp overflows to infinity, and 1 / infinity is the wanted 0: numpy warns, a GPU does not."""
    with np.errstate(over="ignore"):
        yield


def gates_of_every_size(shape, device, dtype):
    """Gates of every scale, ups of mixed sizes by row."""
    scale = 10.0 ** torch.randint(-2, 2, (*shape[:-1], 1), device=device)
    x = torch.randn(shape, device=device) * scale
    x[..., : shape[-1] // 2] = torch.randn(shape, device=device)[..., : shape[-1] // 2] * 3
    return x.to(dtype)


def gated(x, function):
    gate, up = x.chunk(2, -1)
    return function(gate) * up


@pytest.mark.parametrize("run", [silu_and_mul, gelu_and_mul, relu_squared])
def test_what_earlier_kernels_wrote_is_read_after_the_wait(run):
    x = torch.randn(3, 200)
    expected = run(x)
    with interpret(), late(x):
        actual = run(x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", GATED)
def test_gated_references_are_torch(name):
    _, reference, function = GATED[name]
    x = torch.randn(4, 96) * 3
    torch.testing.assert_close(reference(x), gated(x, function))


def test_relu_squared_reference_is_torch():
    x = torch.randn(4, 96)
    torch.testing.assert_close(relu_squared_reference(x), F.relu(x) ** 2)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(name, shape, dtype, device):
    run, reference, function = GATED[name]
    x = gates_of_every_size(shape, device, dtype)
    check(run(x), gated(x, function), reference(x.float()))


@pytest.mark.parametrize("shape", [(1,), (3, 200), (2, 5, 128), (2, 2049)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_squared(shape, dtype, device):
    x = gates_of_every_size(shape, device, dtype)
    check(relu_squared(x), F.relu(x).square(), relu_squared_reference(x.float()))


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gate(name, dtype, device):
    """Gate by gate over the range: the tails are 0 and the gate itself, never NaN."""
    run, reference, _ = GATED[name]
    large = 2.0 ** torch.arange(-20, 16, device=device)
    gates = torch.cat((-large, large, torch.linspace(-12, 12, 97, device=device), large[:1] * 0))
    gates = gates.to(dtype)
    x = torch.stack((gates, torch.ones_like(gates)), -1)
    exact = reference(x.float()).double()
    # 1 + erf(g / √2) is 0 up to float32's rounding where the tail has died out
    torch.testing.assert_close(run(x).double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)


def test_huge_gates(device):
    """Where g³ overflows, the gate still passes or closes."""
    gates = torch.tensor([-3e38, -1e30, 1e30, 3e38], device=device)
    x = torch.stack((gates, torch.ones_like(gates)), -1)
    for run, _, _ in GATED.values():
        torch.testing.assert_close(run(x)[:, 0], gates.clamp(min=0))


@pytest.mark.parametrize("elements, tile", [(4 * 512 * 8, 512), (4 * 512 * 8 + 1, 2048)])
def test_either_tile(elements, tile, device, monkeypatch):
    """Few elements take small tiles and many take large ones, whatever GPU runs the tests."""
    config = default_config(elements, 8)
    assert config[0] == tile
    monkeypatch.setattr(activation, "default_config", lambda n, sm_count: config)
    x = gates_of_every_size((2, 9002), device, torch.bfloat16)
    for run, reference, function in GATED.values():
        check(run(x), gated(x, function), reference(x.float()))
    check(relu_squared(x), F.relu(x).square(), relu_squared_reference(x.float()))


def test_strided_input(device):
    storage = gates_of_every_size((6, 120), device, torch.bfloat16)
    views = (
        storage[:, 8:104],
        storage[::2],
        storage.T,
        storage.view(3, 2, 120).transpose(0, 1),
        storage[:1].expand(5, 120),
        storage[:, 24:96].unflatten(1, (3, 24)),
    )
    for x in views:
        for name, (run, reference, function) in GATED.items():
            y = run(x)
            assert y.is_contiguous(), name
            check(y, gated(x, function), reference(x.float()))
        y = relu_squared(x)
        assert y.is_contiguous()
        check(y, F.relu(x).square(), relu_squared_reference(x.float()))


def test_nothing(device):
    assert silu_and_mul(torch.empty(0, 64, device=device)).shape == (0, 32)
    assert gelu_and_mul(torch.empty(2, 0, device=device)).shape == (2, 0)
    assert relu_squared(torch.empty(0, 64, device=device)).shape == (0, 64)


def test_the_kernel_ran_and_not_its_reference(device, monkeypatch):
    gates = record_launches(monkeypatch, activation, "_gated_kernel")
    squares = record_launches(monkeypatch, activation, "_relu_squared_kernel")
    x = torch.randn(3, 1100, device=device)
    silu_and_mul(x), gelu_and_mul(x), gelu_and_mul(x, "tanh"), relu_squared(x)
    assert gates == [(6,)] * 3
    assert squares == [(7,)]


def test_bad_input_is_refused(device):
    x = torch.randn(2, 64, device=device)
    with pytest.raises(
        ValueError, match=r"x must have an even last dimension, got shape \(2, 63\)"
    ):
        silu_and_mul(x[:, :63])
    with pytest.raises(ValueError, match="x must have an even last dimension"):
        gelu_and_mul(x[0, 0])
    with pytest.raises(ValueError, match='approximate must be "none" or "tanh", got \'erf\''):
        gelu_and_mul(x, "erf")
    for run in (silu_and_mul, gelu_and_mul, relu_squared):
        with pytest.raises(TypeError, match=r"x must be float32 or .*, got int64"):
            run(x.long())


def test_registration(device):
    x = torch.randn(4, 64, device=device)
    torch.library.opcheck(torch.ops.tlk.silu_and_mul.default, (x[:, 1:-1],))
    torch.library.opcheck(torch.ops.tlk.gelu_and_mul.default, (x, "tanh"))
    torch.library.opcheck(torch.ops.tlk.relu_squared.default, (x.T,))

    def block(x):
        return silu_and_mul(x) + gelu_and_mul(x) + gelu_and_mul(x, "tanh") + relu_squared(x)[:, :32]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), block(x))
