"""Steps as the runner stages and launches them, through the kernels and against one plain forward."""

import numpy as np
import pytest
import torch

from tests.runtime.demo import DEVICE, decoder
from tlk.models.batch import KVCache
from tlk.models.decoder import twin
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Chunk, Request, Step
from tlk.runtime.runner import Runner

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)


@pytest.fixture
def runner():
    options = EngineOptions(
        max_num_seqs=6, max_num_batched_tokens=40, page_size=4, enforce_eager=True
    )
    made = Runner(twin(decoder()), options)
    made.decoder.prepare(64)
    made.allocate([40], 64)
    return made


def sequence(prompt, row, first_page, params=GREEDY):
    """A sequence on pages of its own, `first_page` onwards, and the entries of its page table."""
    (made,) = Request(str(row), prompt, params, limit=9).sequences
    made.row = row
    made.pages = [list(range(first_page, first_page + 6))]
    return made, [(0, row, i, page) for i, page in enumerate(made.pages[0])]


def chunk(sequence, count):
    """The next `count` tokens of a sequence, as the scheduler would commit them."""
    start = sequence.computed
    sequence.computed += count
    samples = sequence.computed == sequence.length
    sequence.pending += samples
    return Chunk(sequence, start, count, samples)


@torch.no_grad()
def expected(tokens):
    """The likeliest token after `tokens`, by a forward over all of them."""
    model = twin(decoder())
    model.prepare(64)
    options = EngineOptions(
        max_num_seqs=1, max_num_batched_tokens=64, page_size=16, enforce_eager=True
    )
    plain = Runner(model, options)
    plain.allocate([4], 64)
    made, entries = sequence(list(tokens), 0, 0)
    entries = entries[:4]
    (result,) = plain.launch(Step([chunk(made, len(tokens))], entries, [])).read()
    return result.token


def test_chunks_and_draws_of_a_mixed_batch(runner):
    a, entries_a = sequence([5, 300, 7, 9, 1000, 2], 3, 20)
    b, entries_b = sequence([8, 15, 600], 1, 7)
    first = runner.launch(Step([chunk(a, 4), chunk(b, 3)], entries_a + entries_b, []))
    second = runner.launch(Step([chunk(a, 2), chunk(b, 1)], [], []))  # b's token is not read yet
    (of_b,) = first.read()
    b.append(of_b.token)
    assert of_b.chunk.sequence is b and of_b.token == expected(b.request.prompt)
    of_a, more_of_b = second.read()
    assert of_a.token == expected(a.request.prompt)
    assert more_of_b.token == expected([*b.request.prompt, of_b.token])


def test_a_step_in_which_nothing_is_drawn(runner):
    a, entries = sequence([5, 300, 7, 9], 0, 3)
    assert runner.launch(Step([chunk(a, 3)], entries, [])).read() == []
    (result,) = runner.launch(Step([chunk(a, 1)], [], [])).read()
    assert result.token == expected(a.request.prompt)


def test_pages_are_copied_before_the_step_writes(runner):
    a, entries = sequence([5, 300, 7, 9, 11], 0, 3)
    runner.launch(Step([chunk(a, 5)], entries, []))
    b, entries = sequence(a.request.prompt, 1, 30)
    b.pages[0][0], b.computed = 3, 4  # shares the full page, and a copy of the other
    step = Step([chunk(b, 1)], [(0, 1, 0, 3), (0, 1, 1, 31)], [(0, 4, 31)])
    before = runner.cache.layers[0].k[4].clone()
    (result,) = runner.launch(step).read()
    assert result.token == expected(a.request.prompt)
    assert torch.equal(runner.cache.layers[0].k[4, :, :1], before[:, :1])
    assert torch.allclose(runner.cache.layers[0].k[31, :, :1], before[:, :1], atol=1e-5)


def test_the_last_entry_for_a_place_in_a_table_counts(runner):
    step = Step([], [(0, 2, 1, 5), (0, 2, 1, 6), (0, 3, 0, 9)], [])
    runner._set_pages(step)
    assert runner.tables[0][2, 1] == 6 and runner.tables[0][3, 0] == 9


def test_copies_of_copies_read_before_they_write(runner):
    for layer in runner.cache.layers:
        for pool in (layer.k, layer.v):
            pool.copy_(torch.arange(len(pool), device=DEVICE)[:, None, None, None].expand_as(pool))
    runner._set_pages(Step([], [], [(0, 1, 2), (0, 2, 3)]))
    for layer in runner.cache.layers:
        for pool in (layer.k, layer.v):
            assert pool[2].unique().tolist() == [1] and pool[3].unique().tolist() == [2]


def test_a_row_gets_the_settings_of_its_new_owner(runner):
    hot, entries = sequence([5, 6], 2, 0, SamplingParams(temperature=1.5, seed=3, max_tokens=9))
    runner.launch(Step([chunk(hot, 2)], entries, []))
    assert runner.sampler._host["temperature"][2] == np.float32(1.5)
    cold, entries = sequence([5, 6], 2, 8)
    runner.launch(Step([chunk(cold, 2)], entries, []))
    assert runner.sampler._host["temperature"][2] == 0


def test_what_is_freed_is_gone(runner):
    assert isinstance(runner.cache, KVCache)
    runner.free()
    assert not hasattr(runner, "cache") and not hasattr(runner, "tables")
