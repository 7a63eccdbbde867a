import pytest
import torch

from tlk.demo import generate
from tlk.demo.generate import encode, load, pick_dtype, stream
from tlk.errors import CapacityError, CheckpointError


def test_it_prints_the_prompt_and_what_follows(tiny, capsys):
    text = stream(tiny, "def read(", max_new_tokens=5, device="cpu")
    assert text and capsys.readouterr().out == f"def read({text}\n"


def test_greedy_text_is_transformers_own(tiny):
    model, tokenizer = load(tiny, "float32", "cpu")
    ids = encode(model, tokenizer, "import json", 12)
    want = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    got = stream(tiny, "import json", max_new_tokens=12, device="cpu")
    assert got == tokenizer.decode(want, skip_special_tokens=True)


def test_a_seed_draws_the_same_text_again(tiny):
    def draw(seed, **options):
        return stream(tiny, "x", max_new_tokens=12, temperature=1.0, seed=seed, **options)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1)
    assert draw(1, top_p=1e-6) == draw(2, top_p=1e-6) == stream(tiny, "x", max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": -2}, "top_k must be at least 0, got -2"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": ""}, "prompt must hold at least one character"),
        ({"dtype": "int8"}, "dtype must be auto, float32, float16, bfloat16, got int8"),
    ],
)
def test_bad_arguments_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        stream(tiny, **{"prompt": "x", "device": "cpu"} | options)


def test_more_tokens_than_positions_are_refused(tiny):
    with pytest.raises(CapacityError, match=r"has 1 tokens and 2048 more .* limit is 2048 in all"):
        stream(tiny, "x", max_new_tokens=2048, device="cpu")
    with pytest.raises(CapacityError, match=r"has \d{4} tokens"):
        stream(tiny, "x y " * 2000, max_new_tokens=1, device="cpu")


def test_the_last_position_can_be_used(tiny):
    model, tokenizer = load(tiny, "float32", "cpu")
    assert encode(model, tokenizer, "x", 2047).shape == (1, 1)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match="/no/such/model is no folder"):
        stream("/no/such/model", "x")


def test_dtype_follows_the_device():
    assert pick_dtype("auto", "cpu") == torch.float32
    assert pick_dtype("auto", "cuda") == torch.bfloat16
    assert pick_dtype("float16", "cpu") == torch.float16


def test_the_embedded_model_lies_in_the_package():
    assert generate.EMBEDDED.parent.name == "demo" and generate.EMBEDDED.name == "model"
