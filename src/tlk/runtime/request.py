"""A request and its sequences: tokens, pages and progress, as the scheduler and the runner see them."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

from tlk.runtime.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Sequence:
    """One continuation of a request's prompt.

    output: tokens drawn and read back. pending: tokens drawn on the device, not read back yet; they
    count towards `length`. computed: tokens whose keys and values the launched steps put into pages.
    pages[g][i]: the page of cache group g that holds tokens i · page_size onwards, -1 once no query
    needs it. row: the runner's state row while the sequence runs, else -1.

    For the scheduler alone: keys[i] is that of full block i in the prefix cache, where the first
    `published` ones are; up to `room` tokens it may compute without a look at its pages.
    """

    __slots__ = (
        "computed", "finish_reason", "index", "keys", "output", "pages", "pending", "published", "request",
        "room", "row", "seed", "stop_reason",
    )  # fmt: skip

    def __init__(self, request: "Request", index: int, groups: int) -> None:
        self.request, self.index = request, index
        self.output: list[int] = []
        self.pending = 0
        self.computed = 0
        self.pages: list[list[int]] = [[] for _ in range(groups)]
        self.row = -1
        self.keys: list[bytes] = []
        self.published = self.room = 0
        self.seed = _wrapped(request.seed + index * 0x9E3779B97F4A7C15)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and output, those that are still on the device included."""
        return len(self.request.prompt) + len(self.output) + self.pending

    @property
    def drawn(self) -> int:
        """Tokens drawn so far, those that are still on the device included."""
        return len(self.output) + self.pending

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def tokens(self, start: int, stop: int) -> list[int]:
        """The known tokens at positions start ≤ i < stop of prompt and output."""
        prompt, n = self.request.prompt, len(self.request.prompt)
        if stop <= n:
            return prompt[start:stop]
        if start >= n:
            return self.output[start - n : stop - n]
        return prompt[start:] + self.output[: stop - n]

    def append(self, token: int) -> None:
        """Take a drawn token that was read back, and find whether it ends the sequence."""
        self.output.append(token)
        self.pending -= 1
        request = self.request
        if token in request.ends and len(self.output) >= request.params.min_tokens:
            self.finish_reason = "stop"
            self.stop_reason = token if token in request.params.stop_token_ids else None
        elif len(self.output) >= request.limit:
            self.finish_reason = "length"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what is wanted of it.

    limit: the most tokens of one output. ends: tokens that end it. seed: of its draws. salt: what
    else the keys and values depend on (an adapter, say); requests share cached pages only if equal.
    bad_words: token sequences that must not appear. arrival: place in the order of service.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    limit: int
    ends: frozenset[int] = frozenset()
    seed: int = 0
    salt: bytes = b""
    bad_words: tuple[tuple[int, ...], ...] = ()
    groups: int = 1
    arrival: int = -1
    cached_tokens: int = 0  # of the prompt, found in the prefix cache at its first admission
    prompt_logprobs: list[dict[int, float] | None] | None = None
    prompt_scored: int = 0  # tokens of the prompt whose successor's logprob was taken
    error: Exception | None = None
    plain: bool = field(init=False)  # nothing is added to its logits
    sequences: list[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.plain = not (p.logit_bias or p.min_tokens or self.bad_words)
        self.prompt_logprobs = None if p.prompt_logprobs is None else [None]
        self.sequences = [Sequence(self, i, self.groups) for i in range(p.n)]

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)

    @property
    def looks_back(self) -> bool:
        """Whether the host must know the last token before the next one can be drawn."""
        return any(len(word) > 1 for word in self.bad_words)


@dataclass(slots=True, eq=False)
class Chunk:
    """What one step computes of a sequence: `count` tokens behind `start` cached ones.

    samples: a token is drawn from the logits of the last of them.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True, eq=False)
class Step:
    """One forward of the decoder over a mixed batch.

    new_pages: (group, state row, index in the row's page table, page), to be set before the step.
    copies: (group, from page, to page), to be copied before the step writes.
    """

    chunks: list[Chunk]
    new_pages: list[tuple[int, int, int, int]]
    copies: list[tuple[int, int, int]]

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


def _wrapped(value: int) -> int:
    """`value` as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


def check_token_ids(name: str, ids: Tokens[int], vocab_size: int) -> list[int]:
    """`ids` as a list; ValueError naming `name` unless each is a token of the vocabulary."""
    checked = [int(i) for i in ids]
    if not checked:
        raise ValueError(f"{name} must hold at least one token, got none")
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name} must hold ids below the vocabulary's {vocab_size}, got {i}")
    return checked
