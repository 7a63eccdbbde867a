"""Token ids of prompts and of conversations, with errors that say what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from tlk.errors import UnsupportedError


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of `prompt`, with the special tokens that the tokenizer puts around one.

    Raises ValueError if it is no text, or gives no token.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a text of at least one character, got {prompt!r}")
    ids = [int(i) for i in tokenizer(prompt, verbose=False)["input_ids"]]
    if not ids:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}, which gives none")
    return ids


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation up to where the assistant's answer begins.

    messages: [{"role": "user", "content": "…"}, …]. The template writes the special tokens itself.
    Raises ValueError if there are no messages, one is no dict with a role, or the template refuses
    them; UnsupportedError if the tokenizer comes without a chat template.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] must be a dict with a role, got {message!r}")
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise UnsupportedError(
            f"the tokenizer of {name} has no chat template: give a prompt, or set its chat_template"
        )
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=True, add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return [int(i) for i in encoded["input_ids"]]
