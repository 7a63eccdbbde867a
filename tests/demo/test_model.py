"""The embedded model: whole, small, and as good through tlk as through transformers."""

import json

import pytest
import torch

import tlk
from tlk.demo.compare import compare
from tlk.demo.corpus import held_out_bits_per_byte
from tlk.demo.generate import EMBEDDED, load


@pytest.fixture(scope="module")
def embedded():
    return load(str(EMBEDDED), "float32", "auto")


@pytest.fixture(scope="module")
def card():
    return json.loads((EMBEDDED / "card.json").read_text())


def test_it_is_what_its_card_says(embedded, card):
    model, tokenizer = embedded
    assert sum(p.numel() for p in model.parameters()) == card["parameters"] <= 2_000_000
    assert len(tokenizer) == model.config.vocab_size == card["options"]["vocab"]
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 4_000_000


def test_it_has_learnt_python(embedded, card):
    model, tokenizer = embedded
    assert card["held_out_bits_per_byte"] < 1.2  # xz -9e needs 1.73 for all of them at once
    # the first lines of a module are its hardest, and every Python has slightly different ones
    bits = held_out_bits_per_byte(model, tokenizer, bytes_per_module=3000)
    assert bits < 1.3 * card["held_out_bits_per_byte"]


def test_tlk_costs_no_quality(card):
    model, tokenizer = load(str(EMBEDDED), "float32", "auto")
    theirs = held_out_bits_per_byte(model, tokenizer, window=128, stride=64, bytes_per_module=400)
    tlk.optimize(model, strict=True)
    ours = held_out_bits_per_byte(model, tokenizer, window=128, stride=64, bytes_per_module=400)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_cost_next_to_no_quality(dtype):
    model, tokenizer = load(str(EMBEDDED), "float32", "auto")
    exact = held_out_bits_per_byte(model, tokenizer, window=128, stride=64, bytes_per_module=400)
    model = tlk.optimize(model.to(getattr(torch, dtype)), strict=True)
    bits = held_out_bits_per_byte(model, tokenizer, window=128, stride=64, bytes_per_module=400)
    assert bits == pytest.approx(exact, rel=0.01)


def test_the_demo_matches_transformers():
    result = compare(max_new_tokens=32)
    assert result.matched and not result.report.reasons
