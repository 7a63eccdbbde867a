"""`AsyncLLM`: the engine in a thread of its own, its outputs as asynchronous iterators."""

import asyncio
import atexit
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import suppress
from functools import cached_property
from types import TracebackType
from typing import Self, cast

from tlk.errors import EngineError
from tlk.llm.engine_thread import Command, EngineThread, News
from tlk.llm.frontend import Frontend
from tlk.llm.inputs import Prompt, as_params, as_prompts
from tlk.llm.outputs import RequestOutput
from tlk.runtime.params import SamplingParams


class _Stream:
    """The consumer's end of one request. number: its id in the engine, never used again."""

    def __init__(self, request_id: str, number: str) -> None:
        self.request_id, self.number = request_id, number
        self.ended = False  # whether the last news has come
        self._news: News | None = None
        self._changed = asyncio.Event()

    def put(self, news: News) -> None:
        """Replace what the consumer has not seen yet."""
        self._news = news
        self.ended = True
        if isinstance(news, RequestOutput):
            news.request_id = self.request_id
            self.ended = news.finished
        self._changed.set()

    async def get(self) -> RequestOutput:
        """The latest output, once there is one that was not seen; raises what ended the request."""
        while self._news is None:
            await self._changed.wait()
        news, self._news = self._news, None
        self._changed.clear()
        if isinstance(news, Exception):
            raise news
        return news


class AsyncLLM(Frontend):
    """Generates for many tasks of one event loop at once.

    The engine runs in a thread, which starts with the first request. Close it, or use it as an
    asynchronous context manager: then no thread, task or future is left behind.
    """

    _thread: EngineThread | None = None
    _closed = False

    @cached_property
    def _streams(self) -> dict[str, _Stream]:
        """The streams of open iterators, by request_id."""
        return {}

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the output of one prompt as it grows; each has all tokens and text so far.

        The last one has `finished`. A consumer that is slower than the engine skips states. Closing
        the iterator, or cancelling its task, aborts the request. The prompt is tokenized in the loop.

        Raises ValueError, TypeError, UnsupportedError or CapacityError for a request that is refused,
        EngineError, with its cause, if the request fails or the engine ends.
        """
        stream = self._submit(prompt, sampling_params, request_id)
        try:
            while True:
                output = await stream.get()
                if output.error is not None:
                    raise EngineError(
                        f"request {stream.request_id} failed: {output.error}"
                    ) from output.error
                yield output
                if output.finished:
                    return
        finally:
            self._leave(stream)

    async def abort(self, request_id: str) -> bool:
        """End a request; its iterator then yields what was drawn, with finish_reason "abort".

        False if no request of that id is in flight.
        """
        stream = self._streams.get(request_id)
        if stream is None or self._thread is None:
            return False
        self._thread.send(Command(stream, stream.number, None))
        return True

    def close(self) -> None:
        """End the engine and its thread, after the step it is in; open iterators raise EngineError."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            self.engine.close()
        else:
            atexit.unregister(self.close)
            self._thread.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        await asyncio.sleep(0)  # the thread's last news reach their iterators

    def _submit(
        self, prompt: Prompt, sampling_params: SamplingParams | None, request_id: str | None
    ) -> _Stream:
        """Check the prompt and hand it to the thread."""
        many, one = as_prompts(prompt)
        if not one:
            raise ValueError(f"prompt must be one prompt, got a list of {len(many)}")
        params = as_params(sampling_params, 1, self.default_params)
        (prepared,) = self._prepare(many, params)
        thread = self._running()
        number = str(next(self._numbers))
        stream = _Stream(f"request-{number}" if request_id is None else request_id, number)
        if stream.request_id in self._streams:
            raise ValueError(
                f"request_id must not be that of a request in flight, got {request_id!r}"
            )
        thread.send(Command(stream, number, prepared))
        self._streams[stream.request_id] = stream
        return stream

    def _running(self) -> EngineThread:
        """The thread, serving the loop that runs now."""
        loop = asyncio.get_running_loop()
        if self._closed:
            raise EngineError("the engine was closed")
        if self._thread is None:
            self._thread = EngineThread(self.engine, self._requests, self.device, loop, _hand_out)
            atexit.register(self.close)
        elif self._thread.loop is not loop:
            if self._streams and not self._thread.loop.is_closed():
                raise RuntimeError("an AsyncLLM serves one event loop at a time")
            for stream in self._streams.values():
                self._thread.send(Command(stream, stream.number, None))
            self._streams.clear()
            self._thread.attach(loop)
        return self._thread

    def _leave(self, stream: _Stream) -> None:
        """Forget the stream, and abort its request if that goes on."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        if not stream.ended and self._thread is not None:
            with suppress(EngineError):  # then there is nothing left to abort
                self._thread.send(Command(stream, stream.number, None))


def _hand_out(news: Mapping[Hashable, News]) -> None:
    for stream, latest in news.items():
        cast(_Stream, stream).put(latest)
