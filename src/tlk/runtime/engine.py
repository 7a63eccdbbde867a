"""The engine: requests in, tokens out, one step ahead of itself.

    schedule step N + 1 → launch it → read what step N drew → find who has ended

When a step is scheduled the tokens of the step before are still on the device: the scheduler knows how
many there are, not which. What they end (an end-of-text token, a stop) is known one step late; the extra
token that such a sequence drew by then is dropped.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import torch

from tlk.errors import EngineError
from tlk.models.decoder import Decoder, twin
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, Sequence, Step, check_token_ids
from tlk.runtime.runner import Flight, Runner
from tlk.runtime.scheduler import Scheduler
from tlk.runtime.start import start


@dataclass(slots=True, eq=False)
class Update:
    """What became known of one sequence.

    tokens: those it got; none if only its end became known (aborted, failed). logprobs: for each of
    them the drawn token and the likeliest ones, where the request wants them.
    """

    sequence: Sequence
    tokens: list[int]
    logprobs: list[dict[int, float]]


class Engine:
    """Serves many requests at once on one decoder. One thread at a time may call it.

    decoder: the engine uses its weights and leaves it alone otherwise. eos: tokens that end a text.
    progress: show bars. Attributes: max_model_len, ledger (memory), timings (seconds of each phase
    of the start), notices (what was fitted down or given up).

    Raises CapacityError if the cache cannot hold a page.
    """

    def __init__(
        self,
        decoder: Decoder,
        options: EngineOptions | None = None,
        *,
        eos: Iterable[int] = (),
        progress: bool = False,
    ) -> None:
        self.options = options or EngineOptions()
        self.eos = frozenset(eos)
        self.vocab_size = decoder.config.vocab_size
        own = twin(decoder, deterministic=self.options.deterministic)
        self._runner: Runner | None = Runner(own, self.options)
        started = start(self._runner, progress=progress)
        self.max_model_len, self.ledger = started.max_model_len, started.ledger
        self.timings, self.notices = started.timings, started.notices
        groups = self._runner.groups
        self._scheduler = Scheduler(
            started.pages,
            [group.window for group in groups],
            page_size=self._runner.page_size,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.options.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            enable_prefix_caching=self.options.enable_prefix_caching,
            salt=self._runner.salt,
        )
        self._flight: Flight | None = None
        self._ended: list[Update] = []  # aborts and failures, to be told by the next step
        self._dead: BaseException | None = None
        self._count = 0
        self._steps = 0

    # ---- requests

    def add(
        self,
        prompt: Tokens[int],
        params: SamplingParams,
        *,
        id: str | None = None,
        bad_words: Tokens[Tokens[int]] = (),
        salt: bytes = b"",
    ) -> Request:
        """Queue a request for `params` on the token ids `prompt`; `bad_words` are token sequences.

        Requests share cached pages only where `salt` is equal. Raises, before anything is queued,
        ValueError naming the field for a bad argument, CapacityError for what the cache cannot hold.
        """
        self._check_alive()
        ids = check_token_ids("prompt", prompt, self.vocab_size)
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(ids)} tokens, but max_model_len is {self.max_model_len} and at "
                "least one token must be generated"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if named := getattr(params, name):
                check_token_ids(name, list(named), self.vocab_size)
        words = tuple(
            tuple(check_token_ids("bad_words", word, self.vocab_size)) for word in bad_words
        )
        room = self.max_model_len - len(ids)
        ends = frozenset(params.stop_token_ids)
        request = Request(
            f"request-{self._count}" if id is None else id,
            ids,
            params,
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            ends=ends if params.ignore_eos else ends | self.eos,
            seed=_seed(self.options.seed, self._count) if params.seed is None else params.seed,
            salt=salt,
            bad_words=words,
            groups=len(self._scheduler.groups),
        )
        self._scheduler.add(request)
        self._count += 1
        return request

    def abort(self, id: str) -> bool:
        """End a request now; False if there is none of that id. Its end is told by the next step."""
        ended = self._scheduler.abort(id)
        self._tell(ended)
        return bool(ended)

    def finish(self, sequence: Sequence, stop_reason: str | None = None) -> None:
        """End a sequence whose text met a stop string, which only the caller can see."""
        if not sequence.finished:
            sequence.finish_reason, sequence.stop_reason = "stop", stop_reason
            self._scheduler.finish(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._flight or self._ended or self._scheduler.has_work())

    # ---- steps

    def step(self) -> list[Update]:
        """Launch the next step, and return what the one before brought.

        A failure on the host ends the requests of the step with the error as their cause; a fault of
        the GPU ends the engine with EngineError.
        """
        self._check_alive()
        updates: list[Update] = []
        try:
            if self._flight is not None and self._must_know():
                updates += self._read()
            step = self._scheduler.schedule()
            flight = self._launch(step) if step is not None else None
            updates += self._read()
            self._flight = flight
        except torch.AcceleratorError as fault:
            self._die(fault)
        updates += self._ended
        self._ended = []
        return updates

    def _must_know(self) -> bool:
        """Whether the next step depends on tokens that were not read yet."""
        assert self._flight is not None
        return any(c.sequence.request.looks_back for c in self._flight.drawn)

    def _launch(self, step: Step) -> Flight | None:
        assert self._runner is not None
        try:
            flight = self._runner.launch(step)
        except Exception as error:
            if _is_fault(error):
                self._die(error)
            self._fail(step, error)
            return None
        self._steps += 1
        return flight

    def _read(self) -> list[Update]:
        """Take what the step in flight drew; end the sequences that this ends."""
        flight, self._flight = self._flight, None
        updates: list[Update] = []
        for result in flight.read() if flight is not None else ():
            sequence = result.chunk.sequence
            if sequence.finished:
                continue
            sequence.append(result.token)
            logprobs = [] if result.logprobs is None else [result.logprobs]
            updates.append(Update(sequence, [result.token], logprobs))
            if sequence.finished:
                self._scheduler.finish(sequence)
        return updates

    def _fail(self, step: Step, error: Exception) -> None:
        """End the requests of a step that could not be launched."""
        for request in self._scheduler.fail(step):
            request.error = error
            self._tell(s for s in request.sequences if s.finish_reason == "error")

    def _tell(self, ended: Iterable[Sequence]) -> None:
        self._ended += [Update(sequence, [], []) for sequence in ended]

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine has ended: {self._dead}") from self._dead
        if self._runner is None:
            raise EngineError("the engine is closed")

    def _die(self, fault: BaseException) -> None:
        self._dead = fault
        self._flight = None
        raise EngineError(f"the GPU failed, and the engine with it: {fault}") from fault

    # ---- the whole

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what is running and waiting now."""
        runner = self._runner
        graphs = runner.graphs if runner is not None else None
        scheduler = self._scheduler
        return {
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "preemptions": scheduler.preemptions,
            "cached_tokens": scheduler.cached_tokens,
            "pages_used": sum(scheduler.pages_used),
            "pages": sum(group.pool.num_pages for group in scheduler.groups),
            "steps": self._steps,
            "eager_steps": runner.eager_steps if runner is not None else 0,
            "graph_replays": graphs.replays if graphs is not None else 0,
        }

    def close(self) -> None:
        """Wait for what is in flight and give the memory back; the engine cannot be used again."""
        if self._flight is not None and self._dead is None:
            self._flight.read()
        self._flight = None
        if self._runner is not None:
            self._runner.free()
            self._runner = None


def _is_fault(error: Exception) -> bool:
    """Whether the GPU's memory can no longer be trusted, as torch or Triton report it."""
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error)
    return text.startswith("Triton Error [CUDA]") and "out of memory" not in text


def _seed(engine: int, count: int) -> int:
    """The seed of the `count`-th request of an engine with seed `engine`."""
    return (engine * 0x9E3779B97F4A7C15 + count * 0xD1B54A32D192ED03) % 2**63
