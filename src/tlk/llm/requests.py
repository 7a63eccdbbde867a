"""The engine's requests as text: updates of token ids become outputs, and stop strings end them.

Text is made only when somebody looks: a request without stop strings whose text is wanted at its
end (`live=False`) is detokenized once and not once a token. What the engine still reports of a
continuation that has ended here (a token drawn behind a stop string, the echo of an abort) is dropped.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tlk.errors import EngineError
from tlk.hf.detokenize import Detokenizer
from tlk.llm.inputs import Prepared, Text
from tlk.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tlk.runtime.engine import Engine, Update
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, Sequence


class _OutputText:
    """The text of one continuation: tokens are held until somebody looks, or a stop string may come.

    Stop strings count in what follows the first min_tokens tokens, which have a detokenizer of their own.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], params: SamplingParams) -> None:
        self._tokenizer, self._prompt, self._params = tokenizer, prompt, params
        self._held: list[int] = []
        self._lead = ""
        self._behind: list[int] | None = [] if params.stop and params.min_tokens else None
        self._detokenizer = self._new(prompt, () if params.min_tokens else tuple(params.stop))

    def add(self, token: int) -> None:
        """One more token, to be read later."""
        self._held.append(token)

    def read(self) -> str:
        """The text that is final by now."""
        self._detokenizer.push(self._held)
        if self._behind is not None:
            self._behind += self._held
            if len(self._behind) >= self._params.min_tokens:
                self._lead = self._detokenizer.text
                behind = self._prompt + self._behind
                self._detokenizer = self._new(behind, tuple(self._params.stop))
                self._behind = None
        self._held.clear()
        return self._lead + self._detokenizer.text

    def end(self) -> str:
        """The whole text, with what another token might still have changed."""
        self._detokenizer.push(self._held)
        self._held.clear()
        self._detokenizer.finish()
        return self._lead + self._detokenizer.text

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._detokenizer.stopped

    def _new(self, behind: list[int], stop: tuple[str, ...]) -> Detokenizer:
        skip = self._params.skip_special_tokens
        return Detokenizer(self._tokenizer, behind, skip_special_tokens=skip, stop=stop)


@dataclass(slots=True, eq=False)
class _Tracked:
    """A request in the engine, and its output so far; texts: one per continuation, or none.

    eager: read the text at every step, because somebody looks or a stop string may end it.
    """

    request: Request
    output: RequestOutput
    texts: list[_OutputText]
    eager: bool


