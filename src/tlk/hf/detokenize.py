"""Text from token ids as they come: never half a character, never what may begin a stop string.

The text of a token depends on those before it: a character may be spread over several tokens, and
a word has a space before it unless it is the first. So every token is decoded at the end of a short
window, and what the window's text has gained is new. That is one decode of at most CONTEXT + PENDING + 1
tokens per token, however long the output, and less where many come at once: 8 µs with the embedded model's tokenizer, with or without stop
strings (CPU time, AMD EPYC, transformers 5.23, tokenizers 0.23.3; 7.5 to 8.5 in three runs of
`pytest tests/hf/test_detokenize.py -k microseconds -s`).

Any tokenizer's `decode` will do, fast or slow, if it only appends as tokens follow. The `DecodeStream` of tokenizers would not: it does
not take slow ones, keeps a whole token back for its last byte, and raises at byte tokens that are no
UTF-8 ("Invalid prefix encountered").
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

CONTEXT = 5
"""Tokens that stay in the window: one to lean on, and those of an unfinished character."""
PENDING = 8
"""Tokens by which the window grows before it is cut again."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one output, piece by piece.

    tokenizer: one of transformers. prompt_ids: what the output follows; the first word's space depends
    on it, but its text is no part of the output. skip_special_tokens: leave them out of the text.
    stop: the output ends before the first of these that it completes, or behind it with
    include_stop; of those completed by the same character, the longest counts.

    The pieces together are what `tokenizer.decode` gives for the output behind its prompt, whatever
    the split into pieces, with two exceptions: clean_up_tokenization_spaces, which changes text that was given
    already, is off; and bytes that are no UTF-8 become one U+FFFD for each broken character, where
    a tokenizer with byte tokens gives up the whole run of bytes.

    Raises ValueError if `stop` is one string, or holds an empty one.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stops = _Stops(stop, include_stop)
        self._parts: list[str] = []
        self._finished = False
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")  # of byte tokens
        self._window: list[int] = []
        self._text = ""  # of the window
        self._taken = 0  # characters of it that were given
        self._start(prompt_ids)

    @property
    def text(self) -> str:
        """All text so far that is final: what `push` and `finish` have returned."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the output, or None."""
        return self._stops.met

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` make final; "" once a stop string was met.

        Raises ValueError after `finish`.
        """
        if self._finished:
            raise ValueError("no token can follow finish()")
        return self._give(self._stops.push("".join(self._pieces(token_ids))))

    def finish(self) -> str:
        """The text held back. A character that was never completed is U+FFFD."""
        if self._finished:
            return ""
        self._finished = True
        rest = self._own(self._take(self._text) + self._bytes.decode(b"", final=True))
        return self._give(self._stops.push(rest) + self._stops.finish())

    def _give(self, text: str) -> str:
        self._parts.append(text)
        return text

    def _start(self, prompt_ids: Sequence[int]) -> None:
        """Behind the prompt; the output may complete a character that it leaves unfinished."""
        self._lean_on(list(prompt_ids[-CONTEXT:]))
        if not self._text:  # special tokens
            self._lean_on(self._visible(prompt_ids[-20 * CONTEXT :]))
        name = self._tokenizer.convert_ids_to_tokens
        values = [self._byte(i, name(i)) for i in prompt_ids[-3:]]
        while None in values:
            values = values[values.index(None) + 1 :]
        if values:
            self._bytes.decode(bytes(v for v in values if v is not None))
            self._taken = len(self._text)
        self._borrowed = self._taken < len(self._text) or self._bytes.getstate()[0] != b""

    def _pieces(self, token_ids: Sequence[int]) -> Iterator[str]:
        """The text that each run of byte tokens, and each of others, makes final."""
        run: list[int] = []
        for token_id in token_ids:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            if token is None:  # a model's vocabulary may be larger than its tokenizer's
                continue
            value = self._byte(token_id, token)
            if value is None:
                run.append(token_id)
                continue
            yield from self._run(run)
            run = []
            yield self._own(self._take(self._text) + self._bytes.decode(bytes([value])))
            self._lean_on([token_id])
            self._taken = len(self._text)
        yield from self._run(run)

    def _run(self, ids: list[int]) -> Iterator[str]:
        if len(ids) > PENDING:
            before = self._text
            yield self._next(ids)
            if self._text != before:
                self._lean_on(self._visible(self._window))
            return
        for token_id in ids:
            yield self._next([token_id])
            if len(self._window) > CONTEXT + PENDING:
                self._lean_on(self._window[-CONTEXT:])

    def _next(self, ids: list[int]) -> str:
        """The text that tokens, none of them a byte, make final; they join the window."""
        window = self._window + ids
        text = self._decode(window)
        if text == self._text:
            self._window += [i for i in ids if not self._skipped(i)]
            return ""
        self._window, self._text = window, text
        return self._own(
            self._bytes.decode(b"", final=True) + self._take(text.removesuffix(_UNKNOWN))
        )

    def _visible(self, ids: Sequence[int]) -> list[int]:
        """The last CONTEXT of `ids` without those that are skipped."""
        kept: list[int] = []
        for token_id in reversed(ids):
            if len(kept) == CONTEXT:
                break
            if not self._skipped(token_id):
                kept.insert(0, token_id)
        return kept

    def _take(self, text: str) -> str:
        """What `text`, the final part of the window's, has that was not taken before."""
        new = text[self._taken :]
        self._taken = max(self._taken, len(text))
        return new

    def _own(self, text: str) -> str:
        """`text` without the prompt's unfinished character, if the output did not complete it."""
        if self._borrowed and text:
            self._borrowed = False
            return text.removeprefix(_UNKNOWN)
        return text

    def _lean_on(self, window: list[int]) -> None:
        """Go on behind `window`, all of whose final text was taken."""
        self._window, self._text = window, self._decode(window)
        self._taken = len(self._text.removesuffix(_UNKNOWN))

    def _byte(self, token_id: int, token: str | None) -> int | None:
        """The byte that a token like <0x0A> stands for, if it does."""
        if token is None or not token.startswith("<0x") or not (match := _BYTE.fullmatch(token)):
            return None
        return None if self._decode([token_id]) == token else int(match[1], 16)

    def _skipped(self, token_id: int) -> bool:
        """Whether the token's text is left out, so that the window can do without the token."""
        if not self._skip or self._decode([token_id]):
            return False
        return bool(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


class _Stops:
    """Ends a text at a stop string, and holds back what may become one."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a list of strings that are not empty, got {stop!r}")
        self._strings, self._include = tuple(stop), include
        self._beginnings = tuple({s[:n] for s in stop for n in range(1, len(s))})
        self._held = ""
        self.met: str | None = None

    def push(self, text: str) -> str:
        """What is final of the text that was held and `text` behind it."""
        if self.met is not None:
            return ""
        if not self._strings or not text:
            return text
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            end, start, self.met = min(found)
            self._held = ""
            return text[: end if self._include else start]
        size = 0
        if text.endswith(self._beginnings):
            size = max(len(b) for b in self._beginnings if text.endswith(b))
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def finish(self) -> str:
        """The text held back."""
        held, self._held = self._held, ""
        return held
