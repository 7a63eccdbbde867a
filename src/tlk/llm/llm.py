"""`LLM`: many prompts in, their texts out, all in flight together.

A request that fails does not fail its neighbours: its output has finish_reason "error" and the cause
in `error`. Only the end of the engine itself (a CUDA fault) raises from `generate`.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tlk.errors import EngineError
from tlk.llm.frontend import Frontend
from tlk.llm.inputs import (
    REFUSALS,
    Message,
    Prepared,
    Prompt,
    as_conversations,
    as_params,
    as_prompts,
    which,
)
from tlk.llm.interrupts import held_interrupts
from tlk.llm.outputs import RequestOutput
from tlk.runtime.params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM(Frontend):
    """Generates for lists of prompts.

    Use it from one thread, and close it to give its memory back, or use it as a context manager.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue all `prompts`; the results are in their order.

        prompts: a text, a list of token ids, a dict with "prompt_token_ids", or a list of such.
        sampling_params: one for all or one for each; None: what the model's generation_config.json
        says. use_tqdm: show progress.

        All prompts are checked before any is scheduled. If it is interrupted, its requests are
        aborted and the engine stays usable. A request that failed has outputs with
        finish_reason "error", what was drawn before, and the cause in `.error`.

        Raises ValueError, TypeError, UnsupportedError or CapacityError, naming which prompt is
        refused and why; EngineError, with its cause, if the engine has ended.
        """
        many, _ = as_prompts(prompts)
        params = as_params(sampling_params, len(many), self.default_params)
        return self._run(self._prepare(many, params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, [{"role": "user", "content": "…"}, …], or each of several.

        As `generate`, on what the tokenizer's chat template makes of the messages.
        """
        conversations = as_conversations(messages)
        prompts: list[Prompt] = []
        for i, conversation in enumerate(conversations):
            try:
                prompts.append(self._text.conversation(conversation))
            except REFUSALS as error:
                raise which(i, len(conversations), error) from error
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yield the text of one continuation as it grows; joined, the pieces are the whole text.

        The request is scheduled at the first piece, and aborted if the iterator is closed early.
        Raises as `generate`, and EngineError, with its cause, if the request fails.
        """
        many, one = as_prompts(prompt)
        if not one:
            raise ValueError(f"prompt must be one prompt, got a list of {len(many)}")
        params = as_params(sampling_params, 1, self.default_params)
        (prepared,) = self._prepare(many, params)
        if prepared.params.n != 1:
            raise ValueError(f"n must be 1 to stream text, got {prepared.params.n}")
        if not prepared.params.detokenize:
            self._text.needed("stream()")
            raise ValueError("detokenize must be True to stream text")
        return self._pieces(prepared)

    def close(self) -> None:
        """End the engine and give its memory back; the weights go with the object."""
        self._requests.forget()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, prepared: Sequence[Prepared], use_tqdm: bool) -> list[RequestOutput]:
        ids = [str(next(self._numbers)) for _ in prepared]
        try:
            outputs = [
                self._add(i, len(ids), p, id)
                for i, (p, id) in enumerate(zip(prepared, ids, strict=True))
            ]
            left, tokens = set(ids), 0
            progress = tqdm(total=len(ids), desc="prompts", disable=not use_tqdm)
            with progress as bar, held_interrupts() as interrupts:
                while left:
                    for output in self._requests.step():
                        if output.finished and output.request_id in left:
                            left.discard(output.request_id)
                            tokens += sum(len(o.token_ids) for o in output.outputs)
                            _advance(bar, tokens)
                    interrupts.let_through()
            return outputs
        finally:
            self._withdraw(ids)

    def _add(self, index: int, count: int, prepared: Prepared, id: str) -> RequestOutput:
        try:
            return self._requests.add(prepared, id, live=False)
        except REFUSALS as error:
            raise which(index, count, error) from error

    def _pieces(self, prepared: Prepared) -> Iterator[str]:
        id, sent = str(next(self._numbers)), 0
        try:
            output = self._requests.add(prepared, id, live=True)
            while not output.finished or len(output.outputs[0].text) > sent:
                text = output.outputs[0].text
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
                    continue
                with held_interrupts() as interrupts:
                    self._requests.step()
                    interrupts.let_through()
            if output.error is not None:
                raise EngineError(f"the request failed: {output.error}") from output.error
        finally:
            self._withdraw([id])

    def _withdraw(self, ids: Sequence[str]) -> None:
        """Abort what is still in flight of `ids`, and let the engine take everything back."""
        self._requests.abort(ids)
        self._requests.settle()


def _advance(bar: Any, tokens: int) -> None:
    bar.update()
    elapsed = bar.format_dict["elapsed"]
    if elapsed:
        bar.set_postfix_str(f"{tokens / elapsed:.0f} tok/s", refresh=False)
