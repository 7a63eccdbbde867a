import pytest
import torch

from tlk.kernels._op import count_ops
from tlk.quant.format import DENSE, Dense, Norm, fuse, shard


def packed(n, k, groups=2):
    return {
        "weight": torch.randn(n, k),
        "scale": torch.randn(n, 1),
        "zero": torch.randn(n, groups),
        "smooth": torch.arange(k)[None] + 1.0,
    }


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_make_the_whole(dim):
    whole = packed(8, 12)
    parts = [shard(whole, dim, rank, 2) for rank in range(2)]
    for name, tensor in whole.items():
        if tensor.shape[dim] == 1:
            assert all(torch.equal(part[name], tensor) for part in parts)
        else:
            assert torch.equal(torch.cat([part[name] for part in parts], dim), tensor)
            assert all(part[name].is_contiguous() for part in parts)


def test_a_shard_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="zero has 3 entries in dim 1, not divisible by 2"):
        shard(packed(8, 12, groups=3), 1, 0, 2)


def test_fused_layers_keep_their_rows():
    a, b = packed(8, 12), packed(1, 12)
    whole = fuse([a, b])
    for name in ("weight", "scale", "zero"):
        assert torch.equal(whole[name], torch.cat([a[name], b[name]]))


def test_per_input_tensors_serve_all_fused_layers():
    a, b = packed(8, 12), packed(4, 12)
    assert torch.equal(fuse([a, b])["smooth"], a["smooth"])
    b["smooth"] = b["smooth"] * 2
    with pytest.raises(ValueError, match="smooth varies over inputs only"):
        fuse([a, b])


def test_dense_is_the_weight_itself():
    weight = torch.randn(6, 4, dtype=torch.bfloat16)
    assert DENSE.dequantize(DENSE.quantize(weight)) is weight
    assert DENSE.act is None
    empty = DENSE.empty(6, 4, "meta", torch.float16)["weight"]
    assert empty.shape == (6, 4) and empty.is_meta and empty.dtype == torch.float16
    assert DENSE.empty(2, 3)["weight"].dtype == torch.float32


def test_dense_linear_is_one_kernel():
    x, weight, bias = torch.randn(3, 4) * 5, torch.randn(6, 4), torch.randn(6)
    with count_ops() as counts:
        y = DENSE.linear(
            x, {"weight": weight}, bias=bias, activation="silu", residual=torch.ones(3, 6)
        )
    expected = torch.nn.functional.silu(x @ weight.T + bias) + 1
    torch.testing.assert_close(y, expected)
    assert counts.total() == 1


@pytest.mark.parametrize("residual", [None, torch.ones(3, 6)])
def test_dense_linear_takes_a_norm(residual):
    x, weight, bias = torch.randn(3, 4) * 5, torch.randn(6, 4), torch.randn(6)
    norm = Norm(torch.randn(4), 0.5, 1.0)
    with count_ops() as counts:
        y = DENSE.linear(x, {"weight": weight}, norm=norm, bias=bias, residual=residual)
    h = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * (norm.weight + 1)
    expected = h @ weight.T + bias + (0 if residual is None else residual)
    torch.testing.assert_close(y, expected)
    assert counts.total() == 1


@pytest.mark.parametrize("norm", [None, Norm(torch.randn(4), 0.5, 1.0)])
def test_dense_gated_linear_is_one_kernel(norm):
    x, weight, bias = torch.randn(3, 4) * 5, torch.randn(6, 4), torch.randn(6)
    with count_ops() as counts:
        y = DENSE.gated_linear(x, {"weight": weight}, activation="gelu", norm=norm, bias=bias)
    h = x
    if norm is not None:
        h = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * (norm.weight + 1)
    gate, up = (h @ weight.T + bias).chunk(2, -1)
    torch.testing.assert_close(y, torch.nn.functional.gelu(gate) * up)
    assert counts.total() == 1


def test_a_deterministic_format_asks_for_invariant_kernels(device):
    format = Dense(deterministic=True)
    assert format.deterministic and not DENSE.deterministic
    x, weight = torch.randn(3, 16, device=device), torch.randn(8, 16, device=device)
    norm = Norm(torch.randn(16, device=device), 0.5, 1.0)
    with count_ops() as counts:
        format.linear(x, {"weight": weight})
        format.linear(x, {"weight": weight}, norm=norm)
        format.gated_linear(x, {"weight": weight}, activation="silu", norm=norm)
    assert set(counts) == {
        "matmul[invariant]",
        "norm_linear[rms_norm+invariant]",
        "gated_linear[rms_norm+invariant+silu_and_mul]",
    }
