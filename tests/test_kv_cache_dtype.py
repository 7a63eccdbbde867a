"""Caches of 8 bits from the model to `LLM`: close to 16 bits, with scales, and never taken for another's."""

import copy
import pickle

import pytest
import torch
from transformers import AutoTokenizer

import tlk
from tests.models.zoo import STEPS, decoder_of, paged_logits, random_ids, relative_error, tiny
from tests.runtime.demo import DEVICE, decoder, drain
from tlk.demo.generate import EMBEDDED
from tlk.errors import UncalibratedWarning, UnsupportedError
from tlk.hf.cache import PagedCache
from tlk.models.batch import PagedKV
from tlk.models.decoder import set_kv_scales, twin
from tlk.runtime.engine import Engine
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
SMALL = {"max_num_seqs": 4, "kv_cache_memory": 1 << 22, "page_size": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TEXTS = ["Once upon a time there was a", "The little girl went to the park and saw"]
PROMPTS = [[40, 12, 77, 5, 10, 33, 8, 64, 3, 25, 17], [5, 10, 33], list(range(20, 55))]


def run(model, kv_cache_dtype="auto", prompts=PROMPTS):
    """An engine and the greedy tokens that it gives for each of `prompts`."""
    engine = Engine(model, EngineOptions(kv_cache_dtype=kv_cache_dtype, **SMALL))
    requests = [engine.add(prompt, GREEDY) for prompt in prompts]
    drain(engine)
    return engine, [r.sequences[0].output for r in requests]


def calibrated(model, name, prompts=PROMPTS):
    """A twin of `model` with scales for keys and values a quarter larger than those of `prompts`."""
    engine, _ = run(model, prompts=prompts)
    scales = {}
    for i, layer in enumerate(engine._runner.cache.layers):
        pages = [x.float().nan_to_num() for x in (layer.k, layer.v)]  # unwritten memory is NaN here
        scales[i] = tuple(1.25 * x.abs().amax((0, 2, 3)) / LARGEST[name] for x in pages)
    model = twin(model)
    set_kv_scales(model, scales)
    return model


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("name, error", [("fp8", 0.2), ("int8", 0.04)])
def test_logits_are_close(name, error, llama):
    model, ids = decoder_of(llama), random_ids(llama)
    expected = paged_logits(model, ids, STEPS)
    model = calibrated(model, name, [i.tolist() for i in ids])
    actual = paged_logits(model, ids, STEPS, kv_dtype=CODES[name], padding=3)
    assert 1e-4 < relative_error(actual, expected) < error


@pytest.mark.parametrize("name", CODES)
def test_tokens_are_close(name):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    _, expected = run(decoder(), prompts=prompts)
    engine, tokens = run(calibrated(decoder(), name, prompts), name, prompts)
    assert {layer.k.dtype for layer in engine._runner.cache.layers} == {CODES[name]}
    same = [
        a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(same) >= 0.8 * len(same)


def test_sequences_that_share_pages_copy_their_codes():
    model = calibrated(decoder(), "fp8")
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=5, ignore_eos=True)
    outputs = []
    for options in ({}, {"enable_prefix_caching": False, "max_num_batched_tokens": 8}):
        engine = Engine(
            model,
            EngineOptions(kv_cache_dtype="fp8", deterministic=True, **(SMALL | options)),
        )
        for _ in range(2):  # the second finds the first one's pages
            request = engine.add(PROMPTS[2], params)
            drain(engine)
        outputs.append([s.output for s in request.sequences])
    assert outputs[0] == outputs[1]


def test_the_prefix_hash_holds_dtype_and_scales():
    salts = [run(decoder())[0]._scheduler.salt]
    for name in CODES:
        model = calibrated(decoder(), name)
        salts.append(run(model, name)[0]._scheduler.salt)
        assert run(model, name)[0]._scheduler.salt == salts[-1]
        set_kv_scales(model, {0: (0.5, 0.25)})
        salts.append(run(model, name)[0]._scheduler.salt)
    assert len(set(salts)) == 5


def test_a_cache_without_scales_is_warned_of():
    model = twin(decoder())
    set_kv_scales(model, {0: (0.5, 0.5)})
    with pytest.warns(UncalibratedWarning, match="int8 cache .* in 2 of 3 layers, from layer 1 on"):
        scales = model.cache_scales(torch.int8)
    assert [pair[0][0].item() for pair in scales] == [0.5, 1.0, 1.0]
    assert model.cache_scales(torch.bfloat16) == [None] * 3


def test_scales_are_set_by_layer_and_head(llama):
    model = decoder_of(llama)
    set_kv_scales(model, {1: (torch.tensor([0.5, 2.0]), torch.tensor([[3.0]], dtype=torch.half))})
    assert model.layers[0].attention.kv_scales is None
    k, v = twin(model).layers[1].attention.kv_scales
    assert k.tolist() == [0.5, 2.0] and v.tolist() == [3.0, 3.0] and v.dtype == torch.float32


@pytest.mark.parametrize(
    "scales, message",
    [
        ({2: (1.0, 1.0)}, "scales must name layers below 2, got 2"),
        ({-1: (1.0, 1.0)}, "scales must name layers below 2, got -1"),
        ({0: (torch.ones(3), 1.0)}, "k_scale must be 1 number or 2, got 3"),
        ({0: (1.0, 0.0)}, "v_scale must be positive and finite"),
        ({0: (torch.tensor([1.0, torch.inf]), 1.0)}, "k_scale must be positive and finite"),
    ],
)
def test_bad_scales_are_refused(scales, message, llama):
    with pytest.raises(ValueError, match=message):
        set_kv_scales(decoder_of(llama), scales)


@pytest.mark.parametrize("name", CODES)
def test_the_cache_of_transformers_forward(name):
    """Rounded once when it is written, whatever is done to it; transformers sees numbers."""
    spec = PagedKV(kv_heads=2, k_dim=8, v_dim=4, dtype=CODES[name], page_size=4)
    scales = torch.tensor([0.03, 0.05]), torch.tensor([0.04, 0.06])
    cache = PagedCache([spec], torch.device("cpu"), [scales], torch.bfloat16)
    k, v = torch.randn(3, 2, 6, 8).bfloat16(), torch.randn(3, 2, 6, 4).bfloat16()
    for part in range(0, 6, 2):
        seen = cache.update(k[:, :, part : part + 2], v[:, :, part : part + 2], 0)
    for x, given, scale in zip(seen, (k, v), scales, strict=True):
        assert x.dtype == torch.bfloat16
        step = scale[:, None, None] / 2 if name == "int8" else given.abs() / 16 + 1e-4
        assert ((x.float() - given.float()).abs() <= step * 1.05 + 1e-2 * given.abs()).all()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.reserve(40)
    assert torch.equal(cache.layers[0].keys, seen[0][[2, 2, 0]])
    assert torch.equal(copy.deepcopy(cache).layers[0].values, seen[1][[2, 2, 0]])


@pytest.mark.parametrize("name", CODES)
def test_optimize(name):
    """forward and generate in 8 bits, by scales that survive what moves the weights."""
    model = tiny("llama").to(DEVICE)
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([PROMPTS[0], PROMPTS[2][:11]], device=DEVICE)
    expected = model(ids).logits
    model = tlk.optimize(model, kv_cache_dtype=name)
    own = calibrated(model._execution.binding.decoder, name)
    scales = {i: layer.attention.kv_scales for i, layer in enumerate(own.layers)}
    model._execution.set_kv_scales(scales)
    for each in (model, pickle.loads(pickle.dumps(model))):
        out = each(ids, use_cache=True)
        assert out.past_key_values.kv.layers[0].k.dtype == CODES[name]
        assert relative_error([out.logits], [expected]) < 0.1
        before = each(ids[:, :-1], use_cache=True).past_key_values
        step = each(ids[:, -1:], past_key_values=before).logits
        assert relative_error([step[:, -1]], [out.logits[:, -1]]) < 0.1
        assert each.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 15)
    assert tlk.optimize(model)(ids).past_key_values.kv.layers[0].k.dtype == torch.float32
    with pytest.raises(UnsupportedError, match="kv_cache_dtype 'fp4' has no kernel"):
        tlk.optimize(model, kv_cache_dtype="fp4")


def test_llm():
    with pytest.warns(UncalibratedWarning):
        llm = tlk.LLM(str(EMBEDDED), kv_cache_dtype="fp8", max_num_seqs=2, kv_cache_memory=1 << 22)
    plain = tlk.LLM(str(EMBEDDED), max_num_seqs=2, kv_cache_memory=1 << 22)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = [x.generate(["Once upon a time"], params)[0].outputs[0].text for x in (llm, plain)]
    assert texts[0][:8] == texts[1][:8]
