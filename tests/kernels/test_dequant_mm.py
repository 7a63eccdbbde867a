import importlib

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.check import check
from tests.kernels.quantized import ALL, decode, options, quantized
from tlk.kernels.dequant_mm import dequant_mm
from tlk.kernels.dequantize import dequantize

# the package shows the function of that name where an import statement would look
module = importlib.import_module("tlk.kernels.dequant_mm")

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
BF16 = torch.bfloat16
IDS = [f"{name} {group}" for name, group in ALL]


def rows_of_mixed_scale(shape, device, dtype):
    scale = 10.0 ** torch.randint(-2, 1, (*shape[:-1], 1), device=device)
    return (torch.randn(shape, device=device) * scale).to(dtype)


def size(group, smallest=192):
    return smallest if group <= 64 else 256


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


def check_call(x, w, **more):
    given = options(w) | more
    if "norm_weight" in more:
        given |= {"eps": 0.5}
    more.pop("backend", None)
    actual = dequant_mm(x, w.weight, w.scale, **given)
    check(actual, plain(x, w, **more), exact(x, w, **more))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_dequantize(name, group, dtype, device):
    w = quantized(name, 37, size(group), group, dtype, device)
    actual = dequantize(w.weight, w.scale, dtype=dtype, **options(w))
    assert torch.equal(actual, decode(w).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 16, 64, 257])
@pytest.mark.parametrize("name, group", ALL, ids=IDS)
def test_dequant_mm(name, group, m, dtype, device):
    w = quantized(name, 37, size(group), group, dtype, device)
    check_call(rows_of_mixed_scale((m, size(group)), device, dtype), w)


@pytest.mark.parametrize("name, group", ALL, ids=IDS)
@pytest.mark.parametrize("m", [1, 5])
def test_epilogues(name, group, m, device):
    k = size(group)
    w = quantized(name, 46, k, group, BF16, device)
    x = rows_of_mixed_scale((m, k), device, BF16)
    bias = torch.randn(46, device=device).to(BF16)
    residual = torch.randn(m, 60, device=device).to(BF16)[:, 7:53]
    norm_weight = torch.randn(k, device=device).to(BF16)
    check_call(x, w, bias=bias, activation="gelu", residual=residual)
    check_call(x, w, bias=bias, activation="silu", gated=True)
    check_call(x, w, norm_weight=norm_weight)
    check_call(x, w, norm_weight=norm_weight, bias=bias, activation="silu", gated=True)
