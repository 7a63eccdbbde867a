from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tlk.errors import UnsupportedError
from tlk.kernels._op import count_ops
from tlk.models.config import GatedMLPConfig, MLPConfig
from tlk.models.layers import RMSNorm
from tlk.models.mlp import MLP, GatedMLP
from tlk.quant.fp8 import Fp8
from tlk.quant.int8 import Int8

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}


def build(module, size=12):
    norm = RMSNorm(size, 0.5)
    for parameter in (*module.parameters(), *norm.parameters()):
        parameter.data.normal_()
    return module, norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(name, bias):
    mlp, norm = build(GatedMLP(GatedMLPConfig(7, name, bias), 12))
    x = torch.randn(5, 12)
    gate, up = F.linear(norm(x), mlp.gate_up.weight, mlp.gate_up.bias).chunk(2, -1)
    expected = x + F.linear(ACTIVATIONS[name](gate) * up, mlp.down.weight, mlp.down.bias)
    with count_ops() as counts:
        torch.testing.assert_close(mlp(x, norm), expected, rtol=1e-4, atol=1e-4)
    assert counts.total() == 2


EIGHT_BIT = [Fp8("channel"), Fp8("block"), Int8(), Int8(static=True)]


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("format", EIGHT_BIT, ids=str)
def test_eight_bit_activations_come_out_of_the_gate(format, name):
    torch.manual_seed(0)
    mlp, norm = build(GatedMLP(GatedMLPConfig(256, name), 128), 128)
    for linear in (mlp.gate_up, mlp.down):
        packed = format.quantize(linear.weight.detach())
        if format.static:
            packed["input_scale"] = torch.tensor([[0.05 if linear is mlp.gate_up else 20.0]])
        linear.store(format, packed)
    weights = [linear.format.dequantize(linear.packed()) for linear in (mlp.gate_up, mlp.down)]
    for rows in (8, 9):
        x = torch.randn(rows, 128)
        with count_ops() as counts:
            y = mlp(x, norm)
        ran = Counter({key.partition("[")[0]: n for key, n in counts.items()})
        expected = {"rms_norm_quant": 1, "scaled_mm": 2, "gated_quant": 1}
        assert ran == (expected if rows == 9 else {"dequant_mm": 2})
        gate, up = (norm(x) @ weights[0].T).chunk(2, -1)
        expected = x + (ACTIVATIONS[name](gate) * up) @ weights[1].T
        assert (y - expected).norm() < (0.1 if rows == 9 else 1e-5) * expected.norm()


def test_other_formats_keep_the_gate_in_the_first_matmul():
    mlp, norm = build(GatedMLP(GatedMLPConfig(128, "silu"), 128), 128)
    x, fp8 = torch.randn(9, 128), Fp8("channel")
    mlp.down.store(fp8, fp8.quantize(mlp.down.weight.detach()))
    with count_ops() as counts:
        mlp(x, norm)
    assert {key.partition("[")[0] for key in counts} == {
        "gated_linear",
        "quantize_act",
        "scaled_mm",
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp(name, bias):
    mlp, norm = build(MLP(MLPConfig(7, name, bias), 12))
    x = torch.randn(5, 12)
    up = F.linear(norm(x), mlp.up.weight, mlp.up.bias)
    expected = x + F.linear(ACTIVATIONS[name](up), mlp.down.weight, mlp.down.bias)
    with count_ops() as counts:
        torch.testing.assert_close(mlp(x, norm), expected, rtol=1e-4, atol=1e-4)
    assert counts.total() == 2


def test_a_gate_without_a_kernel_raises():
    with pytest.raises(UnsupportedError, match="'relu_squared' of a gated MLP: not silu, gelu"):
        GatedMLP(GatedMLPConfig(7, "relu_squared"), 12)
