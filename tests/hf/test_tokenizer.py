import pytest
from transformers import AutoTokenizer

from tlk.demo.generate import EMBEDDED
from tlk.errors import UnsupportedError
from tlk.hf.tokenizer import chat_ids, prompt_ids

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ok"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.mark.parametrize("messages", [MESSAGES, tuple(MESSAGES)])
def test_a_conversation_ends_where_the_answer_begins(tokenizer, messages):
    tokenizer.chat_template = TEMPLATE
    ids = chat_ids(tokenizer, messages)
    assert type(ids) is list and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == "<user>hé\n<assistant>ok\n<assistant>"


def test_without_a_template(tokenizer):
    with pytest.raises(UnsupportedError, match=r"tokenizer of .*model has no chat template"):
        chat_ids(tokenizer, MESSAGES)


@pytest.mark.parametrize("messages", ["hello", [], None, ["hello"], [{"content": "x"}]])
def test_bad_messages(tokenizer, messages):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="messages"):
        chat_ids(tokenizer, messages)


def test_messages_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="template refuses these messages: no system"):
        chat_ids(tokenizer, [{"role": "system", "content": "x"}])


def test_prompts(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "def f():")) == "def f():"
    for prompt in ("", None, ["x"]):
        with pytest.raises(ValueError, match="prompt must be a text"):
            prompt_ids(tokenizer, prompt)
