from types import SimpleNamespace

import pytest
import torch

from tlk.bench import peers
from tlk.bench.shapes import SHAPES
from tlk.errors import UnsupportedError

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10]]


@pytest.fixture(scope="module")
def model():
    return peers.random_model(SHAPES["tiny"], torch.float32, CPU, 0)


def test_the_same_seed_makes_the_same_model(model):
    again = peers.random_model(SHAPES["tiny"], torch.float32, CPU, 0)
    other = peers.random_model(SHAPES["tiny"], torch.float32, CPU, 1)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert model.config.eos_token_id is None and not model.training


def test_generate_draws_exactly_what_is_asked(model):
    taken = peers.generate(model, PROMPTS, 4, repeats=2)
    assert 0 < taken["min"] <= taken["median"] <= taken["max"]


def test_generate_goes_on_after_an_end_of_text(model):
    with torch.no_grad():
        first = model(torch.tensor(PROMPTS)).logits[:, -1].argmax(-1)
    model.generation_config.eos_token_id = first.tolist()
    try:
        assert peers.generate(model, PROMPTS, 4, repeats=1)["median"] > 0
    finally:
        model.generation_config.eos_token_id = None


def test_the_compiled_cache_needs_a_gpu(model):
    with pytest.raises(UnsupportedError, match="on a GPU only"):
        peers.generate(model, PROMPTS, 4, repeats=1, static=True)


class Batches:
    """A model whose generate_batch draws `counts` tokens."""

    def __init__(self, counts):
        self.counts, self.calls, self.device = counts, [], CPU
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.destroyed, self.attention = 0, None

    def generate_batch(self, inputs, generation_config, persistent_manager):
        assert persistent_manager and generation_config.do_sample is False
        assert generation_config.eos_token_id == -1
        self.calls.append(inputs)
        drawn = [SimpleNamespace(generated_tokens=[1] * n) for n in self.counts]
        return dict(enumerate(drawn))

    def destroy_cached_continuous_batching_manager(self):
        self.destroyed += 1

    def set_attn_implementation(self, name):
        self.attention = name


def test_generate_batch_is_warmed_up_checked_and_put_back():
    model = Batches([4, 4])
    assert peers.generate_batch(model, PROMPTS, 4)["median"] >= 0
    assert model.calls == [PROMPTS, PROMPTS]
    assert (model.destroyed, model.attention) == (1, "sdpa")


@pytest.mark.parametrize(
    ("counts", "message"), [([4], "finished 1 of 2"), ([4, 3], "4 tokens were wanted")]
)
def test_a_batch_that_stops_early_does_not_count(counts, message):
    model = Batches(counts)
    with pytest.raises(RuntimeError, match=message):
        peers.generate_batch(model, PROMPTS, 4)
    assert model.destroyed == 1


def test_a_peer_that_cannot_run_says_why():
    def fail():
        raise RuntimeError("no\n memory")

    figures = peers.compare({"a": lambda: {"x": 1}, "b": fail})
    assert figures == {"a": {"x": 1}, "b": {"failed": "RuntimeError: no memory"}}
