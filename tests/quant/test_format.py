import pytest
import torch

from tlk.errors import UnsupportedError
from tlk.kernels._op import count_ops
from tlk.quant.config import METHODS
from tlk.quant.format import DENSE, Dense, Norm, act_and_mul, fuse, prepare_input, shard, stack
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8
from tlk.quant.table4 import TableFormat

EVERY = [*METHODS.values(), Int4(symmetric=False), TableFormat("nf4", 64, True)]


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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_layers_fuse_in_every_format(format):
    torch.manual_seed(0)
    parts = [format.quantize(torch.randn(n, 512)) for n in (256, 128, 200)]
    whole = format.dequantize(fuse(parts))
    assert torch.equal(whole, torch.cat([format.dequantize(p) for p in parts]))
    assert whole.shape == (584, 512)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("format", EVERY, ids=str)
def test_layers_shard_in_every_format(format, dim):
    torch.manual_seed(0)
    packed = format.quantize(
        torch.randn(256, 1280)
    )  # 20 blocks of 64 a row: nested ones cross rows
    parts = [format.dequantize(shard(packed, dim, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim), format.dequantize(packed))


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_experts_stack_and_then_shard(format):
    torch.manual_seed(0)
    experts = [format.quantize(torch.randn(256, 512)) for _ in range(3)]
    whole = stack(experts)
    assert whole["weight"].shape[:2] == (3, 256)
    for dim in (0, 1):
        part = shard(whole, dim, 1, 2)
        for i, expert in enumerate(experts):
            assert same({n: t[i] for n, t in part.items()}, shard(expert, dim, 1, 2))


def test_blocks_of_outputs_are_not_divided():
    block = Fp8("block")
    small, large = (block.quantize(torch.randn(n, 256)) for n in (192, 256))
    with pytest.raises(ValueError, match="a layer of 192 outputs, with scales for blocks of 128"):
        fuse([small, large])
    assert torch.equal(
        block.dequantize(fuse([large, small]))[256:], block.dequantize(small)
    )  # the last may be partial
    with pytest.raises(
        ValueError, match="192 entries in dim 0, not divisible by 2 ranks in blocks"
    ):
        shard(small, 0, 0, 2)  # two rows of scales, but not for 96 outputs each
    with pytest.raises(
        ValueError, match="256 entries in dim 1, not divisible by 4 ranks in blocks"
    ):
        shard(large, 1, 0, 4)
    tiny = block.quantize(torch.randn(64, 256))  # one row of scales is not one for all layers
    with pytest.raises(ValueError, match="a layer of 64 outputs"):
        fuse([tiny, tiny])
    halves = [block.dequantize(shard(tiny, 0, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(halves), block.dequantize(tiny))


def test_groups_of_inputs_are_not_divided():
    packed = Int4(None).quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match="scale has 1 entries in dim 1, not divisible by 2"):
        shard(packed, 1, 0, 2)
    packed = Int4(128).quantize(torch.randn(4, 384))
    with pytest.raises(ValueError, match="scale has 3 entries in dim 1"):
        shard(packed, 1, 0, 2)
    packed["perm"] = torch.arange(384)[None].int()
    with pytest.raises(UnsupportedError, match="act-order"):
        shard(packed, 1, 0, 3)
    assert torch.equal(shard(packed, 0, 1, 2)["perm"], packed["perm"])


def test_layers_with_other_tensors_do_not_fuse():
    a, b = Int4().quantize(torch.randn(4, 128)), Int4(symmetric=False).quantize(torch.randn(4, 128))
    for join in (fuse, stack):
        with pytest.raises(ValueError, match="parts must have the same tensors"):
            join([a, b])


def test_inputs_are_scaled_and_permuted_after_the_norm():
    x, norm = torch.randn(3, 4), Norm(torch.randn(4), 0.5, 1.0)
    assert prepare_input(x, {}, norm) == (x, norm)
    packed = {
        "pre_scale": torch.tensor([[1.0, 2, 3, 4]]),
        "perm": torch.tensor([[3, 1, 0, 2]], dtype=torch.int32),
    }
    y, left = prepare_input(x, packed, norm)
    h = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * (norm.weight + 1)
    torch.testing.assert_close(y, (h * packed["pre_scale"])[:, [3, 1, 0, 2]])
    assert left is None
    y, left = prepare_input(x, {"perm": packed["perm"]}, None)
    assert torch.equal(y, x[:, [3, 1, 0, 2]]) and left is None


@pytest.mark.parametrize("rows", [8, 9])
@pytest.mark.parametrize("format", EVERY, ids=str)
def test_linear_multiplies_by_the_dequantized_weight(format, rows):
    torch.manual_seed(0)
    x, bias, residual = torch.randn(rows, 256), torch.randn(6), torch.randn(rows, 6)
    norm = Norm(torch.rand(256) + 0.5, 0.5, 0.0)
    packed = format.quantize(torch.randn(6, 256))
    weight = format.dequantize(packed)
    h = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    rounds = format.act is not None and rows == 9
    with count_ops() as counts:
        y = format.linear(x, packed, norm=norm, bias=bias, activation="silu", residual=residual)
    assert counts.total() == (2 if rounds else 1)
    expected = torch.nn.functional.silu(h @ weight.T + bias) + residual
    tolerance = 0.05 if rounds else 1e-4  # activations are rounded to 8 bit
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * 20)
    with count_ops() as counts:
        y = format.gated_linear(x, packed, activation="silu", norm=norm, bias=bias)
    assert counts.total() == (3 if rounds else 1)
    gate, up = (h @ weight.T + bias).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * 500)
    y, expected = format.linear(x, packed), x @ weight.T
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * 40)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("format", [*EVERY, Int8(static=True), DENSE], ids=str)
def test_a_gate_comes_before_the_product(format, rows, activation):
    torch.manual_seed(0)
    both, residual = torch.randn(rows, 512), torch.randn(rows, 6)
    packed = format.quantize(torch.randn(6, 256))
    if getattr(format, "static", False):
        packed["input_scale"] = torch.tensor([[6 / 127]])
    rounds = format.act is not None and rows == 9
    x = act_and_mul(both, activation)
    assert format.rounds(x, packed) == rounds
    with count_ops() as counts:
        y = format.linear(both, packed, gate=activation, residual=residual)
    assert counts.total() == 2 and any("gated_quant" in name for name in counts) == rounds
    torch.testing.assert_close(y, format.linear(x, packed, residual=residual), rtol=1e-4, atol=1e-4)
    packed["pre_scale"] = torch.rand(1, 256) + 0.5  # what is in between is not one kernel with it
    assert not format.rounds(x, packed)
    if format != DENSE:
        y = format.linear(both, packed, gate=activation, residual=residual)
        torch.testing.assert_close(y, format.linear(x, packed, residual=residual))


@pytest.mark.parametrize("format", [Int8(static=True), Fp8("channel", static=True)], ids=str)
def test_a_static_scale_rounds_the_activations(format):
    torch.manual_seed(0)
    x, packed = torch.randn(20, 64), format.quantize(torch.randn(6, 64))
    largest = 127 if format.act == torch.int8 else 448
    packed["input_scale"] = torch.tensor([[2 / largest]])  # what is larger than 2 is cut
    y = format.linear(x, packed)
    expected = x.clamp(-2, 2) @ format.dequantize(packed).T
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.7)
    assert (y - expected).norm() < 0.04 * expected.norm()
    assert (y - x @ format.dequantize(packed).T).norm() > 0.04 * expected.norm()


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
