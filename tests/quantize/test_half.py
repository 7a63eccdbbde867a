import pytest
import torch
import torch.nn.functional as F

from tests.quantize.tiny import data, decoder
from tlk.models.batch import KVCache
from tlk.quantize.half import Attending, halves, reading


def prepared(model_type="llama", length=20, **fields):
    made, _ = decoder(model_type, **fields)
    for rope in made.ropes:
        rope.prepare(length)
    return made


def whole(layer, x, length):
    """The layer on one sequence after the other."""
    one = Attending(length, torch.device("cpu"))
    return torch.cat([layer(p, one.batch(p, 1), one.kv(layer, p, 1)) for p in x.split(length)])


@pytest.mark.parametrize("length", [20, 16, 1])
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("llama", {}), ("qwen3", {}), ("nemotron", {}), ("mistral", {"sliding_window": 5})],
)
def test_halves_make_the_layer(model_type, fields, length):
    made = prepared(model_type, length, **fields)
    x = torch.randn(3 * length, 64)
    for layer in made.layers:
        attending = Attending(length, torch.device("cpu"))
        y = x
        for half in halves(layer, attending):
            y = half.run(y, 3)
        assert torch.allclose(y, whole(layer, x, length), atol=1e-5)


def test_inner_is_what_the_second_layer_reads():
    layer = prepared().layers[0]
    x = torch.randn(40, 64)
    for half in halves(layer, Attending(20, torch.device("cpu"))):
        y = half.inner(x, 2)
        assert y.shape == (40, half.second.in_features)
        again = F.linear(y, half.second.weight) + x
        assert torch.allclose(again, half.run(x, 2), atol=1e-5)


@pytest.mark.parametrize(("model_type", "kv_heads"), [("llama", 4), ("llama", 2), ("nemotron", 4)])
def test_rows_that_absorb_a_scale(model_type, kv_heads):
    """Divided by s, they change what the second layer reads into itself divided by s."""
    layer = prepared(model_type, num_key_value_heads=kv_heads).layers[0]
    attention, mlp = halves(layer, Attending(20, torch.device("cpu")))
    assert (attention.absorbs is None) == (kv_heads != 4)
    assert (mlp.absorbs is None) == (model_type == "nemotron")
    x = torch.randn(40, 64)
    for half in (attention, mlp):
        if half.absorbs is None:
            continue
        scale, before = torch.rand(half.second.in_features) + 0.5, half.inner(x, 2)
        half.first.weight[half.absorbs] /= scale[:, None]
        assert torch.allclose(half.inner(x, 2), before / scale, atol=1e-5)


def test_names_are_those_in_the_layer():
    layer = prepared().layers[0]
    for half in halves(layer, Attending(20, torch.device("cpu"))):
        first, second = half.names
        assert layer.get_submodule(first) is half.first
        assert layer.get_submodule(second) is half.second


def test_reading_ends_with_its_block():
    half = halves(prepared().layers[0], Attending(20, torch.device("cpu")))[1]
    format, seen = half.second.format, []
    with pytest.raises(KeyError), reading(half.second, seen.append):
        assert half.run(torch.ones(2, 64), 1).tolist() == torch.ones(2, 64).tolist()
        raise KeyError
    assert half.second.format is format and [t.shape for t in seen] == [(2, 96)]


def test_the_cache_is_made_once_and_holds_zeros_beside_the_tokens(monkeypatch):
    made, calls = prepared(), []
    allocate = KVCache.allocate
    monkeypatch.setattr(KVCache, "allocate", lambda *a: calls.append(a) or allocate(*a))
    attending, x = Attending(20, torch.device("cpu")), made.embedding(data().ids.flatten())
    for layer in made.layers:
        halves(layer, attending)[0].run(x, 6)
        halves(layer, attending)[0].run(x[:40], 2)
    assert len(calls) == 2
    pages = attending.last.k.unflatten(0, (2, 2))  # two of 16 for a sequence of 20
    assert not pages[:, 1, :, 4:].any() and pages[:, 1, :, :4].all() and pages[:, 0].all()
