import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from tests.quantize.tiny import decoder
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, weight_sources
from tlk.models.layers import LayerNorm, RMSNorm
from tlk.quant.config import QuantConfig
from tlk.quant.observe import Inputs
from tlk.quantize import scales
from tlk.quantize.half import Attending, halves, reading
from tlk.quantize.plan import Target

GOLDEN = Path(__file__).parents[1] / "quant/golden"
LENGTH, SEQUENCES = 48, 2


def golden():
    with safe_open(GOLDEN / "awq_search.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def target(method, rows, **options):
    config = QuantConfig(method, **options)
    return Target(("m",), (rows,), config, config.format)


def layer_of(tensors):
    """The layer whose scales AutoAWQ searched, and its residual stream."""
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = FAMILIES["llama"].config(LlamaConfig(**fields).to_dict())
    made = Decoder(config).eval()
    parameters = dict(made.named_parameters())
    for name, parts in weight_sources(FAMILIES["llama"], config).items():
        if name.startswith("layers."):
            parameters[name].copy_(torch.cat([tensors[part] for part in parts]))
    for rope in made.ropes:
        rope.prepare(LENGTH)
    return made.layers[0], tensors["x"].flatten(0, 1)


def inputs_of(half, x, second):
    seen = Inputs((half.second if second else half.first).in_features, len(x), "cpu")
    if second:
        with reading(half.second, seen.add):
            half.run(x, SEQUENCES)
    else:
        seen.add(half.norm(x))
    return seen


@pytest.mark.parametrize("which", ["qkv", "out", "gate_up", "down"])
@torch.no_grad()
def test_no_more_loss_than_with_autoawqs_scales(which, monkeypatch):
    """Both losses by the same measure: of the half's output, or of the layer's own where AutoAWQ does."""
    tensors, about = golden()
    script = (GOLDEN / "make_awq_search.py").read_bytes()
    assert about["script"] == hashlib.sha256(script).hexdigest()
    assert json.loads(about["versions"]) == {"autoawq": "0.2.9"}
    layer, x = layer_of(tensors)
    attention, mlp = halves(layer, Attending(LENGTH, torch.device("cpu")))
    if which in ("gate_up", "down"):
        x = attention.run(x, SEQUENCES)
    half, second = (attention, mlp)[which in ("gate_up", "down")], which in ("out", "down")
    linear = half.second if second else half.first
    weight, seen = linear.weight.clone(), inputs_of(half, x, second)
    losses = []

    def best(candidates, loss):
        losses.append(loss)
        return original(candidates, loss)

    original = scales.best
    monkeypatch.setattr(scales, "best", best)
    t = target("int4-awq", len(weight), group_size=32)
    if second:
        choice = scales.scale_second(weight, t, seen, torch.float32)
    else:
        choice = scales.scale_first(half, weight, t, seen, [(x, SEQUENCES)])
    theirs = losses[0](tensors[f"scale.{which}"])
    assert choice.loss <= theirs * 1.0001 and choice.loss <= choice.unscaled
    assert (
        choice.setting is None
        or torch.allclose(choice.scale, tensors[f"scale.{which}"], rtol=1e-3)
        or choice.loss < theirs
    )


@torch.no_grad()
def test_scaling_is_found_where_it_helps_and_leaves_the_layer_as_it_was():
    tensors, _ = golden()
    layer, x = layer_of(tensors)
    half = halves(layer, Attending(LENGTH, torch.device("cpu")))[1]
    x = halves(layer, Attending(LENGTH, torch.device("cpu")))[0].run(x, SEQUENCES)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    t = target("int4-awq", 192, group_size=32)
    choice = scales.scale_first(
        half, half.first.weight.clone(), t, inputs_of(half, x, False), [(x, SEQUENCES)]
    )
    assert choice.setting is not None and choice.loss < 0.9 * choice.unscaled
    after = dict(layer.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_smoothquant_lowers_the_error_of_8_bit_products():
    tensors, _ = golden()
    layer, x = layer_of(tensors)
    half = halves(layer, Attending(LENGTH, torch.device("cpu")))[1]
    half.norm.weight[3] = 90.0
    choice = scales.scale_first(
        half, half.first.weight.clone(), target("int8", 192), inputs_of(half, x, False), []
    )
    assert choice.setting in (0.5, 0.6, 0.7, 0.8, 0.9) and choice.loss < 0.5 * choice.unscaled


@pytest.mark.parametrize(
    "norm",
    [RMSNorm(8, 0.5), RMSNorm(8, 0.5, 1.0), LayerNorm(8, 0.5, 1.0), LayerNorm(8, 0.5, bias=False)],
)
def test_a_norm_divided(norm):
    for p in norm.parameters():
        p.data.normal_()
    x, scale = torch.randn(5, 8), torch.rand(8) + 0.5
    before = norm(x)
    scales.divide_norm(norm, scale)
    assert torch.allclose(norm(x), before / scale, atol=1e-6)


def test_rows_divided_with_their_bias():
    made, _ = decoder("qwen2", num_key_value_heads=4)
    qkv, rows, scale = made.layers[0].attention.qkv, slice(128, 192), torch.rand(64) + 0.5
    weight, bias = qkv.weight.clone(), qkv.bias.clone()
    x = torch.randn(3, 64)
    before = x @ weight.T + bias
    scales.divide_rows(weight, qkv, rows, scale)
    after = x @ weight.T + qkv.bias
    assert torch.allclose(after[:, rows], before[:, rows] / scale, atol=1e-5)
    assert torch.equal(after[:, :128], before[:, :128])
