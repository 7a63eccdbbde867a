import pytest

from tests.llm.fake import Letters
from tlk.errors import CapacityError, CheckpointError, UnsupportedError
from tlk.llm.inputs import (
    Text,
    as_conversations,
    as_params,
    as_prompts,
    bad_word_ids,
    which,
)
from tlk.runtime.params import SamplingParams

DEFAULT = SamplingParams()
TEXT = Text(Letters())
NONE = Text(None, "the folder holds none")


@pytest.mark.parametrize(
    ("given", "prompts", "one"),
    [
        ("ab", ["ab"], True),
        ([1, 2], [[1, 2]], True),
        ((1, 2), [(1, 2)], True),
        ({"prompt_token_ids": [1]}, [{"prompt_token_ids": [1]}], True),
        (["ab", [1, 2]], ["ab", [1, 2]], False),
        ([[1, 2]], [[1, 2]], False),
        ([], [], False),
    ],
)
def test_prompts_become_a_list(given, prompts, one):
    assert as_prompts(given) == (prompts, one)


@pytest.mark.parametrize("given", [5, b"ab", None, {1, 2}])
def test_what_is_no_prompt(given):
    with pytest.raises(TypeError, match="prompts must be texts, lists of token ids or dicts"):
        as_prompts(given)


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("ab", "ab", [97, 98]),
        ([5, 6], None, [5, 6]),
        ({"prompt_token_ids": [5]}, None, [5]),
        ({"prompt": "ab"}, "ab", [97, 98]),
        ({"prompt": "ab", "prompt_token_ids": [5]}, "ab", [5]),
    ],
)
def test_a_prompt_becomes_ids(prompt, text, ids):
    prepared = TEXT.prepare(prompt, DEFAULT, DEFAULT)
    assert (prepared.text, prepared.ids) == (text, ids)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt must be a text of at least one character"),
        ([1, "a"], TypeError, "prompt_token_ids must be whole numbers, got 'a'"),
        ([1, True], TypeError, "got True"),
        (7, TypeError, "prompt must be a text or token ids, got int"),
        ({"prompt_token_ids": "ab"}, TypeError, "got str"),
        ({"prompt": 5}, TypeError, "prompt must be a text, got int"),
        ({"prompt_tokens": [5]}, ValueError, "keys prompt_token_ids or prompt, got .'prompt_tok"),
        ({}, ValueError, r"got \[\]"),
    ],
)
def test_bad_prompts(prompt, error, message):
    with pytest.raises(error, match=message):
        TEXT.prepare(prompt, DEFAULT, DEFAULT)


def test_without_a_tokenizer_ids_go_in_and_out_by_default_only():
    prepared = NONE.prepare([1], DEFAULT, DEFAULT)
    assert prepared.params.detokenize is False
    asked = SamplingParams(detokenize=False)
    assert NONE.prepare([1], asked, DEFAULT).params is asked
    with pytest.raises(UnsupportedError, match=r"text output .* the folder holds none; pass token"):
        NONE.prepare([1], SamplingParams(), DEFAULT)
    with pytest.raises(UnsupportedError, match="a prompt of text needs a tokenizer"):
        NONE.prepare("a", DEFAULT, DEFAULT)
    with pytest.raises(UnsupportedError, match="bad_words needs a tokenizer"):
        NONE.prepare([1], SamplingParams(detokenize=False, bad_words=["a"]), DEFAULT)
    with pytest.raises(UnsupportedError, match="chat needs a tokenizer"):
        NONE.conversation([{"role": "user", "content": "a"}])


class Spaced(Letters):
    """A leading space joins the letter behind it: " a" is one token."""

    def encode(self, text, add_special_tokens=True):
        if text.startswith(" ") and len(text) > 1:
            return [1000 + ord(text[1]), *map(ord, text[2:])]
        return super().encode(text)


def test_bad_words_with_and_without_a_space():
    assert bad_word_ids(Spaced(), ["ab", "c"]) == ((97, 98), (1097, 98), (99,), (1099,))
    assert bad_word_ids(Spaced(), [" ab", "ab"]) == ((97, 98), (1097, 98))
    assert bad_word_ids(Letters(), ["ab"]) == ((97, 98),)  # " ab" ends with it
    assert bad_word_ids(Letters(), [" "]) == ((32,),)
    prepared = TEXT.prepare("x", SamplingParams(bad_words=["ab"]), DEFAULT)
    assert prepared.bad_words == ((97, 98),)


def test_a_bad_word_without_tokens():
    class Empty(Letters):
        def encode(self, text, add_special_tokens=True):
            return []

    with pytest.raises(ValueError, match="bad_words must be words that have tokens, got 'ab'"):
        bad_word_ids(Empty(), ["ab"])


def test_one_conversation_or_many():
    one = [{"role": "user", "content": "a"}]
    assert as_conversations(one) == [one]
    assert as_conversations([one, one]) == [one, one]
    for bad in ([], "a", None):
        with pytest.raises(ValueError, match="messages must be a list"):
            as_conversations(bad)


def test_parameters_for_each_prompt():
    own = SamplingParams(max_tokens=3)
    assert as_params(None, 2, DEFAULT) == [DEFAULT, DEFAULT]
    assert as_params(own, 2, DEFAULT) == [own, own]
    assert as_params([own, DEFAULT], 2, DEFAULT) == [own, DEFAULT]
    with pytest.raises(ValueError, match="for each of 3 prompts, got 2"):
        as_params([own, own], 3, DEFAULT)
    with pytest.raises(TypeError, match=r"sampling_params\[1\] must be SamplingParams, got dict"):
        as_params([own, {}], 2, DEFAULT)
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams, got int"):
        as_params(5, 1, DEFAULT)


@pytest.mark.parametrize("kind", [ValueError, TypeError, UnsupportedError, CapacityError])
def test_an_error_says_which_prompt(kind):
    error = kind("too long")
    assert which(0, 1, error) is error
    told = which(3, 9, error)
    assert type(told) is kind and str(told) == "prompts[3]: too long"


def test_a_subclass_is_told_as_what_can_be_built():
    error = UnicodeEncodeError("ascii", "ä", 0, 1, "no")
    assert type(which(1, 2, error)) is ValueError
    assert type(which(1, 2, CheckpointError("x"))) is ValueError
