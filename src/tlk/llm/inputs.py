"""What a user may give as prompts and parameters, made uniform; nothing here touches the engine."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from tlk.errors import CapacityError, UnsupportedError
from tlk.hf.tokenizer import chat_ids, prompt_ids
from tlk.runtime.params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
REFUSALS = (CapacityError, UnsupportedError, TypeError, ValueError)
"""What refuses one prompt and leaves others and the engine as they are."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request before it has an id: token ids, their text if that is what came, and parameters."""

    text: str | None
    ids: list[int]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """The tokenizer of a model, or None and the reason why there is none."""

    tokenizer: Any | None
    missing: str = ""

    def needed(self, what: str) -> Any:
        """The tokenizer; UnsupportedError saying what needs it, and how to give it, if there is none."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{what} needs a tokenizer: {self.missing}; pass tokenizer=")
        return self.tokenizer

    def prepare(self, prompt: Prompt, params: SamplingParams, default: SamplingParams) -> Prepared:
        """Tokenize one prompt and its bad words.

        Without a tokenizer the `default` parameters give token ids only; others must ask for that.
        """
        text, ids = self._ids_of(prompt)
        if self.tokenizer is None and params.detokenize:
            if params is not default:
                self.needed("text output (detokenize=True)")
            params = replace(params, detokenize=False)
        words: tuple[tuple[int, ...], ...] = ()
        if params.bad_words:
            words = bad_word_ids(self.needed("bad_words"), params.bad_words)
        return Prepared(text, ids, params, words)

    def conversation(self, messages: Sequence[Message]) -> dict[str, Any]:
        """A conversation through the chat template, as a prompt of token ids."""
        return {"prompt_token_ids": chat_ids(self.needed("chat"), messages)}

    def _ids_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, prompt_ids(self.needed("a prompt of text"), prompt)
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids"}
            if not prompt or set(prompt) - known:
                raise ValueError(
                    f"prompt must have the keys prompt_token_ids or prompt, got {sorted(prompt)}"
                )
            text = prompt.get("prompt")
            if "prompt_token_ids" not in prompt:
                return self._ids_of(_expect_text(text))
            return text, _expect_ids(prompt["prompt_token_ids"])
        return None, _expect_ids(prompt)


def which(index: int, count: int, error: Exception) -> Exception:
    """`error` saying which of `count` prompts it is about."""
    if count == 1:
        return error
    kind = next(kind for kind in REFUSALS if isinstance(error, kind))
    return kind(f"prompts[{index}]: {error}")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether it was one prompt: a text, a list of ids or a dict."""
    if isinstance(prompts, str | Mapping):
        return [prompts], True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(
            f"prompts must be texts, lists of token ids or dicts, got {type(prompts).__name__}"
        )
    if prompts and all(_is_id(p) for p in prompts):
        return [cast(Sequence[int], prompts)], True
    return list(cast(Sequence[Prompt], prompts)), False


def as_conversations(messages: Sequence[Any]) -> list[Sequence[Message]]:
    """A conversation (a list of dicts) or a list of conversations, as a list of conversations."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r}")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
) -> list[SamplingParams]:
    """Parameters for each of `count` prompts; None: the model's `default`."""
    if params is None or isinstance(params, SamplingParams):
        return [default if params is None else params] * count
    if not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one, or one for each of {count} prompts, got {len(params)}"
        )
    for i, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise TypeError(
                f"sampling_params[{i}] must be SamplingParams, got {type(one).__name__}"
            )
    return list(params)


def bad_word_ids(tokenizer: Any, words: Collection[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that write `words`: at the start of a text, and after a space.

    They are the tokenizer's own spellings; a word put together of other tokens is not caught.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        plain = _word_ids(tokenizer, bare) if bare else ()
        spaced = _word_ids(tokenizer, f" {bare}")
        if plain:
            found[plain] = None
        if not plain or spaced[-len(plain) :] != plain:  # else whatever bans `plain` bans both
            found[spaced] = None
    return tuple(found)


def _word_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(int(i) for i in tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"bad_words must be words that have tokens, got {text!r}")
    return ids


def _expect_text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"prompt must be a text, got {type(text).__name__}")
    return text


def _expect_ids(ids: Any) -> list[int]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise TypeError(f"prompt must be a text or token ids, got {type(ids).__name__}")
    for i in ids:
        if not _is_id(i):
            raise TypeError(f"prompt_token_ids must be whole numbers, got {i!r}")
    return list(ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
