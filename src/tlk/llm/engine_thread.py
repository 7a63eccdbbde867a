"""A thread that steps an engine, with an inbox of commands and an outbox of news.

Between two steps it takes over the commands (add, abort). After a step it lays the new state of every
request that changed into the outbox and wakes the event loop once, however many they are. The outbox
keeps the latest state of each request only: outputs are cumulative, so a loop that is slower than the
engine sees fewer of them, and nothing grows.
"""

import asyncio
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch

from tlk.errors import EngineError
from tlk.llm.inputs import REFUSALS, Prepared
from tlk.llm.outputs import RequestOutput
from tlk.llm.requests import Requests
from tlk.runtime.engine import Engine

News = RequestOutput | Exception
"""The state of a request, or what refused it, failed it or ended the engine."""


@dataclass(frozen=True, slots=True)
class Command:
    """Add a request, or abort it if there is none to prepare. key: whom its news are for."""

    key: Hashable
    id: str
    prepared: Prepared | None


class EngineThread:
    """Runs until `close`, or until the engine ends.

    loop: where `take` is called with the news of all requests that changed; `attach` replaces it.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Requests,
        device: torch.device,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[Mapping[Hashable, News]], None],
    ) -> None:
        self.loop = loop
        self.ended: EngineError | None = None
        self._engine, self._requests, self._device, self._take = engine, requests, device, take
        self._keys: dict[str, Hashable] = {}  # by id, who waits; only the thread uses it
        self._changed = threading.Condition()  # guards what follows
        self._inbox: list[Command] = []
        self._outbox: dict[Hashable, News] = {}
        self._waking = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tlk-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hand over a command; raises EngineError if the thread has ended."""
        with self._changed:
            if self.ended is not None:
                raise _copy(self.ended)
            self._inbox.append(command)
            self._changed.notify()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve another loop; what an earlier one has not taken is dropped."""
        with self._changed:
            self.loop, self._outbox, self._waking = loop, {}, False

    def close(self) -> None:
        """Abort what is in flight, close the engine, and wait for the thread to end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        fault: BaseException | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while (commands := self._next_commands()) is not None:
                self._turn(commands)
            self._requests.abort(list(self._keys))
            self._engine.close()
        except EngineError as error:
            fault = error
        finally:
            self._end(fault or sys.exception())

    def _next_commands(self) -> list[Command] | None:
        """What came in since; None at the end. Waits if there is nothing to compute."""
        with self._changed:
            while not (self._closing or self._inbox or self._busy()):
                self._changed.wait()
            if self._closing:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _busy(self) -> bool:
        return bool(self._keys) or self._engine.has_work

    def _turn(self, commands: list[Command]) -> None:
        """Obey the commands, make a step, and publish what came of both."""
        news: dict[Hashable, News] = {}
        self._keys |= {c.id: c.key for c in commands if c.prepared is not None}
        for command in commands:
            if command.prepared is None:
                for output in self._requests.abort([command.id]):
                    news[self._keys.pop(command.id)] = output
            else:
                self._add(command, command.prepared, news)
        if self._busy():
            for output in self._requests.step():
                done = output.finished
                key = self._keys.pop(output.request_id) if done else self._keys[output.request_id]
                news[key] = output if done else output.snapshot()
        if news:
            self._publish(news)

    def _add(self, command: Command, prepared: Prepared, news: dict[Hashable, News]) -> None:
        try:
            self._requests.add(prepared, command.id, live=True)
        except EngineError:
            raise
        except REFUSALS as error:
            news[self._keys.pop(command.id)] = error

    def _publish(self, news: Mapping[Hashable, News]) -> None:
        with self._changed:
            self._outbox |= news
            if self._waking:
                return
            self._waking = True
            loop = self.loop
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop was closed over what it had asked for
            self._deliver_to_nobody()

    def _deliver(self) -> None:
        """In the loop: hand out the news."""
        with self._changed:
            news, self._outbox, self._waking = self._outbox, {}, False
        self._take(news)

    def _deliver_to_nobody(self) -> None:
        with self._changed:
            self._outbox, self._waking = {}, False
        self._requests.abort(list(self._keys))
        self._keys.clear()

    def _end(self, error: BaseException | None) -> None:
        """Tell everyone who waits, and everyone who comes, that and why the thread has ended."""
        ended = EngineError("the engine was closed")
        if error is not None:
            ended = EngineError(f"the engine has ended: {error}")
            ended.__cause__ = error.__cause__ if isinstance(error, EngineError) else error
        with self._changed:
            self.ended = ended
            keys = [*self._keys.values(), *(c.key for c in self._inbox if c.prepared is not None)]
            self._inbox = []
        self._keys.clear()
        self._requests.forget()
        if keys:
            self._publish({key: _copy(ended) for key in keys})


def _copy(error: EngineError) -> EngineError:
    """One exception for each that waits: a raised one collects the traceback of its own task."""
    copy = EngineError(str(error))
    copy.__cause__ = error.__cause__
    return copy
