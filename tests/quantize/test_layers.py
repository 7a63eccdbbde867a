import pytest
import torch
import torch.nn.functional as F

from tests.quantize.tiny import data, decoder, planned
from tlk.errors import CheckpointError
from tlk.quant.format import DENSE
from tlk.quantize import layers as module
from tlk.quantize.layers import Stream, calibrate_head, calibrate_layer, quantize_layer

CPU = torch.device("cpu")


def prepared(model_type="llama", **fields):
    made, sources = decoder(model_type, **fields)
    for rope in made.ropes:
        rope.prepare(20)
    return made, sources


def targets_of(made, sources, method, **options):
    plan = planned(made, sources, method, **options)
    prefix = "layers.0."
    return {n.removeprefix(prefix): t for n, t in plan.targets.items() if n.startswith(prefix)}


def stream_of(made):
    return Stream.start(made.embedding, data().ids, CPU)


def forward(layer, stream):
    """What the layer makes of the stream, which stays as it is."""
    x, n = stream.x.flatten(0, 1), len(stream.x)
    return layer(x, stream.attending.batch(x, n), stream.attending.kv(layer, x, n))


def test_the_stream_starts_with_the_embeddings(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 50)
    made, _ = prepared()
    stream = stream_of(made)
    assert torch.equal(stream.x, made.embedding.weight[data().ids])
    assert [n for _, _, n in stream.parts()] == [2, 2, 2] and stream.tokens == 120
    assert [n for _, _, n in stream.parts(60)] == [2, 1]
    before = stream.x.clone()
    stream.advance(lambda x, n: x * n)
    assert torch.equal(stream.x, before * 2)


