import math
from types import SimpleNamespace

import pytest
import torch

from tlk.demo import corpus
from tlk.demo.corpus import held_out_bits_per_byte, texts
from tlk.errors import UnsupportedError


class Bytes:
    """One token per byte; 256 starts a text."""

    bos_token_id, eos_token_id = None, 256

    def __call__(self, text, **kwargs):
        return {"input_ids": list(text.encode())}


class Model:
    """Gives every token the same logits, and remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def __call__(self, input_ids, use_cache):
        self.calls.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 257))


def test_training_never_sees_held_out_text():
    training, held_out = texts(corpus.TRAINING), texts(corpus.HELD_OUT)
    assert len(held_out) == len(corpus.HELD_OUT) == 12
    assert not set(training) & set(held_out)
    assert not set(training.values()) & set(held_out.values())
    assert sum(map(len, training.values())) > 5e6 and sum(map(len, held_out.values())) > 3e5


def test_packages_are_read_whole_in_order_and_without_their_tests():
    paths = list(texts(["queue", "json"]))
    assert (
        paths
        == [
            "queue.py",
            "json/__init__.py",
            "json/decoder.py",
            "json/encoder.py",
            "json/scanner.py",
            "json/tool.py",
        ]
        or "json/__main__.py" in paths
    )
    assert not any("test" in path.split("/") for path in texts(["unittest"]))


def test_a_module_without_source_is_named():
    with pytest.raises(UnsupportedError, match="no source of its module nothing_of_this_name"):
        texts(["nothing_of_this_name"])


def test_uniform_guesses_cost_eight_bits_and_a_little():
    bits = held_out_bits_per_byte(Model(torch.zeros(257)), Bytes(), bytes_per_module=1000)
    assert bits == pytest.approx(math.log2(257), rel=1e-5)


@pytest.mark.parametrize(("window", "stride", "batch"), [(7, 3, 2), (8, 8, 5), (64, 1, 16)])
def test_every_byte_is_scored_once_whatever_the_windows(window, stride, batch):
    torch.manual_seed(1)
    logits = torch.randn(257)
    want = [
        -logits.log_softmax(-1)[byte].item()
        for text in texts(corpus.HELD_OUT).values()
        for byte in text.encode()[:100]
    ]
    got = held_out_bits_per_byte(
        Model(logits), Bytes(), window=window, stride=stride, batch=batch, bytes_per_module=100
    )
    assert got == pytest.approx(sum(want) / math.log(2) / len(want), rel=1e-5)


def test_each_row_starts_a_stride_after_the_one_before():
    model = Model(torch.zeros(257))
    held_out_bits_per_byte(model, Bytes(), window=8, stride=4, batch=100, bytes_per_module=18)
    rows = torch.cat(model.calls).tolist()
    text = [256, *next(iter(texts(corpus.HELD_OUT).values())).encode()[:18]]
    assert rows[:4] == [text[0:8], text[4:12], text[8:16], [*text[12:19], 256]]


def test_stride_beyond_the_window_would_skip_text():
    with pytest.raises(ValueError, match=r"stride must be in 1\.\.window \(8\), got 9"):
        held_out_bits_per_byte(Model(torch.zeros(257)), Bytes(), window=8, stride=9)
