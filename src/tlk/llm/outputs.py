"""What a request gives back: texts, tokens, log-probabilities, reasons and times."""

from dataclasses import dataclass, field, replace

from tlk.runtime.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token, before penalties and temperature, and the token as text."""

    logprob: float
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt, so far.

    token_ids: the drawn tokens, the one that ended it included. text: theirs, cut before a stop
    string. logprobs, cumulative_logprob: None unless SamplingParams.logprobs asks for them;
    logprobs[i] maps the drawn token i and the likeliest ones to their log-probability.
    finish_reason: None while it goes on, then "stop" (an end token, a stop token or string),
    "length" (max_tokens, or the context is full), "abort" or "error".
    stop_reason: the stop string or stop token, None for the model's own end of text.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request, in seconds of `time.perf_counter()`; None for what has not happened."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        first = self.first_token_time
        return None if first is None else first - self.arrival_time

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        end = self.finished_time
        return None if end is None else end - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations, ordered by index; SamplingParams.n of them.

    prompt: None if token ids were given. prompt_logprobs: one entry per prompt token, the first
    None; None unless asked for. num_cached_tokens: of the prompt, found in the prefix cache.
    error: why the continuations with finish_reason "error" ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    def snapshot(self) -> "RequestOutput":
        """A copy that later tokens do not change; the prompt and its log-probabilities are shared."""
        outputs = [
            replace(o, token_ids=o.token_ids[:], logprobs=o.logprobs and o.logprobs[:])
            for o in self.outputs
        ]
        return replace(self, outputs=outputs, metrics=replace(self.metrics))