@pytest.mark.parametrize("method", ["int4-gptq", "int4-awq", "int8", "fp4-nv", "fp8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "nemotron"])
def test_the_stream_moves_past_the_quantized_layer(method, model_type, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 50)
    made, sources = prepared(model_type, num_key_value_heads=4)
    layer, stream = made.layers[0], stream_of(made)
    exact, before = forward(layer, stream), stream_of(made)
    result = calibrate_layer(layer, targets_of(made, sources, method), stream)
    names = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    if model_type == "nemotron":
        names = tuple(n.replace("gate_up", "up") for n in names)
    assert tuple(result.packed) == tuple(result.reports) == names
    for name, packed in result.packed.items():
        linear = layer.get_submodule(name)
        assert linear.format != DENSE and linear.packed().keys() == packed.keys()
    after = forward(layer, before)
    assert torch.allclose(stream.x.flatten(0, 1), after, atol=1e-4)
    error = float((after - exact).norm() / exact.norm())
    assert 1e-4 < error < (0.3 if "4" in method else 0.13)


def test_folded_scales_leave_the_layer_what_it_was():
    """With a format fine enough to be exact, AWQ's and SmoothQuant's scales change nothing."""
    for method in ("int4-awq", "int8"):
        made, sources = prepared(num_key_value_heads=4)
        layer, stream = made.layers[0], stream_of(made)
        with torch.no_grad():
            layer.input_norm.weight[3] = 30.0
            layer.post_norm.weight[5] = 30.0
        exact = forward(layer, stream)
        norms = layer.input_norm.weight.clone(), layer.post_norm.weight.clone()
        calibrate_layer(layer, targets_of(made, sources, method), stream)
        assert not torch.equal(layer.input_norm.weight, norms[0]) or not torch.equal(
            layer.post_norm.weight, norms[1]
        )
        error = float((stream.x.flatten(0, 1) - exact).norm() / exact.norm())
        assert error < (0.2 if method == "int4-awq" else 0.05)


def test_gptq_and_awq_beat_rounding():
    errors = {}
    for method in ("int4", "int4-gptq", "int4-awq"):
        made, sources = prepared()
        layer, stream = made.layers[0], stream_of(made)
        exact = forward(layer, stream)
        calibrate_layer(layer, targets_of(made, sources, method, symmetric=False), stream)
        errors[method] = float((stream.x.flatten(0, 1) - exact).norm())
    assert errors["int4-gptq"] < 0.9 * errors["int4"]
    assert errors["int4-awq"] < 0.97 * errors["int4"]


def test_second_layers_are_fitted_to_the_rounded_first(monkeypatch):
    """The Hessian of `out` is of what attention gives once q, k and v are rounded."""
    made, sources = prepared()
    layer, stream, seen = made.layers[0], stream_of(made), {}
    original = module.round_linear
    before = stream_of(made)

    def round_linear(weight, target, dtype, inputs, **options):
        seen[target.modules[0].rpartition(".")[2]] = inputs
        return original(weight, target, dtype, inputs, **options)

    monkeypatch.setattr(module, "round_linear", round_linear)
    calibrate_layer(layer, targets_of(made, sources, "int4-gptq"), stream)
    attention, mlp = module.halves(layer, before.attending)
    x = before.x.flatten(0, 1)
    for half, names in ((attention, ("q_proj", "o_proj")), (mlp, ("gate_proj", "down_proj"))):
        first, second = half.norm(x), half.inner(x, 6)
        assert torch.allclose(seen[names[0]].hessian.matrix, first.T @ first, rtol=1e-3, atol=1e-3)
        assert torch.allclose(
            seen[names[1]].hessian.matrix, second.T @ second, rtol=1e-3, atol=1e-3
        )
        x = half.run(x, 6)


def test_what_is_not_a_target_stays_but_may_take_a_scale():
    made, sources = prepared()
    layer, stream = made.layers[0], stream_of(made)
    exact = forward(layer, stream)
    options = {"ignore": ["re:.*gate_proj", "re:.*up_proj", "re:.*self_attn"]}
    targets = targets_of(made, sources, "int4-awq", **options)
    up = layer.mlp.gate_up.weight.clone()
    with torch.no_grad():
        up[96] = layer.mlp.gate_up.weight[96].mul_(40)
        layer.mlp.down.weight[:, 0] /= 40
    assert list(targets) == ["mlp.down"]
    result = calibrate_layer(layer, targets, stream)
    assert layer.mlp.gate_up.format == layer.attention.qkv.format == DENSE
    assert result.reports["mlp.down"][0]["scaled_by"] is not None
    assert torch.equal(layer.mlp.gate_up.weight[:96], up[:96])
    assert not torch.allclose(layer.mlp.gate_up.weight[96:], up[96:])
    error = (stream.x.flatten(0, 1) - exact).norm() / exact.norm()
    assert error < 0.1


@pytest.mark.parametrize("method", ["int4-awq", "int8", "int4-gptq"])
def test_a_search_that_fails_leaves_the_layer_rounded_and_says_so(method):
    """Outputs overflow: there is no loss to compare and no Hessian to invert."""
    made, sources = prepared(num_key_value_heads=4)
    layer, stream = made.layers[0], stream_of(made)
    with torch.no_grad():
        layer.attention.out.weight[0, 0] = 3e38
    result = calibrate_layer(layer, targets_of(made, sources, method), stream)
    reports = [r for of_parts in result.reports.values() for r in of_parts]
    why = [r["fallback"] for r in reports if "fallback" in r]
    assert why and all(w.startswith(("not scaled: the loss is", "rounded to near")) for w in why)
    assert all(p.float().isfinite().all() for p in result.packed["mlp.down"].values())


def test_weights_that_are_no_numbers_are_an_error():
    made, sources = prepared()
    with torch.no_grad():
        made.layers[0].mlp.down.weight[3, 4] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"weights of model\.layers\.0\.mlp\.down_proj are inf"
    ):
        quantize_layer(made.layers[0], targets_of(made, sources, "int4"))


def test_keys_and_values_are_watched(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 50)
    made, sources = prepared()
    layer, stream = made.layers[0], stream_of(made)
    before = stream_of(made)
    result = calibrate_layer(layer, targets_of(made, sources, "int4"), stream, kv=True)
    forward(layer, before)
    pages = before.attending.last
    for amax, t in zip(result.kv_amax, (pages.k, pages.v), strict=True):
        assert amax.shape == (2,) and torch.allclose(amax, t.abs().amax((0, 2, 3)), rtol=1e-4)


def test_without_data_every_layer_is_rounded():
    made, sources = prepared()
    layer = made.layers[0]
    weight = layer.mlp.down.weight.clone()
    result = quantize_layer(layer, targets_of(made, sources, "int4"))
    assert set(result.reports["attention.qkv"][0]) == {"method", "weight_error"}
    assert len(result.reports["attention.qkv"]) == 3
    found = layer.mlp.down.format.dequantize(layer.mlp.down.packed())
    assert torch.equal(found, F.linear(torch.eye(96), found).T) and not torch.equal(found, weight)


@torch.no_grad()
def test_the_head_reads_the_normalized_stream():
    made, sources = prepared()
    target = planned(made, sources, ignore=[]).targets["lm_head"]
    stream, weight = stream_of(made), made.lm_head.weight.clone()
    result = calibrate_head(made.lm_head, made.final_norm, target, stream)
    assert made.lm_head.format == target.format and list(result.packed) == ["lm_head"]
    x = made.final_norm(stream.x.flatten(0, 1))
    values, exact = target.format.dequantize(result.packed["lm_head"]), F.linear(x, weight)
    wanted = float((F.linear(x, values) - exact).norm() / exact.norm())
    assert result.reports["lm_head"][0]["output_error"] == pytest.approx(wanted, rel=1e-3)
    assert wanted < result.reports["lm_head"][0]["weight_error"]
