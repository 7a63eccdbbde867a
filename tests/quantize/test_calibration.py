import json

import pytest
import torch

from tlk.quantize.calibration import read_calibration


def encode(text):
    return [ord(c) % 64 for c in text]


def ids(data, **options):
    return read_calibration(data, encode, vocab_size=64, **options)


def test_texts_are_joined_and_cut():
    found = ids(["abc", "defgh", "ij"], length=4)
    assert found.ids.tolist() == [encode("abcd"), encode("efgh")]
    assert found.tokens == 8 and found.description == "2 × 4 tokens of the texts given"


def test_no_more_is_read_than_is_needed():
    def texts():
        yield "abcdefgh"
        raise AssertionError

    assert ids(texts(), samples=2, length=4).ids.shape == (2, 4)


def test_a_file_of_lines(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abcd", "id": 1}\n\n"efgh"\n' + json.dumps({"text": "é"}) + "\n")
    found = ids(str(file), length=4)
    assert found.ids.tolist() == [encode("abcd"), encode("efgh")]
    assert found.description == f"2 × 4 tokens of {file}"
    assert torch.equal(ids(file, length=4).ids, found.ids)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.int(), lambda t: t.tolist(), tuple])
def test_ids(make):
    given = torch.arange(12).view(3, 4)
    found = ids(make(given) if make is not tuple else tuple(map(tuple, given.tolist())), samples=2)
    assert found.ids.dtype == torch.int64 and found.ids.tolist() == given[:2].tolist()
    assert found.description == "2 × 4 token ids"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least 8 tokens, one row, got 0 from the texts given"),
        (["", "abc"], "at least 8 tokens, one row, got 3 from the texts given"),
        ("nowhere/wikitext", "existing JSONL file, there is no nowhere/wikitext"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one token"),
        (torch.tensor([[1, 64]]), r"must be in 0\.\.63, got 1 to 64"),
        (torch.tensor([[-1, 6]]), r"must be in 0\.\.63, got -1 to 6"),
    ],
)
def test_too_little_or_wrong_data(data, message):
    with pytest.raises(ValueError, match=message):
        ids(data, length=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "must be texts, a file or ids, got int"),
        (["abc", 3], r"calibration\[1\] must be a string, got int"),
        (torch.zeros(2, 3), r"must be integers \[n, length\], got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), "must be integers"),
        ([[1, 2], [3]], "texts or token ids of one length"),
    ],
)
def test_other_things(data, message):
    with pytest.raises(TypeError, match=message):
        ids(data, length=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is neither a text"),
        ('{"a": 1}', "line 2 is nei"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(f'"ok"\n{line}\n')
    with pytest.raises(ValueError, match=message):
        ids(file, length=4)


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="there is no tokenizer for texts"):
        read_calibration(["abc"], None, vocab_size=64)
    with pytest.raises(ValueError, match="calibration samples must be at least 1, got 0"):
        ids(["abc"], samples=0)
