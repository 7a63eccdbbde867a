"""The draw of a mixed batch against transformers' processors and plain torch, row by row."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.interpreter import interpret
from tests.runtime.demo import DEVICE
from tlk.kernels import count_ops
from tlk.runtime.inputs import Inputs
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Chunk, Request
from tlk.runtime.sampler import Sampler

V, PLACE = 50, torch.device(DEVICE)
GREEDY = {"temperature": 0.0}


class Rows:
    """Sequences in state rows of their own, all at their next draw."""

    def __init__(self, *settings, prompt=(3, 4, 4), output=(), ends=(), bad_words=()):
        self.sampler, self.inputs = Sampler(V, 8, PLACE), Inputs(8, 8, PLACE)
        self.chunks = []
        for i, fields in enumerate(settings):
            params = SamplingParams(**fields)
            request = Request(
                str(i), list(prompt), params, limit=99, ends=frozenset(ends), bad_words=bad_words,
                seed=params.seed or 0,
            )  # fmt: skip
            (sequence,) = request.sequences
            sequence.output, sequence.row, sequence.pending = list(output), 7 - i, 1
            self.sampler.admit(sequence)
            self.chunks.append(Chunk(sequence, sequence.length - 2, 1, True))

    def draw(self, logits):
        self.sampler.stage(self.chunks, self.inputs)
        self.inputs.send(0)
        return self.sampler.draw(logits.to(PLACE), self.chunks, self.inputs)

    def advance(self, tokens):
        for chunk, token in zip(self.chunks, tokens, strict=True):
            chunk.sequence.append(token)
            chunk.sequence.pending = 1
            chunk.start += 1


def logits(rows, seed=0):
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def test_greedy_rows_take_the_likeliest_and_the_device_keeps_it():
    rows, x = Rows(GREEDY, GREEDY), logits(2)
    drawn = rows.draw(x)
    assert drawn.tokens.tolist() == x.argmax(-1).tolist() and drawn.logprobs is None
    assert rows.sampler.tokens[[7, 6]].tolist() == x.argmax(-1).tolist()


def ops(counts):
    return {name.partition("[")[0]: count for name, count in counts.items()}


def test_each_kind_of_batch_is_drawn_by_one_op_and_kept():
    x = logits(3)
    x[1, 30], x[2] = float("nan"), float("-inf")
    for settings, name in (([GREEDY] * 3, "likeliest_"), ([GREEDY, GREEDY, {"seed": 1}], "sample")):
        rows = Rows(*settings)
        with count_ops() as counts:
            tokens = rows.draw(x).tokens.tolist()
        assert ops(counts) == {name: 1}
        assert tokens[:2] == x.nan_to_num(-1.0).argmax(-1)[:2].tolist() and tokens[2] == 0
        assert rows.sampler.tokens.tolist() == [0] * 5 + tokens[::-1]


@pytest.mark.skipif(DEVICE == "cuda", reason="there the other tests run the kernel")
def test_greedy_rows_through_the_kernel():
    x = logits(3).to(torch.bfloat16)
    rows = Rows(GREEDY | {"presence_penalty": 1.0}, GREEDY, GREEDY)
    plain = Rows(GREEDY, GREEDY)
    with interpret():
        tokens, own = rows.draw(x).tokens.tolist(), plain.draw(x[:2]).tokens.tolist()
    assert tokens == x.float().argmax(-1).tolist() == rows.sampler.tokens[[7, 6, 5]].tolist()
    assert own == tokens[:2] == plain.sampler.tokens[[7, 6]].tolist()


def test_the_rehearsal_draws_in_both_ways_from_both_dtypes():
    rows = Rows(GREEDY, GREEDY)
    with count_ops() as counts:
        rows.sampler.rehearse(logits(2).to(PLACE, torch.bfloat16), rows.inputs)
    assert ops(counts) == {"sample": 2, "likeliest_": 2}


def test_ties_go_to_the_lower_token_in_greedy_and_mixed_batches():
    x = torch.zeros(2, V)
    x[:, [9, 30]] = 1.0
    assert Rows(GREEDY, GREEDY).draw(x).tokens.tolist() == [9, 9]
    assert Rows(GREEDY, {"top_k": 1, "seed": 2}).draw(x).tokens[0] == 9


@pytest.mark.parametrize(
    ("fields", "processors"),
    [
        ({"temperature": 0.7, "top_k": 4}, [TemperatureLogitsWarper(0.7), TopKLogitsWarper(4)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"repetition_penalty": 2.5, "top_k": 3},
         [RepetitionPenaltyLogitsProcessor(2.5), TopKLogitsWarper(3)]),
    ],
)  # fmt: skip
def test_draws_have_the_distribution_of_transformers(fields, processors):
    """Draws of 2000 seeds: nothing that the processors rule out, and frequencies within 5 sigma."""
    x, count = logits(1), 2000
    scores = x.clone()
    for processor in processors:
        scores = processor(torch.tensor([[3, 4, 4, 7]]), scores)
    expected = scores.softmax(-1)[0]
    rows = Rows(fields, output=[7])
    found = torch.zeros(V)
    for seed in range(count):
        rows.sampler.admit(rows.chunks[0].sequence)  # forget what was drawn before
        rows.sampler._host["seeds"][7] = seed
        found[rows.draw(x).tokens.cpu()] += 1
    assert not found[expected == 0].any()
    sigma = (count * expected * (1 - expected)).sqrt()
    assert ((found - count * expected).abs() <= 5 * sigma + 1e-3).all()


def test_a_row_draws_the_same_in_any_batch():
    settings = [
        {"seed": 5, "top_p": 0.9},
        {"seed": 6, "frequency_penalty": 1.0},
        GREEDY,
        {"seed": 7},
    ]
    x = logits(4)
    together = Rows(*settings).draw(x).tokens.tolist()
    for i, fields in enumerate(settings):
        assert Rows(fields).draw(x[i : i + 1]).tokens.tolist() == [together[i]]


def test_penalties_count_what_was_drawn():
    x = torch.zeros(1, V)
    x[0, :3] = torch.tensor([3.0, 2.5, 2.2])
    rows = Rows(GREEDY | {"frequency_penalty": 1.0}, prompt=[0])
    drawn = []
    for _ in range(4):
        tokens = rows.draw(x).tokens.tolist()
        rows.advance(tokens)
        drawn += tokens
    assert drawn == [0, 1, 2, 0]


def test_a_resumed_sequence_keeps_its_counts():
    x = torch.zeros(1, V)
    x[0, :2] = torch.tensor([3.0, 2.5])
    fields = GREEDY | {"presence_penalty": 1.0}
    assert Rows(fields, prompt=[0]).draw(x).tokens.tolist() == [0]  # the prompt does not count
    assert Rows(fields, prompt=[9], output=[0]).draw(x).tokens.tolist() == [1]


def test_biases_bans_and_allowed_tokens():
    x = torch.zeros(3, V)
    x[:, 8], x[:, 9] = 5.0, 4.0
    settings = [
        GREEDY | {"logit_bias": {30: 6.0}},
        GREEDY | {"allowed_token_ids": [9, 11]},
        GREEDY | {"logit_bias": {8: -100.0}},
    ]
    assert Rows(*settings).draw(x).tokens.tolist() == [30, 9, 9]


def test_ends_are_ruled_out_until_min_tokens_are_there():
    x = torch.zeros(1, V)
    x[0, 8], x[0, 9] = 5.0, 4.0
    fields = GREEDY | {"min_tokens": 2}
    for output, expected in (([], 9), ([1], 9), ([1, 1], 8)):
        assert Rows(fields, output=output, ends=[8]).draw(x).tokens.tolist() == [expected]


def test_bad_words_end_where_they_would_be_complete():
    x = torch.zeros(1, V)
    x[0, 8], x[0, 9] = 5.0, 4.0
    for word, output, expected in (
        ((8,), [], 9), ((2, 8), [1], 8), ((2, 8), [2], 9), ((4, 8), [], 9), ((4, 2, 8), [2], 9),
        ((3, 2, 8), [2], 8), ((1, 1, 1, 1, 1, 1, 8), [1], 8),
    ):  # fmt: skip
        rows = Rows(GREEDY, output=output, bad_words=(word,))
        assert rows.draw(x).tokens.tolist() == [expected], word


def test_logprobs_are_taken_before_everything_else():
    x = logits(2).to(torch.bfloat16)
    rows = Rows(GREEDY | {"logit_bias": {5: 100.0}, "logprobs": 3}, GREEDY)
    drawn = rows.draw(x)
    assert drawn.tokens[0] == 5 and drawn.logprobs is not None
    own, ids, values = drawn.logprobs
    expected = x.float().log_softmax(-1)
    assert torch.allclose(own[0].cpu(), expected[0, 5], atol=1e-5)
    top = expected[0].sort(descending=True, stable=True)
    assert torch.allclose(values[0].cpu(), top.values[:3], atol=1e-5)
    assert set(ids[0].tolist()) == set(top.indices[:3].tolist())
