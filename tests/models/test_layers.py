import pytest
import torch
import torch.nn.functional as F

from tlk.kernels._op import count_ops
from tlk.models.config import NormConfig
from tlk.models.layers import Embedding, LayerNorm, Linear, RMSNorm, norm
from tlk.quant.format import Dense


def fill(module):
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_fuses_what_surrounds_it(kind, bias):
    x, residual = torch.randn(3, 8) * torch.tensor([[1.0], [9.0], [0.1]]), torch.randn(3, 5)
    layer = fill(Linear(8, 5, bias=bias))
    before = fill(norm(NormConfig(kind, 0.5, 1.0, bias=True), 8)) if kind else None
    with count_ops() as counts:
        y = layer(x, before, activation="gelu", residual=residual)
    h = x if before is None else before(x)
    torch.testing.assert_close(y, F.gelu(F.linear(h, layer.weight, layer.bias)) + residual)
    names = {name.partition("[")[0] for name in counts}
    assert (
        names == {None: {"matmul"}, "rms": {"norm_linear"}, "layer": {"layer_norm", "matmul"}}[kind]
    )


def test_norms_add_their_offset():
    x = torch.randn(3, 8) * 4 + 1
    rms, layer = fill(RMSNorm(8, 0.5, 1.0)), fill(LayerNorm(8, 0.5, 1.0))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (8,), rms.weight + 1, 0.5))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (8,), layer.weight + 1, layer.bias, 0.5))
    assert LayerNorm(8, 0.5, bias=False).bias is None


def test_parameters_take_the_dtype_and_device_of_construction():
    with torch.device("meta"):
        layers = [Linear(4, 6, bias=True), RMSNorm(4, 1e-6), LayerNorm(4, 1e-6), Embedding(7, 4)]
    for layer in layers:
        assert all(p.is_meta and not p.requires_grad for p in layer.parameters())
    assert {n: tuple(p.shape) for n, p in layers[0].named_parameters()} == {
        "weight": (6, 4),
        "bias": (6,),
    }


def test_weights_load_strictly():
    layer = Linear(4, 6)
    with pytest.raises(RuntimeError, match="bias"):
        layer.load_state_dict({"weight": torch.ones(6, 4), "bias": torch.ones(6)})
    layer.load_state_dict({"weight": torch.ones(6, 4)})
    assert layer(torch.ones(1, 4)).tolist() == [[4.0] * 6]


def test_embedding_is_also_the_tied_head():
    table, before = fill(Embedding(7, 4)), fill(RMSNorm(4, 1e-6))
    x = table(torch.tensor([3, 0, 6]))
    assert torch.equal(x, table.weight[[3, 0, 6]])
    torch.testing.assert_close(table.logits(x, before), before(x) @ table.weight.T)


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_a_gated_linear_fuses_its_norm(kind):
    x, layer = torch.randn(3, 8), fill(Linear(8, 10, bias=True))
    before = fill(norm(NormConfig(kind, 0.5, 1.0, bias=True), 8)) if kind else None
    with count_ops() as counts:
        y = layer.gated(x, before, "gelu")
    gate, up = F.linear(x if before is None else before(x), layer.weight, layer.bias).chunk(2, -1)
    torch.testing.assert_close(y, F.gelu(gate) * up)
    assert {name.partition("[")[0] for name in counts} == (
        {"layer_norm", "gated_linear"} if kind == "layer" else {"gated_linear"}
    )


def test_a_deterministic_head_is_independent_of_its_batch():
    before = fill(RMSNorm(64, 1e-6))
    format, x = Dense(deterministic=True), torch.randn(9, 64)
    for head in (fill(Embedding(11, 64, format)).logits, fill(Linear(64, 11, format=format))):
        whole = head(x, before)
        assert all(torch.equal(head(x[i : i + 1], before)[0], whole[i]) for i in range(9))


def test_linear_says_what_it_is():
    assert (
        repr(Linear(4, 6, split="out"))
        == "Linear(4, 6, format=Dense(deterministic=False), split='out')"
    )
