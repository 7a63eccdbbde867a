"""Every family through the engine: windows, several cache groups, and torch.compile of the decoder."""

import pytest
import torch

from tests.models.zoo import decoder_of, tiny
from tests.runtime.demo import DEVICE
from tlk.models.batch import group_specs
from tlk.models.families import FAMILIES
from tlk.runtime.engine import Engine
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams

FIELDS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "nemotron": {"partial_rotary_factor": 0.5},
}
PROMPTS = [list(range(3, 3 + n)) for n in (1, 7, 20, 12, 20)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def serve(model, **options):
    """What an engine gives for each prompt, and its statistics at the end and at their worst."""
    small = {
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "page_size": 4, "kv_cache_memory": 1 << 20,
    }  # fmt: skip
    engine = Engine(decoder_of(model).to(DEVICE), EngineOptions(**(small | options)))
    requests = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats()["pages_used"])
    return [r.sequences[0].output for r in requests], engine.stats(), most


@torch.no_grad()
def expected(model):
    model.generation_config.eos_token_id = None
    outputs = [
        model.generate(torch.tensor([p]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        for p in PROMPTS
    ]
    return [out[0, len(p) :].tolist() for out, p in zip(outputs, PROMPTS, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    model = tiny(family, **FIELDS[family])
    outputs, stats, _ = serve(model)
    assert outputs == expected(model)
    assert stats["pages_used"] == 0


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_give_pages_back_and_survive_preemption(family):
    model = tiny(family, **FIELDS[family])
    groups = len(group_specs(decoder_of(model).cache_specs(torch.float32))[0])
    assert groups == (1 if family == "mistral" else 2)
    _, _, roomy = serve(tiny(family), max_num_seqs=1)  # without windows
    _, _, windowed = serve(model, max_num_seqs=1)
    assert windowed < roomy * groups
    layer = sum(s.page_bytes() for s in decoder_of(model).cache_specs(torch.float32, 4))
    outputs, stats, _ = serve(model, kv_cache_memory=11 * layer, max_model_len=40)
    assert outputs == expected(model)
    assert stats["preemptions"] > 0 or family == "mistral"


def test_the_decoder_is_one_graph_for_torch_compile(monkeypatch):
    """The engine compiles it with fullgraph=True; the backend is left out here to save time."""
    compiled = []
    compile = torch.compile

    def eager_backend(model, **options):
        compiled.append(options)
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager_backend)
    torch.compiler.reset()
    model = tiny("qwen2", **FIELDS["qwen2"])
    outputs, _, _ = serve(model, compile=True)
    assert compiled == [{"fullgraph": True}]
    assert outputs == expected(model)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU it takes half a minute")
def test_compiled_decoders_give_the_same_tokens():
    torch._dynamo.reset()  # all decoders share the code whose compilations torch counts
    model = tiny("llama")
    outputs, stats, _ = serve(model, compile=True)
    assert outputs == expected(model) and stats["graph_replays"] > 0