class Requests:
    """What is in flight in an engine, with its text. Call it from one thread, as the engine."""

    def __init__(self, engine: Engine, text: Text) -> None:
        self._engine, self._text = engine, text
        self._tracked: dict[str, _Tracked] = {}
        self._decoded: dict[int, str] = {}
        self._alive = True

    def __len__(self) -> int:
        return len(self._tracked)

    def __contains__(self, id: str) -> bool:
        return id in self._tracked

    def add(self, prepared: Prepared, id: str, *, live: bool) -> RequestOutput:
        """Put a request into the engine; its output, which `step` fills.

        live: keep the text up to date at every step, and not only at the end.
        Raises ValueError or CapacityError before anything is scheduled.
        """
        if id in self._tracked:
            raise ValueError(f"request_id must not be that of a request in flight, got {id!r}")
        params, bad_words = prepared.params, prepared.bad_words
        arrival = time.perf_counter()
        request = self._engine.add(prepared.ids, params, id=id, bad_words=bad_words)
        output = RequestOutput(
            request_id=id,
            prompt=prepared.text,
            prompt_token_ids=prepared.ids,
            outputs=[self._blank(i, params.logprobs is not None) for i in range(params.n)],
            metrics=RequestMetrics(arrival),
        )
        texts = []
        if params.detokenize:
            tokenizer = self._text.needed("text output")
            texts = [_OutputText(tokenizer, prepared.ids, params) for _ in range(params.n)]
        eager = live or bool(params.stop)
        self._tracked[id] = _Tracked(request, output, texts, eager)
        return output

    def step(self) -> list[RequestOutput]:
        """One step of the engine; the outputs of the requests of which something became known.

        Raises EngineError if the engine has ended, with all its requests.
        """
        try:
            updates = self._engine.step()
        except EngineError:
            self.forget()
            self._alive = False
            raise
        now = time.perf_counter()
        changed: dict[str, RequestOutput] = {}
        for update in updates:
            tracked = self._tracked.get(update.sequence.request.id)
            if tracked is None or tracked.request is not update.sequence.request:
                continue  # it was aborted; the id may be another request's by now
            if self._apply(tracked, update, now):
                changed[tracked.request.id] = tracked.output
        for id, output in changed.items():
            if output.finished:
                output.metrics.finished_time = now
                del self._tracked[id]
        return list(changed.values())

    def abort(self, ids: Iterable[str]) -> list[RequestOutput]:
        """End those of the requests that are in flight; their outputs, with what was drawn so far."""
        ended = [self._tracked.pop(id) for id in ids if id in self._tracked]
        now = time.perf_counter()
        for tracked in ended:
            self._engine.abort(tracked.request.id)
            for completion in tracked.output.outputs:
                if not completion.finished:
                    completion.finish_reason = "abort"
                    self._end_text(tracked, completion)
            tracked.output.metrics.finished_time = now
        return [tracked.output for tracked in ended]

    def settle(self) -> None:
        """Let the engine take back what ended requests held, if nothing else is in flight."""
        while self._alive and not self._tracked and self._engine.has_work:
            self._engine.step()

    def forget(self) -> None:
        """Drop all requests, for an engine that ends."""
        self._tracked.clear()

    @staticmethod
    def _blank(index: int, logprobs: bool) -> CompletionOutput:
        if not logprobs:
            return CompletionOutput(index)
        return CompletionOutput(index, logprobs=[], cumulative_logprob=0.0)

    def _apply(self, tracked: _Tracked, update: Update, now: float) -> bool:
        """Take over what `update` says; False if the continuation had ended here already."""
        sequence, request = update.sequence, tracked.request
        completion = tracked.output.outputs[sequence.index]
        if completion.finished:
            return False
        tracked.output.num_cached_tokens = request.cached_tokens
        if update.tokens:
            metrics = tracked.output.metrics
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
        self._take_tokens(tracked, completion, update)
        scored = request.prompt_logprobs
        if scored is not None and tracked.output.prompt_logprobs is None and update.tokens:
            tracked.output.prompt_logprobs = [
                None if entry is None else self._logprobs(entry) for entry in scored
            ]
        if not completion.finished and sequence.finished:
            completion.finish_reason = sequence.finish_reason
            completion.stop_reason = sequence.stop_reason
            if sequence.finish_reason == "error":
                tracked.output.error = request.error
            self._end_text(tracked, completion)
        return True

    def _take_tokens(self, tracked: _Tracked, completion: CompletionOutput, update: Update) -> None:
        """Append the new tokens, up to the one that completes a stop string."""
        sequence = update.sequence
        for i, token in enumerate(update.tokens):
            completion.token_ids.append(token)
            if completion.logprobs is not None:
                entry = update.logprobs[i]
                completion.logprobs.append(self._logprobs(entry))
                total = completion.cumulative_logprob or 0.0
                completion.cumulative_logprob = total + entry[token]
            if i == len(update.tokens) - 1 and sequence.finish_reason == "stop":
                return  # a token that ends the text is none of it
            if tracked.texts:
                text = tracked.texts[completion.index]
                text.add(token)
                if tracked.eager and self._stopped(text, completion, sequence):
                    return

    def _stopped(self, text: _OutputText, completion: CompletionOutput, sequence: Sequence) -> bool:
        """Bring the text up to date; whether a stop string ends it."""
        completion.text = text.read()
        if text.stopped is None:
            return False
        completion.finish_reason, completion.stop_reason = "stop", text.stopped
        if not sequence.finished:
            self._engine.finish(sequence, text.stopped)
        return True

    @staticmethod
    def _end_text(tracked: _Tracked, completion: CompletionOutput) -> None:
        if tracked.texts:
            completion.text = tracked.texts[completion.index].end()

    def _logprobs(self, entry: Mapping[int, float]) -> dict[int, Logprob]:
        return {id: Logprob(value, self._decode(id)) for id, value in entry.items()}

    def _decode(self, id: int) -> str | None:
        tokenizer = self._text.tokenizer
        if tokenizer is None:
            return None
        if id not in self._decoded:
            self._decoded[id] = str(tokenizer.decode([id]))
        return self._decoded[id]
