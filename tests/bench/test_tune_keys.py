import json

import pytest

from tests.bench.tuning import BF16
from tlk.bench import tune_keys, tune_time
from tlk.bench.tune import Options
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import PARTS, Projection, projections

LINEARS = ("matmul", "norm_linear", "gated_linear")


def test_the_layers_of_a_model():
    assert set(projections("llama-3.1-8b")) == {
        Projection(6144, 4096, norm=True),
        Projection(4096, 4096, residual=True),
        Projection(28672, 4096, norm=True, gated=True),
        Projection(4096, 14336, residual=True),
        Projection(128256, 4096, norm=True, head=True),
    }
    tied = [layer for layer in projections("qwen3-0.6b") if layer.head]
    assert tied == [Projection(151936, 1024, norm=True, head=True)]
    assert projections("qwen3-30b-a3b") == list(PARTS["qwen3-30b-a3b"])


def test_the_layers_of_a_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tune_keys.SHAPES["tiny"]))
    assert projections(str(file)) == projections(str(tmp_path)) == projections("tiny")
    with pytest.raises(ValueError, match=r"shapes must be a config\.json.*llama-3\.1-8b.*got nix"):
        projections("nix")


def test_layer_norms_are_no_norm_linears():
    fields = {**tune_keys.SHAPES["tiny"], "model_type": "nemotron", "hidden_act": "relu2"}
    fields |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tune_keys.SHAPES, "it", fields)
        layers = projections("it")
        wanted = Options(ops=LINEARS, shapes=("it",), tokens=(1,)).wanted()
    assert not any(layer.norm or layer.gated for layer in layers)
    assert {k.op for k in wanted} == {"matmul"}


def test_keys_are_few_tokens_first_and_heads_see_few():
    wanted = Options(ops=LINEARS, tokens=(512, 1)).wanted()
    assert [k.running for k in wanted] == sorted(k.running for k in wanted)
    assert [str(k) for k in wanted if k.op != "matmul" and k.running == 1] == [
        "norm_linear 6144×4096 bfloat16 M1",
        "norm_linear 28672×4096 bfloat16 M1",
        "norm_linear 128256×4096 bfloat16 M1",
        "gated_linear 28672×4096 bfloat16 M1",
    ]
    assert not any(k.layer.head for k in wanted if k.running == 512)
    two = Options(tokens=(3, 4), shapes=("llama-3.1-8b", "llama-3.1-8b")).wanted()
    assert len(two) == len(Options(tokens=(4,)).wanted())  # the same bucket, the same layers


def test_a_layer_before_a_residual_is_the_one_measured():
    layers = [Projection(64, 64, norm=True), Projection(64, 64, residual=True)]
    (only,) = tune_keys.keys(["matmul"], layers, [1], Options()._shape)
    assert only.layer.residual
    x, weight, residual = CALLS["matmul"].make(only).inputs(tune_time.Inputs("cpu", BF16))
    assert (x.shape, weight.shape, residual.shape) == ((1, 64), (64, 64), (1, 64))
