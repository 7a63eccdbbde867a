import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tlk.quant import gptq as module
from tlk.quant.gptq import Hessian, Indefinite, Lattice, factor, gptq

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    ("sym-g64", 64, True, 15),
    ("asym-g64", 64, False, 15),
    ("sym-row", 192, True, 15),
    ("asym-3bit-g96", 96, False, 7),
    ("sym-8bit-row", 192, True, 255),
]


def golden():
    with safe_open(GOLDEN / "gptq_rounding.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def integers(group_size, symmetric, top=15):
    """GPTQ's own rule for scales and zero points."""

    def find(weight):
        groups = weight.unflatten(1, (-1, group_size))
        if symmetric:
            scale = 2 * groups.abs().amax(-1) / top
            return Lattice(scale, torch.full_like(scale, (top + 1) / 2), top=top)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / top
        return Lattice(scale, (-low / scale).round(), top=top)

    return find


def hessian_of(x):
    h = Hessian(x.shape[-1], x.device)
    h.add(x)
    return h.matrix


def problem(n=24, k=160, tokens=400, seed=0):
    """A weight, and inputs that are correlated and of uneven energy."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5
    x = torch.randn(tokens, k, generator=g) @ mix * torch.rand(k, generator=g).square()
    return torch.randn(n, k, generator=g), x


def output_error(weight, values, x):
    return float(((weight - values) @ x.T).square().mean())


@pytest.mark.parametrize(("name", "group_size", "symmetric", "top"), CASES)
def test_equals_gptqmodel(name, group_size, symmetric, top):
    tensors, _ = golden()
    weight, h = tensors["weight"], hessian_of(tensors["x"].float())
    found = gptq(
        weight, h, integers(group_size, symmetric, top), group_size,
        act_order=False, static_groups=False, damping=0.05,
    )  # fmt: skip
    assert (found.values - tensors[name]).abs().max() < 1e-6
    each = found.lattice.columns(torch.arange(192) // group_size)
    theirs = (tensors[name] / each.scale).round()
    assert (
        torch.equal((found.values / each.scale).round(), theirs) and len(theirs.unique()) > top / 2
    )
    assert found.damping == 0.05


def test_golden_file_is_of_the_script_beside_it():
    _, about = golden()
    script = (GOLDEN / "make_gptq_rounding.py").read_bytes()
    assert about["script"] == hashlib.sha256(script).hexdigest()
    assert json.loads(about["versions"]) == {"gptqmodel": "7.7.0"}


@pytest.mark.parametrize("k", [160, 128, 40])
def test_beats_round_to_nearest_and_act_order_beats_the_natural_one(k):
    errors = {"nearest": 0.0, "natural": 0.0, "static": 0.0}
    for seed in range(4):
        w, x = problem(k=k, seed=seed)
        h, find = hessian_of(x), integers(k // 5 if k == 160 else k, True)
        size = k // 5 if k == 160 else k
        nearest = find(w).columns(torch.arange(k) // size)
        codes = ((w / nearest.scale).round() + nearest.zero).clamp(0, 15)
        errors["nearest"] += output_error(w, nearest.values(codes), x)
        natural = gptq(w, h, find, size, act_order=False, static_groups=False)
        errors["natural"] += output_error(w, natural.values, x)
        errors["static"] += output_error(w, gptq(w, h, find, size).values, x)
    assert errors["static"] < errors["natural"] < 0.8 * errors["nearest"]


def test_values_lie_on_the_lattice_of_the_weight_as_it_came():
    w, x = problem()
    find = integers(32, False)
    found = gptq(w, hessian_of(x), find, 32)
    lattice = find(w)
    assert torch.equal(found.lattice.scale, lattice.scale)
    each = lattice.columns(torch.arange(160) // 32)
    codes = (found.values / each.scale).round() + each.zero
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.allclose(each.values(codes), found.values, rtol=1e-6, atol=1e-7)
    assert len(codes.unique()) > 10


def test_e2m1():
    w, x = problem()

    def find(weight):
        return Lattice(weight.unflatten(1, (-1, 32)).abs().amax(-1) / 6, None, "e2m1")

    found = gptq(w, hessian_of(x), find, 32)
    units = found.values / found.lattice.scale[:, torch.arange(160) // 32]
    points = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (units.abs()[..., None] - points).abs().amin(-1).max() < 1e-5
    assert len(units.abs().round(decimals=3).unique()) == 8


def test_loss_is_half_the_squared_output_error_where_nothing_was_damped():
    w, x = problem()
    h = hessian_of(x)
    found = gptq(w, h, integers(160, True), None, damping=0.0)
    d = w - found.values
    assert found.loss == pytest.approx(float(((d @ h) * d).sum()) / 2, rel=2e-3)


def test_an_input_that_is_always_zero_loses_its_weights():
    w, x = problem()
    x[:, 3] = 0
    h = hessian_of(x)
    before = w.clone(), h.clone()
    found = gptq(w, h, integers(160, True), None)
    assert (found.values[:, 3] == 0).all() and found.values[:, 4].any()
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_factor():
    h = hessian_of(problem(tokens=1000)[1]).double()
    u, damping = factor(h.clone(), 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    assert damping == 0.01 and torch.equal(u, u.triu())
    assert torch.allclose(u.mT @ u @ damped, torch.eye(len(h), dtype=h.dtype), atol=1e-8)
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(u, wanted, rtol=1e-6, atol=1e-9)


def test_damping_grows_until_it_helps():
    h = torch.eye(4)
    h[0, 1] = h[1, 0] = 1.034
    assert factor(h.clone())[1] == pytest.approx(0.04)
    h[0, 1] = h[1, 0] = 5.0
    with pytest.raises(Indefinite, match=r"not positive definite with 0\.99 of its mean added"):
        factor(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian(dtype):
    x = torch.randn(2, 5, 7).to(dtype)
    h = Hessian(7, "cpu")
    h.add(x[0])
    h.add(x[1:])
    rows = x.flatten(0, 1).double()
    assert h.tokens == 10 and torch.allclose(h.matrix.double(), rows.T @ rows, rtol=1e-5)


def test_blocks_are_kernels(device, monkeypatch):
    calls = []
    original = module.gptq_block
    monkeypatch.setattr(
        module, "gptq_block", lambda *a, **o: calls.append(a[0].shape) or original(*a, **o)
    )
    w, x = problem(n=3)
    on_kernels = gptq(w.to(device), hessian_of(x).to(device), integers(32, True), 32).values
    assert calls == [(3, 128), (3, 32)]
    assert torch.allclose(on_kernels.cpu(), gptq(w, hessian_of(x), integers(32, True), 32).values)


def test_bad_input_is_refused():
    w, x = problem(k=8)
    h, find = hessian_of(x), integers(4, True)
    with pytest.raises(ValueError, match=r"hessian must have shape \(8, 8\), got \(7, 7\)"):
        gptq(w, h[:7, :7], find, 4)
    with pytest.raises(ValueError, match="group_size must divide the 8 inputs, got 3"):
        gptq(w, h, find, 3)
    with pytest.raises(ValueError, match="act_order must be False"):
        gptq(w, h, find, 4, static_groups=False)
