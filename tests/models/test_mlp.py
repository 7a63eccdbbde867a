import pytest
import torch
import torch.nn.functional as F

from tlk.errors import UnsupportedError
from tlk.kernels._op import count_ops
from tlk.models.config import GatedMLPConfig, MLPConfig
from tlk.models.layers import RMSNorm
from tlk.models.mlp import MLP, GatedMLP

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}


def build(module):
    norm = RMSNorm(12, 0.5)
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
