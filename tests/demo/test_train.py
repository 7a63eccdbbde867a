import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlk.demo import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "new"
    options = train.Options(minutes=5 / 60, batch=2, length=64)
    return out, train.train(out, options, names=["json", "string", "random"], quick=True)


def test_five_seconds_reduce_the_loss(trained):
    _, card = trained
    assert card["steps"] >= 5 and card["tokens_seen"] == card["steps"] * 128
    assert card["last_loss"] < card["first_loss"] - 0.2
    assert 1 < card["held_out_bits_per_byte"] < 8


def test_what_is_written_is_what_the_card_says(trained):
    out, card = trained
    assert json.loads((out / "card.json").read_text()) == card
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"
    assert sum(p.numel() for p in model.parameters()) == card["parameters"] == 1_967_872
    assert sum(f.stat().st_size for f in out.iterdir()) < 4_000_000


def test_every_matrix_is_a_multiple_of_128_on_both_sides():
    shapes = [p.shape for p in train.build(1920).parameters() if p.ndim == 2]
    assert len(shapes) == 3 * 7 + 1  # the output projection is the embedding
    assert all(n % 128 == 0 for shape in shapes for n in shape)


def test_the_tokenizer_gives_back_any_text(trained):
    out, card = trained
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n\treturn 'é漢\\x00'  # \x01 end\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 0 and len(tokenizer) <= card["options"]["vocab"]


def test_dropout_is_gone_after_training():
    model = train.build(256)
    hooks = train._add_dropout(model, 0.5)
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_options_come_from_the_command_line(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(train, "train", lambda out, options: seen.update(out=out, o=options) or {})
    assert train.main(["--out", str(tmp_path), "--minutes", "2", "--weight-decay", "0.3"]) == 0
    assert seen["out"] == tmp_path and seen["o"] == train.Options(minutes=2.0, weight_decay=0.3)
    assert capsys.readouterr().out == "{}\n"
