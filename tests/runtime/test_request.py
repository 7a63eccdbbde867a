import pytest

from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Chunk, Request, Step, check_token_ids


def request(**fields):
    params = fields.pop("params", SamplingParams(max_tokens=4))
    return Request("r", [5, 6, 7], params, **({"limit": 4} | fields))


def test_tokens_of_prompt_and_output():
    (s,) = request().sequences
    s.output = [8, 9]
    assert s.tokens(0, 2) == [5, 6] and s.tokens(1, 5) == [6, 7, 8, 9]
    assert s.tokens(3, 4) == [8] and s.tokens(2, 2) == []


def test_pending_tokens_count():
    (s,) = request().sequences
    s.pending = 1
    assert (s.length, s.drawn) == (4, 1)
    s.append(8)
    assert (s.length, s.drawn, s.output, s.pending) == (4, 1, [8], 0)
    assert not s.finished


def test_the_limit_ends_a_sequence():
    r = request(limit=2)
    (s,) = r.sequences
    for token in (1, 2):
        assert not r.finished
        s.append(token)
    assert s.finish_reason == "length" and r.finished


@pytest.mark.parametrize("token", [2, 3])
def test_end_tokens(token):
    params = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=[3])
    (s,) = request(params=params, ends=frozenset([2, 3])).sequences
    s.append(token)  # before min_tokens it would not have been drawn
    assert not s.finished
    s.append(token)
    assert s.finish_reason == "stop" and s.stop_reason == (3 if token == 3 else None)


def test_every_sequence_has_a_seed_of_its_own():
    r = request(params=SamplingParams(n=4), seed=2**63 - 1)
    seeds = [s.seed for s in r.sequences]
    assert seeds[0] == 2**63 - 1 and len(set(seeds)) == 4
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_plain_requests_change_no_logits():
    assert request().plain
    assert not request(bad_words=((3,),)).plain
    assert not request(params=SamplingParams(logit_bias={1: 1.0})).plain
    assert not request(params=SamplingParams(min_tokens=1)).plain


def test_only_longer_bad_words_look_back():
    assert not request(bad_words=((3,),)).looks_back
    assert request(bad_words=((3,), (3, 4))).looks_back


def test_tokens_of_a_step():
    (s,) = request().sequences
    assert Step([Chunk(s, 0, 2, False), Chunk(s, 0, 5, True)], [], []).tokens == 7


@pytest.mark.parametrize(
    ("ids", "words"), [([], "at least one"), ([0, 9], "got 9"), ([-1], "got -1")]
)
def test_token_ids_are_checked(ids, words):
    with pytest.raises(ValueError, match=f"ids must hold .*{words}"):
        check_token_ids("ids", ids, 9)
