import pytest
import torch

from tests.models.zoo import paged_logits
from tests.quantize.tiny import data, decoder, planned
from tlk.models.decoder import linears
from tlk.quant.config import QuantConfig
from tlk.quant.format import DENSE, fuse
from tlk.quantize.run import data_is_needed, parts, run

CPU = torch.device("cpu")


def logits(made, sequences=3, length=20):
    ids = list(data(sequences, length).ids)
    steps = [[(i, length) for i in range(sequences)]]
    return torch.cat(paged_logits(made, ids, steps))


def quantized(method="int4-gptq", with_data=True, options=None, **how):
    made, sources = decoder()
    plan = planned(made, sources, method, **(options or {}))
    found = run(made, plan, data() if with_data else None, CPU, progress=False, **how)
    return made, plan, found


@pytest.mark.parametrize("method", ["int4-gptq", "int4-awq", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("with_data", [True, False])
def test_the_decoder_runs_on_what_was_found(method, with_data):
    exact = logits(decoder()[0])
    options = {"group_size": 32} if method == "nf4" else {}
    made, plan, found = quantized(method, with_data, options)
    for name, linear in linears(made).items():
        assert (linear.format == DENSE) == (name == "lm_head")
    error = float((logits(made) - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.4
    assert set(found.report) == {m for t in plan.targets.values() for m in t.modules}
    assert all(("output_error" in r) == with_data for r in found.report.values())
    assert found.seconds > 0 and found.memory > 2**20


def test_calibration_helps_the_whole_model():
    exact = logits(decoder()[0])
    errors = [float((logits(quantized(m)[0]) - exact).norm()) for m in ("int4-gptq", "int4")]
    assert errors[0] < errors[1]


def test_the_head_is_one_more_layer():
    layers = []
    made, _, found = quantized(
        options={"ignore": []}, done=lambda i, result: layers.append((i, list(result.packed)))
    )
    assert [i for i, _ in layers] == [0, 1, 2] and layers[2][1] == ["lm_head"]
    assert made.lm_head.format != DENSE and "lm_head" in found.report
    made, _, found = quantized(with_data=False, options={"ignore": []})
    assert made.lm_head.format != DENSE and "lm_head" in found.report


def test_scales_of_an_8_bit_cache():
    _, _, found = quantized(kv_dtype="int8")
    assert len(found.kv_scales) == 2
    for k, v in found.kv_scales:
        assert k.shape == v.shape == (2,) and (k > 0).all() and (v > 0).all()
    _, _, other = quantized(kv_dtype="fp8")
    ratio = other.kv_scales[1][0] / found.kv_scales[1][0]
    assert torch.allclose(ratio, torch.full((2,), 127 / 448))
    assert quantized()[2].kv_scales == []


@pytest.mark.parametrize("with_data", [True, False])
def test_an_interrupted_run_goes_on(with_data):
    """The layers that were finished are stored again, and the others come out the same."""
    results = {}
    whole, _, report = quantized(
        with_data=with_data, done=lambda i, r: results.__setitem__(i, r), kv_dtype="fp8"
    )
    made, sources = decoder()
    plan = planned(made, sources)

    def load(i):
        if i > 0:
            return None
        for name, packed in results[0].packed.items():
            target = plan.targets[f"layers.0.{name}"]
            made.layers[0].get_submodule(name).store(target.format, packed)
        return results[0]

    again = run(
        made, plan, data() if with_data else None, CPU, load=load, progress=False, kv_dtype="fp8"
    )
    assert torch.equal(logits(made), logits(whole))
    assert again.report == report.report
    for a, b in zip(again.kv_scales, report.kv_scales, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_parts_are_those_of_the_checkpoint():
    results = []
    _, plan, _ = quantized(done=lambda i, r: results.append(r))
    targets = {n.removeprefix("layers.1."): t for n, t in plan.targets.items() if ".1." in n}
    found = parts(results[1], targets)
    assert list(found)[:4] == [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    again = fuse([found[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv"])
    for name, tensor in results[1].packed["attention.qkv"].items():
        assert torch.equal(again[name], tensor)


def test_which_methods_need_data():
    assert data_is_needed(QuantConfig("int4-gptq")) and data_is_needed(QuantConfig("int8"))
    assert not data_is_needed(QuantConfig("fp8")) and not data_is_needed(QuantConfig("fp4-mx"))
    for value in ("int4-awq", QuantConfig("int4-awq")):
        assert data_is_needed(QuantConfig("fp8", per_layer={"re:.*down": value}))
    assert not data_is_needed(QuantConfig("fp8", per_layer={"re:.*down": None}))
    assert data_is_needed(QuantConfig("fp8", static=True))
    assert data_is_needed(QuantConfig("nf4", per_layer={"a": QuantConfig("fp8", static=True)}))


def test_progress_tells_error_time_and_memory(capsys):
    made, sources = decoder()
    run(made, planned(made, sources), data(), CPU)
    text = capsys.readouterr().err
    assert "int4-gptq: 100%" in text and "2/2" in text
    assert "error 0." in text and " s, " in text and "GiB" in text
