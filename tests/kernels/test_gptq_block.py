import pytest
import torch

from tests.kernels.launches import record_launches
from tlk.kernels import gptq_block as module
from tlk.kernels.gptq_block import (
    E2M1,
    decode_reference,
    encode_reference,
    gptq_block,
    gptq_block_reference,
)


def problem(n, b, grid="int", top=15, seed=0):
    """Rows of mixed sizes, a factor with strong neighbours, and scales that some values exceed."""
    g = torch.Generator().manual_seed(seed)
    u = torch.eye(b) + 0.1 * torch.randn(b, b, generator=g).triu(1)
    u *= 0.5 + torch.rand(b, 1, generator=g)
    u += torch.full((b, b), 99.0).tril(-1)  # must not matter
    w = torch.randn(n, b, generator=g) * (0.1 + torch.rand(n, 1, generator=g))
    scale = (0.02 + 0.2 * torch.rand(n, b, generator=g)) * w.abs().mean(1, keepdim=True)
    zero = None
    if grid == "int":
        scale = scale * 15 / top
        zero = torch.randint(0, top + 1, (n, b), generator=g).float()
    return w, u, scale, zero


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def compare(args, device, grid, top):
    """Equal to the reference; on a GPU, whose sums are fused, a row may once fall off the other side of a half."""
    codes, errors = gptq_block(*on(device, args), grid=grid, top=top)
    wanted, rows = gptq_block_reference(*args, grid, top)
    assert codes.dtype == torch.uint8 and errors.dtype == torch.float32
    differing = (codes.cpu() != wanted).any(1)
    assert differing.sum() <= (len(differing) // 10 if device == "cuda" else 0)
    same = ~differing
    atol = 1e-5 if device == "cuda" else 1e-6
    assert torch.allclose(errors.cpu()[same], rows[same], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("grid", "top"), [("int", 15), ("int", 255), ("int", 7), ("e2m1", 15)])
@pytest.mark.parametrize(("n", "b"), [(1, 1), (3, 128), (64, 37), (17, 128)])
def test_gptq_block(n, b, grid, top, device):
    compare(problem(n, b, grid=grid, top=top), device, grid, top)


def test_rows_may_be_strided(device):
    w, u, scale, zero = problem(11, 40)
    wide_w, wide_u = torch.full((11, 99), 7.0), torch.full((50, 60), 7.0)
    wide_w[:, 5:45], wide_u[3:43, 9:49] = w, u
    before = wide_w.clone()
    codes, errors = gptq_block(*on(device, (wide_w[:, 5:45], wide_u[3:43, 9:49], scale, zero)))
    wanted = gptq_block(*on(device, (w, u, scale, zero)))
    assert torch.equal(codes, wanted[0]) and torch.equal(errors, wanted[1])
    assert torch.equal(wide_w, before)


def test_without_correlation_it_is_round_to_nearest(device):
    w, u, scale, zero = problem(9, 30)
    u = torch.diag(u.diagonal())
    codes, errors = gptq_block(*on(device, (w, u, scale, zero)))
    level = (w / scale).round() + zero
    assert torch.equal(codes.cpu().float(), level.clamp(0, 15))
    rest = w - (codes.cpu() - zero) * scale
    assert torch.allclose(errors.cpu(), rest / u.diagonal(), atol=1e-6)


def test_the_error_of_a_column_moves_to_those_after_it(device):
    """Two columns by hand: 0.4 rounds to 0, and of its error 0.4 the second takes 0.5 · 0.4."""
    w, u = torch.tensor([[0.4, 0.7]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    one, zero = torch.ones(1, 2), torch.full((1, 2), 8.0)
    codes, errors = gptq_block(*on(device, (w, u, one, zero)))
    assert codes.tolist() == [[8, 8]]  # 0.7 − 0.2 = 0.5, and halves go to even
    assert torch.allclose(errors.cpu(), torch.tensor([[0.2, 0.5]]))


def test_e2m1_rounds_halves_to_the_even_code(device):
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 0.26, 4.9, 0.0, 0.2])
    x = torch.stack([x, -x])
    n = x.shape[1]
    args = (x, torch.eye(n), torch.ones(2, n), None)
    codes, errors = gptq_block(*on(device, args), grid="e2m1")
    assert codes[0].tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 1, 6, 0, 0]
    assert codes[1].tolist() == [0, 10, 10, 12, 12, 14, 14, 15, 9, 14, 0, 0]
    value = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes.cpu().long()]
    assert torch.equal(errors.cpu(), x - value)


def test_reference_grids_are_their_own_inverse():
    codes = torch.arange(16).float()
    assert torch.equal(encode_reference(codes - 8, torch.tensor(8.0), "int", 15), codes)
    assert torch.equal(decode_reference(codes, torch.tensor(8.0), "int"), codes - 8)
    values = decode_reference(codes, None, "e2m1")
    assert values.tolist()[:8] == list(E2M1)
    assert torch.equal(encode_reference(values, None, "e2m1", 15)[1:8], codes[1:8])


def test_one_launch(device, monkeypatch):
    grids = record_launches(monkeypatch, module, "_gptq_block_kernel")
    gptq_block(*on(device, problem(19, 20)))
    assert grids == [(3,)]


@pytest.mark.parametrize(("n", "b"), [(0, 5), (4, 0)])
def test_empty(n, b, device):
    w, u, scale, zero = problem(4, 5)
    args = (w[:n, :b], u[:b, :b], scale[:n, :b].contiguous(), zero[:n, :b].contiguous())
    codes, errors = gptq_block(*on(device, args))
    assert codes.shape == errors.shape == (n, b)


def test_registration(device):
    args = (*on(device, problem(5, 12)), "int", 15)
    torch.library.opcheck(torch.ops.tlk.gptq_block.default, args)


def test_bad_input_is_refused():
    w, u, scale, zero = problem(4, 6)

    def refuses(error, message, **change):
        args = {"w": w, "u": u, "scale": scale, "zero": zero}
        with pytest.raises(error, match=message):
            gptq_block(**args | change)

    refuses(ValueError, "w must have at most 128 columns, got 129", w=torch.zeros(4, 129))
    refuses(ValueError, "grid must be 'int' or 'e2m1', got 'nf4'", grid="nf4")
    refuses(ValueError, "zero must be a tensor for grid 'int'", zero=None)
    refuses(ValueError, "zero must be None for grid 'e2m1'", grid="e2m1")
    refuses(ValueError, "top must be in 1..255, got 256", top=256)
    refuses(ValueError, r"u must have shape \(6, 6\)", u=u[:5])
    refuses(ValueError, r"scale must have shape \(4, 6\)", scale=scale[:3])
    refuses(ValueError, r"zero must have shape \(4, 6\)", zero=zero[:, :2])
    refuses(TypeError, "w must be float32, got float16", w=w.half())
    refuses(ValueError, "u must have stride 1", u=u.T)
    refuses(ValueError, "scale must be on cpu", scale=scale.to("meta"))
    refuses(ValueError, "scale must be contiguous", scale=torch.ones(4, 12)[:, :6])
