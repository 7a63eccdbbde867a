import pytest
import torch
import torch.nn.functional as F

from tlk.quant.config import QuantConfig
from tlk.quant.observe import Inputs
from tlk.quantize.plan import Target
from tlk.quantize.rounding import GPTQ, nearest, round_linear

PARTS = (24, 8)


def target(method, **options):
    config = QuantConfig(method, **options)
    return Target(("m.a", "m.b"), PARTS, config, config.format)


def problem(k=128, tokens=400, seed=0):
    """A weight whose parts differ in size, and what was seen of correlated, uneven inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5
    x = torch.randn(tokens, k, generator=g) @ mix * torch.rand(k, generator=g).square()
    w = torch.randn(32, k, generator=g) * 0.05
    w[24:] *= 3
    return w, x


def seen(x, hessian=True, keep=2048):
    inputs = Inputs(x.shape[1], len(x), "cpu", hessian=hessian, keep=keep)
    inputs.add(x)
    return inputs


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", GPTQ)
def test_gptq_gives_less_error_of_the_output_than_rounding(method):
    w, x = problem()
    t = target(method)
    plain = round_linear(w, t, torch.float32, seen(x, hessian=False))
    found = round_linear(w, t, torch.float32, seen(x))
    for before, after in zip(plain.reports, found.reports, strict=True):
        assert after["method"] == method and after["damping"] == 0.01
        assert after["output_error"] < 0.9 * before["output_error"]
        assert after["weight_error"] > before["weight_error"]
        assert "damping" not in before and "fallback" not in after


@pytest.mark.parametrize(
    "method", ["int4", "int4-gptq", "int4-awq", "fp4-mx", "fp4-nv", "nf4", "fp8"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_report_says_how_far_the_packed_tensors_are_off(method, dtype):
    w, x = problem()
    t = target(method)
    found = round_linear(w, t, dtype, seen(x))
    values = t.format.dequantize(found.packed)
    for report, rows in zip(found.reports, (slice(0, 24), slice(24, 32)), strict=True):
        assert report["weight_error"] == pytest.approx(relative(values[rows], w[rows]), rel=1e-4)
        if t.format.act is None:
            wanted = relative(F.linear(x, values[rows]), F.linear(x, w[rows]))
            assert report["output_error"] == pytest.approx(wanted, rel=1e-3)
    scale = found.packed["scale"]
    assert scale.dtype == (dtype if method.startswith("int4") else scale.dtype)


@pytest.mark.parametrize(("method", "rounding"), [("int8", 127), ("fp8", 448)])
def test_rounded_activations_count(method, rounding):
    w, x = problem()
    x[:, 3] *= 100  # makes int8's rows coarse
    report = round_linear(w, target(method), torch.float32, seen(x)).reports[0]
    assert report["output_error"] > 1.2 * report["weight_error"] or method == "fp8"
    assert 0.002 < report["output_error"] < 0.2


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_static_activations_take_the_range_that_was_seen(method):
    w, x = problem()
    t, inputs = target(method, static=True), seen(x)
    found = round_linear(w, t, torch.float32, inputs)
    scale = found.packed["input_scale"]
    largest = 127 if method == "int8" else 448
    assert scale.shape == (1, 1) and float(scale) == pytest.approx(float(x.abs().max()) / largest)
    dynamic = round_linear(w, target(method), torch.float32, inputs)
    assert (
        found.reports[0]["output_error"]
        > (1.01 if method == "fp8" else 1.05) * dynamic.reports[0]["output_error"]
    )
    assert torch.equal(found.packed["scale"], dynamic.packed["scale"])
    with pytest.raises(ValueError, match=f"calibration must be given for static {method}"):
        round_linear(w, t, torch.float32, None)


def test_without_a_positive_definite_hessian_it_rounds_and_says_so():
    w, x = problem()
    t, inputs = target("int4-gptq"), seen(x)
    inputs.hessian.matrix.fill_(-1.0).fill_diagonal_(1e-3)
    found = round_linear(w, t, torch.float32, inputs)
    assert found.reports[0]["fallback"].startswith(
        "rounded to nearest: the Hessian is not positive"
    )
    assert torch.equal(found.packed["weight"], nearest(w, t, torch.float32)["weight"])


@pytest.mark.parametrize("method", ["int4", "int8-weight", "nf4", "fp8", "int8"])
def test_parts_are_rounded_as_if_they_were_alone(method):
    w, _ = problem()
    t = target(method)
    whole = nearest(w, t, torch.bfloat16)
    alone = [t.format.quantize(part, torch.bfloat16) for part in w.split(PARTS)]
    for name in ("weight", "scale"):
        wanted = torch.cat([p[name] for p in alone])
        assert torch.equal(whole[name].view(torch.uint8), wanted.view(torch.uint8))


def test_parts_of_nested_nf4_have_their_own_offset():
    w, _ = problem()
    packed = nearest(w, target("nf4", double_quant=True), torch.bfloat16)
    offset = packed["nested_offset"].flatten()
    assert (offset[:24] == offset[0]).all() and offset[24] > 2 * offset[0]


def test_parts_of_nvfp4_share_their_global_scale():
    w, _ = problem()
    packed = nearest(w, target("fp4-nv"), torch.bfloat16)
    assert (packed["global_scale"] == packed["global_scale"][0]).all()


def test_clipping_is_asked_for():
    w, x = problem()
    w[0, 7], x[:, 7] = 3.0, 1e-5
    t, inputs = target("int4-awq"), seen(x, hessian=False)
    plain = round_linear(w, t, torch.float32, inputs)
    clipped = round_linear(w, t, torch.float32, inputs, clip=True)
    assert t.format.dequantize(clipped.packed)[0, 7] < 2 < t.format.dequantize(plain.packed)[0, 7]
    assert clipped.reports[0]["output_error"] < plain.reports[0]["output_error"]
