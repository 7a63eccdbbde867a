"""`generate` of an optimized model on tlk's runtime, inside transformers' own call.

transformers prepares the call as it always does: it merges configurations, warns, raises, and builds
its logits processors and stopping criteria. What it would then give to its loop comes to `plan`. A
call whose every part is of a type that the engine has a meaning for becomes a `Plan`, which `Runtime`
runs; any other part raises `NeedsLoop` with its name before anything has run, and transformers' loop
goes on over tlk's forward. Types decide, not names of options, so an option that transformers has yet
to invent is not overlooked.

Greedy tokens are transformers' own; drawn ones have the same distribution, and come from seeds that
torch's global generator gives. The results are laid out as transformers does it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from tlk.errors import CapacityError, EngineError
from tlk.hf.binding import Binding
from tlk.kernels.paged_attention import preferred_page_size
from tlk.models.config import DecoderConfig
from tlk.models.rope import original_length
from tlk.runtime.engine import Engine, Update
from tlk.runtime.options import EngineOptions, check_kv_dtype
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request
from tlk.runtime.request import Sequence as Row

# the processors that the engine applies, in its order; those before the temperature also when greedy
PROCESSORS = (
    RepetitionPenaltyLogitsProcessor, NoBadWordsLogitsProcessor, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor, SuppressTokensLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
)  # fmt: skip
WARPERS = PROCESSORS[PROCESSORS.index(TemperatureLogitsWarper) :]
# inputs of the loop that `plan` looks at, or that change nothing
INPUTS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    | {"tokenizer", "assistant_tokenizer"}
)
MAX_NUM_SEQS = 256  # sequences that run at once unless `optimize` was given another number


class NeedsLoop(Exception):
    """The runtime cannot express this call of generate; the message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What `optimize` was told; None: what the calls need."""

    max_num_seqs: int | None = None
    max_model_len: int | None = None
    kv_cache_dtype: str = "auto"

    @property
    def most_seqs(self) -> int:
        """How many sequences run at once at most."""
        return self.max_num_seqs or MAX_NUM_SEQS

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        check_kv_dtype(self.kv_cache_dtype)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What transformers hands to its loop. ids [B, S]: every row as often as it is continued."""

    ids: Tensor
    processors: Sequence[Any]
    criteria: Sequence[Any]
    config: Any
    synced_gpus: bool
    streamer: Any
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """The same for an `Engine`. params: of every request; the seeds are drawn when it runs.

    prompts: a row each, without padding, continued params.n times. rows: the ids of every result as
    transformers sees them, padding and all. pad: what follows the end of a row.
    """

    prompts: list[list[int]]
    rows: list[list[int]]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]
    stops: tuple[StopStringCriteria, ...]
    pad: int
    streamer: Any

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with all of its continuation."""
        assert self.params.max_tokens is not None
        return max(map(len, self.prompts)) + self.params.max_tokens


# ---- what transformers wants, as requests


def plan(config: DecoderConfig, limits: Limits, wanted: Wanted) -> Plan:
    """`wanted` for an engine of a decoder of `config`; raises NeedsLoop for what it cannot express."""
    _check_outputs(wanted)
    paddings = _paddings(wanted)
    rows = wanted.ids.tolist()
    limit, ends, stops = _criteria(wanted)
    each = wanted.config.num_return_sequences or 1
    if each > limits.most_seqs:
        raise NeedsLoop(f"num_return_sequences={each}, above max_num_seqs={limits.most_seqs}")
    fields: dict[str, Any] = {"n": each, "max_tokens": limit}
    vocabulary = range(config.vocab_size)
    fields["stop_token_ids"] = [i for i in ends or () if i in vocabulary]
    fields["temperature"] = 1.0 if wanted.config.do_sample else 0.0
    bad_words: list[tuple[int, ...]] = []
    for processor in _known(wanted):
        _apply(processor, fields, bad_words, rows, paddings, ends, vocabulary)
    fields["min_tokens"] = min(max(fields.get("min_tokens", 0), 0), limit)
    try:
        params = SamplingParams(ignore_eos=True, detokenize=False, **fields)
    except (ValueError, TypeError) as error:
        raise NeedsLoop(str(error)) from error
    prompts = [row[skip:] for row, skip in zip(rows[::each], paddings[::each], strict=True)]
    pad = wanted.config._pad_token_tensor
    made = Plan(
        prompts=prompts,
        rows=rows,
        params=params,
        bad_words=tuple(bad_words),
        stops=stops,
        pad=0 if pad is None else int(pad),
        streamer=wanted.streamer,
    )
    if made.length > (most := longest(config)):
        raise NeedsLoop(f"{made.length} tokens, where positions stay as they are up to {most}")
    return made


def longest(config: DecoderConfig) -> int:
    """The most tokens of a sequence whose rotary tables do not depend on how long it is just now."""
    most = [config.max_position_embeddings]
    for rope in {layer.attention.rope for layer in config.layers} - {None}:
        assert rope is not None
        if rope.kind in ("dynamic", "longrope"):
            trained = rope.kind == "dynamic"
            most.append(rope.max_position_embeddings if trained else original_length(rope))
    return min(most)


def _check_outputs(wanted: Wanted) -> None:
    """Refuse what the runtime neither returns nor reads."""
    if wanted.config.return_dict_in_generate:
        raise NeedsLoop("return_dict_in_generate, which returns the cache")
    if wanted.config.is_assistant:
        raise NeedsLoop("it drafts for another model")
    if wanted.synced_gpus:
        raise NeedsLoop("synced_gpus")
    if wanted.streamer is not None and len(wanted.ids) > 1:
        raise NeedsLoop("a streamer for several sequences")
    for name, value in wanted.inputs.items():
        if name not in INPUTS and value is not None:
            raise NeedsLoop(f"the argument {name}")
    if not isinstance(wanted.inputs.get("logits_to_keep", 0), int):
        raise NeedsLoop("the argument logits_to_keep")


def _paddings(wanted: Wanted) -> list[int]:
    """How many tokens of padding come before each row; no other padding can be expressed."""
    rows, width = wanted.ids.shape
    mask, positions = (wanted.inputs.get(name) for name in ("attention_mask", "position_ids"))
    columns = torch.arange(width, device="cpu")
    skipped = torch.zeros(rows, 1, dtype=torch.long, device="cpu")
    if mask is not None:
        if mask.shape != wanted.ids.shape:
            raise NeedsLoop(f"an attention_mask of shape {tuple(mask.shape)}")
        real = mask.cpu() != 0
        skipped = width - real.sum(1, keepdim=True)
        if bool((skipped == width).any()) or not torch.equal(real, columns >= skipped):
            raise NeedsLoop("an attention_mask with holes, or padding that is not on the left")
    if positions is not None:
        counted = columns - skipped
        same = positions.ndim == 2 and positions.shape[1] == width
        if not same or bool(((positions.cpu() != counted) & (counted >= 0)).any()):
            raise NeedsLoop("position_ids that do not count the tokens of each row")
    return skipped[:, 0].tolist()


def _criteria(
    wanted: Wanted,
) -> tuple[int, tuple[int, ...] | None, tuple[StopStringCriteria, ...]]:
    """(the most new tokens, tokens that end a row or None, what finds stop strings)."""
    limits, ends, stops = [], None, []
    for criterion in wanted.criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(max(criterion.max_length - wanted.ids.shape[1], 1))
        elif type(criterion) is EosTokenCriteria:
            ends = (ends or ()) + tuple(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is StopStringCriteria:
            stops.append(criterion)
        else:
            raise NeedsLoop(f"the stopping criterion {type(criterion).__name__}")
    if not limits:
        raise NeedsLoop("no max_length")
    if ends is None and stops and len(wanted.ids) > 1:
        raise NeedsLoop("stop_strings without eos_token_id, where no row ends before all do")
    return min(limits), ends, tuple(stops)


def _known(wanted: Wanted) -> Iterable[Any]:
    """The processors, if the engine applies each, at most once, and in this order."""
    places = []
    for processor in wanted.processors:
        kind = type(processor)
        if kind not in PROCESSORS:
            raise NeedsLoop(f"the logits processor {kind.__name__}")
        if kind in WARPERS and not wanted.config.do_sample:
            raise NeedsLoop(f"the logits processor {kind.__name__} without do_sample")
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf or (
            getattr(processor, "min_tokens_to_keep", 1) != 1
        ):
            raise NeedsLoop(f"the logits processor {kind.__name__} with settings of its own")
        places.append(PROCESSORS.index(kind))
    if places != sorted(set(places)):
        raise NeedsLoop("logits processors in an order of their own")
    return wanted.processors


def _apply(
    processor: Any,
    fields: dict[str, Any],
    bad_words: list[tuple[int, ...]],
    rows: list[list[int]],
    paddings: list[int],
    ends: tuple[int, ...] | None,
    vocabulary: range,
) -> None:
    """Put what `processor` does into the `fields` of SamplingParams, or into `bad_words`."""
    kind, width = type(processor), len(rows[0])
    if kind is TemperatureLogitsWarper:
        fields["temperature"] = processor.temperature
    elif kind is TopKLogitsWarper:
        fields["top_k"] = processor.top_k
    elif kind is TopPLogitsWarper:
        fields["top_p"] = processor.top_p
    elif kind is MinPLogitsWarper:
        fields["min_p"] = processor.min_p
    elif kind is RepetitionPenaltyLogitsProcessor:
        _check_penalized(processor.prompt_ignore_length, rows, paddings)
        fields["repetition_penalty"] = processor.penalty
    elif kind is SuppressTokensLogitsProcessor:
        bad_words += [(i,) for i in processor.suppress_tokens.tolist() if i in vocabulary]
    elif kind is NoBadWordsLogitsProcessor:
        shortest = width - max(paddings)
        if any(len(word) > shortest for word in processor.sequence_bias):
            raise NeedsLoop(f"bad_words_ids longer than a prompt, of {shortest} tokens")
        bad_words += processor.sequence_bias
    else:  # one of the two that keep the end away
        if set(processor.eos_token_id.flatten().tolist()) != set(ends or ()):
            raise NeedsLoop(f"the logits processor {kind.__name__} with tokens of its own")
        if kind is MinLengthLogitsProcessor:
            least = processor.min_length - width
        else:
            least = processor.min_new_tokens + processor.prompt_length_to_skip - width
        fields["min_tokens"] = max(fields.get("min_tokens", 0), least)


def _check_penalized(
    ignored: int | Tensor | None, rows: list[list[int]], paddings: list[int]
) -> None:
    """The engine penalizes what is in the prompt: refuse if transformers sees other tokens there."""
    starts = ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(rows)
    for row, start, padding in zip(rows, starts, paddings, strict=True):
        if start > len(row) or set(row[start:]) != set(row[padding:]):
            raise NeedsLoop("repetition_penalty, which sees other tokens than those of the prompt")


# ---- the engine


class Runtime:
    """The engine of one optimized model, on the weights of one binding.

    It grows: a call that needs a larger pool, longer sequences or more of them at once gets a new
    engine that serves the earlier calls too. If the GPU has no room for all sequences of a call, the
    pool is smaller and some of them wait. No prefixes are kept from call to call, since weights may
    change in place between them.
    """

    def __init__(self, binding: Binding, limits: Limits) -> None:
        self.binding, self.limits = binding, limits
        self.engine: Engine | None = None
        self.max_num_seqs = self.max_model_len = self.pages = 0  # what the engine was made for
        self.steps = 0  # of the last call
        self.busy = Lock()  # held while it generates

    def stats(self) -> dict[str, int]:
        """The engine's counts and the bytes of its pool; empty without an engine."""
        if self.engine is None:
            return {}
        return {"kv_cache_bytes": self.engine.ledger.kv_cache, **self.engine.stats()}

    def generate(self, made: Plan) -> list[list[int]]:
        """The new tokens of every row, each up to its end.

        Raises what the engine raises: ValueError, CapacityError, EngineError. After an EngineError
        the next call starts a new engine.
        """
        engine = self._engine_for(made)
        run, before = _Run(engine, made), engine.stats()["steps"]
        try:
            run.start()
            while engine.has_work:
                run.take(engine.step())
        except EngineError:
            self.engine = None
            raise
        finally:
            if self.engine is not None:
                run.clear()
        self.steps = engine.stats()["steps"] - before
        if made.streamer is not None:
            made.streamer.end()
        width = len(made.rows[0])
        return [ids[width:] for ids in run.ids.values()]

    def close(self) -> None:
        """Free the pool and the graphs."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def _engine_for(self, made: Plan) -> Engine:
        page = preferred_page_size(self.binding.device)
        seqs = min(len(made.rows), self.limits.most_seqs)
        pages = seqs * -(-made.length // page)
        if (
            self.engine is None
            or seqs > self.max_num_seqs
            or made.length > self.max_model_len
            or pages > self.pages
        ):
            self.close()
            self.engine = self._made_for(seqs, made.length)
        if self.engine.max_model_len < made.length:
            held = self.engine.ledger.kv_cache
            self.close()
            raise CapacityError(
                f"prompt and continuation are {made.length} tokens, {made.length * self._token_bytes} "
                f"bytes of keys and values, but the GPU has room for {held}"
            )
        return self.engine

    def _made_for(self, seqs: int, length: int) -> Engine:
        """An engine for `seqs` sequences of `length` tokens, and for all that came before."""
        page, limits = preferred_page_size(self.binding.device), self.limits
        tokens = max(_rounded(length), limits.max_model_len or 0)
        tokens = min(tokens, longest(self.binding.decoder.config))
        pages = (limits.max_num_seqs or seqs) * -(-tokens // page)
        wanted = limits.max_num_seqs or min(_power(seqs), limits.most_seqs)
        pages, tokens = max(pages, self.pages), max(tokens, self.max_model_len)
        wanted = max(wanted, self.max_num_seqs)
        options = EngineOptions(
            max_num_seqs=wanted,
            max_model_len=tokens,
            kv_cache_memory=min(pages * page * self._token_bytes, self._room()),
            kv_cache_dtype=limits.kv_cache_dtype,
            enable_prefix_caching=False,
            lazy_graphs=True,
        )
        engine = Engine(self.binding.decoder, options)
        self.max_num_seqs, self.max_model_len, self.pages = wanted, tokens, pages
        return engine

    @property
    def _token_bytes(self) -> int:
        """Bytes of the keys and values of one token, over all layers."""
        return sum(spec.page_bytes() // spec.page_size for spec in self.binding.specs)

    def _room(self) -> int:
        """Bytes that a pool may take: nine tenths of what the GPU has free, or any on a CPU."""
        device = self.binding.device
        if device.type != "cuda":
            return 2**63
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max((torch.cuda.mem_get_info(device)[0] + unused) * 9 // 10, 1)


class _Run:
    """One call of generate on its way through an engine."""

    def __init__(self, engine: Engine, made: Plan) -> None:
        self.engine, self.made = engine, made
        self.requests: list[Request] = []
        self.ids: dict[Row, list[int]] = {}  # of the rows in order: as given, then the new ones
        self.ended: set[Row] = set()  # by a stop string

    def start(self) -> None:
        """Queue the requests; ValueError or CapacityError if one cannot be served."""
        params, prompts = self.made.params, self.made.prompts
        seeds: list[int | None] = [None] * len(prompts)
        if not params.greedy:
            seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
        given = iter(self.made.rows)
        for prompt, seed in zip(prompts, seeds, strict=True):
            one = replace(params, seed=seed)
            request = self.engine.add(prompt, one, bad_words=self.made.bad_words)
            self.requests.append(request)
            self.ids |= {row: list(next(given)) for row in request.sequences}

    def take(self, updates: list[Update]) -> None:
        """Append the new tokens of a step, one by one, as far as no stop string ends their row."""
        for update in updates:
            if update.sequence.finish_reason == "error":
                raise update.sequence.request.error or EngineError("the engine failed a request")
        for place in range(max((len(update.tokens) for update in updates), default=0)):
            rows = []
            for update in updates:
                row, tokens = update.sequence, update.tokens
                if row not in self.ended and place < len(tokens):
                    rows.append(row)
                    self.ids[row].append(tokens[place])
                    if self.made.streamer is not None:
                        self.made.streamer.put(torch.tensor([tokens[place]], device="cpu"))
            self._stop(rows)

    def _stop(self, rows: list[Row]) -> None:
        """End those of `rows` that a stop string ends, as transformers finds it."""
        for criterion in self.made.stops:
            tails: dict[int, list[Row]] = {}  # rows with equally many ids to look at
            for row in rows:
                size = min(len(self.ids[row]), criterion.maximum_token_len)
                tails.setdefault(size, []).append(row)
            for size, members in tails.items():
                ids = torch.tensor([self.ids[row][-size:] for row in members], device="cpu")
                stopped = criterion(ids, None).tolist()
                self.ended |= {row for row, stops in zip(members, stopped, strict=True) if stops}
        for row in self.ended.intersection(rows):
            if not row.finished:
                self.engine.finish(row)

    def clear(self) -> None:
        """Leave nothing of this call in the engine, however it ended."""
        for request in self.requests:
            if not request.finished:
                self.engine.abort(request.id)
        while self.engine.has_work:
            self.engine.step()


def _rounded(tokens: int) -> int:
    """At most an eighth more, and whole steps of 256, so that slightly longer calls fit too."""
    step = max(256, _power(tokens) // 16)
    return -(-tokens // step) * step


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def laid_out(wanted: Wanted, made: Plan, tokens: list[list[int]]) -> Tensor:
    """The ids [B, S + longest] as transformers returns them, with padding behind rows that ended."""
    most = max(map(len, tokens))
    padded = [row + [made.pad] * (most - len(row)) for row in tokens]
    return torch.cat([wanted.ids, torch.tensor(padded, device=wanted.ids.device)], dim=-1)
