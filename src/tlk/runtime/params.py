"""What a request asks of the sampler, checked when it is made."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_N = 256
MAX_LOGPROBS = 20
MAX_STOPS = 64  # stop strings, and bad words
LIMITS = {  # field: least, most
    "n": (1, MAX_N),
    "min_tokens": (0, 2**31 - 1),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
OPTIONAL_LIMITS = {
    "max_tokens": (1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
EXCLUSIVE = ("top_p", "repetition_penalty")  # these must be above the least, not equal to it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are drawn, and when it ends.

    n: continuations of the prompt, each drawn on its own. max_tokens: the most tokens of one; None:
    as many as the context holds. min_tokens: no end of text and no stop before as many.
    temperature 0 takes the likeliest token. top_k -1 or 0, top_p 1 and min_p 0 keep all tokens.
    repetition_penalty divides the logits of tokens in the prompt or the output (1: none);
    presence_penalty and frequency_penalty are taken from those in the output, once or per occurrence.
    seed: the same request draws the same tokens; None: from the engine's seed.
    stop: strings that end the text, which is cut before them. stop_token_ids: tokens that end it.
    ignore_eos: go on after the model's end-of-text token.
    logprobs: report the log-probability of the drawn token and of this many likeliest ones, before
    penalties and temperature; prompt_logprobs: the same of every prompt token.
    logit_bias: token id to what is added to its logit. allowed_token_ids: all others are ruled out.
    bad_words: texts that do not appear. detokenize False: token ids only.
    skip_special_tokens: special tokens leave no text.

    Raises ValueError or TypeError naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Collection[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    bad_words: Collection[str] = ()
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in (LIMITS | OPTIONAL_LIMITS).items():
            value = getattr(self, name)
            if value is not None or name in LIMITS:
                _check_number(name, value, least, most)
        for name in ("ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids must name at least one token, got none")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, where all are equal, got {self.n}")
        if self.stop and not self.detokenize:
            raise ValueError("stop must be empty with detokenize=False: there is no text to search")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    whole = isinstance(least, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    low = value <= least if name in EXCLUSIVE else value < least
    if not math.isfinite(value) or low or value > most:
        above = "above" if name in EXCLUSIVE else "at least"
        raise ValueError(f"{name} must be {above} {least} and at most {most}, got {value}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if _many(value) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or strings, got {value!r}")
    if "" in texts:
        raise ValueError(f"{name} must hold no empty string, got {value!r}")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"{name} must hold at most {MAX_STOPS} strings, got {len(texts)}")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(value) if _many(value) else None
    if ids is None or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{name} must be token ids, got {value!r}")
    if any(i < 0 for i in ids):
        raise ValueError(f"{name} must not be negative, got {min(ids)}")
    return tuple(dict.fromkeys(ids))


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {value!r}")
    _ids("logit_bias", value)
    for bias in value.values():
        _check_number("logit_bias", bias, -100.0, 100.0)
    return dict(value)


def _many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)
