import math

import pytest

from tlk.runtime.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 257), ("max_tokens", 0), ("min_tokens", -1), ("temperature", -0.1),
        ("temperature", math.nan), ("temperature", math.inf), ("temperature", 101.0), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0), ("presence_penalty", 101.0), ("frequency_penalty", -101.0),
        ("seed", 2**63), ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21), ("stop", ""),
        ("stop", ["a", ""]), ("stop", ["x"] * 65), ("bad_words", [""]), ("stop_token_ids", [-1]),
        ("allowed_token_ids", []), ("allowed_token_ids", [-2]), ("logit_bias", {3: 101.0}),
        ("logit_bias", {-3: 1.0}), ("logit_bias", {3: math.nan}),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1.5), ("n", True), ("n", None), ("max_tokens", "9"), ("temperature", "hot"),
        ("temperature", None), ("top_k", 3.0), ("stop", 7), ("stop", [7]), ("stop", b"x"),
        ("stop_token_ids", 5), ("stop_token_ids", ["5"]), ("stop_token_ids", [True]),
        ("logit_bias", [3]), ("logit_bias", {"3": 1.0}), ("logit_bias", {3: "much"}),
        ("bad_words", [3]), ("ignore_eos", 1), ("detokenize", None), ("skip_special_tokens", "no"),
        ("logprobs", True),
    ],
)  # fmt: skip
def test_values_of_other_types_are_named(field, value):
    with pytest.raises(TypeError, match=f"{field} must"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens"),
        ({"n": 2, "temperature": 0.0}, "n must be 1 at temperature 0"),
        ({"stop": "x", "detokenize": False}, "stop must be empty with detokenize=False"),
    ],
)
def test_contradictions_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**fields)


def test_collections_become_what_they_mean():
    params = SamplingParams(stop="end", stop_token_ids=iter([4, 4, 2]), bad_words=["a", "b"])
    assert params.stop == ("end",) and params.stop_token_ids == (4, 2)
    assert params.bad_words == ("a", "b")
    assert SamplingParams(max_tokens=None, min_tokens=10**6).max_tokens is None


def test_bounds_themselves_are_fine():
    SamplingParams(
        n=256, temperature=0.0001, top_p=1.0, top_k=-1, min_p=1.0, logprobs=0, seed=-(2**63)
    )
    SamplingParams(temperature=0, top_k=0, presence_penalty=-2, frequency_penalty=2, logprobs=20)


def test_what_the_sampler_asks():
    assert SamplingParams(temperature=0.0).greedy and not SamplingParams().greedy
    assert not SamplingParams().penalizes
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{field: 1.5}).penalizes


def test_params_do_not_change():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2
