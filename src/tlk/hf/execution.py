"""How an optimized transformers model runs: tlk's decoder where it can, the original forward else.

generate has three tiers: tlk's runtime (`generate.py`) in place of transformers' greedy and sampling
loop, that loop or another of transformers over tlk's forward, and the original.

`Optimized` is mixed into a subclass of the model's own class, under the same name. It keeps no
module of its own on the model: `Execution` holds the decoder beside it, and is rebuilt whenever the
model's weights turn out to have moved (after `.to()`, a deep copy, or unpickling).
"""

import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from tlk.errors import FallbackWarning, UnsupportedError
from tlk.hf.binding import Binding, bind, unbind
from tlk.hf.cache import PagedCache
from tlk.hf.call import Call, Inexpressible, flatten
from tlk.hf.generate import Limits, NeedsLoop, Runtime, Wanted, laid_out, plan
from tlk.hf.quant_linear import QuantLinear
from tlk.hf.quantized_checkpoint import SHARD
from tlk.hf.quantized_model import save
from tlk.kernels._op import count_ops
from tlk.kernels.tuning import Source, consulted
from tlk.models.decoder import KvScales, set_kv_scales

# the tiers of generate
RUNTIME, LOOP, ORIGINAL = "tlk's runtime", "transformers' loop over tlk's forward", "original"
# arguments of a forward call that change nothing for tlk, and those that only the loss looks at
IGNORED = frozenset(
    {"cache_position", "return_dict", "output_attentions", "output_hidden_states"}
    | {"tokenizer", "assistant_tokenizer"}  # transformers' loop hands on what generate was given
)
NAMED = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    | {"labels", "use_cache", "logits_to_keep"}
)
LOSS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


@dataclass(slots=True)
class Generation:
    """One call of generate. cache: made for it, not given to it. asked: its loop came to `_sample`."""

    tier: str
    cache: PagedCache | None
    asked: bool = False


class Execution:
    """What tlk knows of one optimized model: its decoder, and what ran so far."""

    def __init__(self, *, strict: bool = False, limits: Limits | None = None) -> None:
        self.strict, self.limits = strict, limits or Limits()
        self.generation: Generation | None = None  # the call of generate that runs
        self.binding: Binding | None = None
        self.runtime: Runtime | None = None  # for as long as its binding is ours
        self.refused: str | None = None  # why the model as a whole cannot be bound
        self.forwards: Counter[str] = Counter()  # "tlk", "runtime" (its steps) and "original"
        self.generates: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # why the original forward ran
        self.loops: Counter[str] = Counter()  # why transformers' loop ran, not the runtime
        self.kv_scales: KvScales = {}  # of an 8-bit cache: layer to those of keys and of values
        self.ops: dict[str, Counter[str]] = {}  # of the first prefill and the first decode forward
        self.configs: set[tuple[str, Source]] = set()  # where theirs came from

    def bind(self, model: nn.Module) -> Binding:
        """The decoder on the current weights of `model`; raises UnsupportedError if it has none."""
        if self.binding is None or self.binding.stale():
            self.unbind()
            try:
                self.binding = bind(model, self.limits.kv_cache_dtype)
                if (found := model.__dict__.get("_tlk_kv_scales")) is not None:
                    set_kv_scales(self.binding.decoder, *found)  # the checkpoint's, or calibrated
                set_kv_scales(self.binding.decoder, self.kv_scales)
            except UnsupportedError as error:
                self.refused = str(error)
                raise
        return self.binding

    def ready(self, model: nn.Module) -> Binding:
        """As `bind`, but a refusal stands until `optimize` is called again."""
        if self.refused is not None:
            raise Inexpressible(self.refused)
        try:
            binding = self.bind(model)
        except UnsupportedError as error:
            raise Inexpressible(str(error)) from error
        if hooked := binding.hooked():
            raise Inexpressible(f"{hooked} has forward hooks, which tlk would not call")
        return binding

    def set_kv_scales(self, scales: KvScales) -> None:
        """`set_kv_scales` of this decoder, and of those that follow when the weights move.

        A cache or an engine that is there already keeps its own: the engine is freed.
        """
        if self.binding is not None:
            set_kv_scales(self.binding.decoder, scales)
        self.kv_scales = {**self.kv_scales, **scales}
        self.free()

    def release(self, model: nn.Module) -> None:
        """Undo the binding: every parameter has its own storage again."""
        if self.binding is not None:
            unbind(model, self.binding)
        self.unbind()

    def unbind(self) -> None:
        """Forget the decoder, and free the engine that runs on it."""
        self.free()
        self.binding, self.refused = None, None

    def free(self) -> None:
        """Free the engine; the next generate makes one."""
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = None

    def generate(self, wanted: Wanted) -> Tensor:
        """What transformers' loop would return, from the runtime; NeedsLoop if it cannot express it.

        Raises what the engine raises: nothing falls back once it has begun.
        """
        binding, generation = self.binding, self.generation
        cache = wanted.inputs.get("past_key_values")
        if binding is None or generation is None:
            raise NeedsLoop("the loop was called without generate")
        if cache is None:
            raise NeedsLoop("use_cache=False")
        if cache is not generation.cache:
            raise NeedsLoop("past_key_values is given")
        made = plan(binding.decoder.config, self.limits, wanted)
        if self.runtime is None:
            self.runtime = Runtime(binding, self.limits)
        if not self.runtime.busy.acquire(blocking=False):
            raise NeedsLoop("another generate of this model is running")
        try:
            generation.tier = RUNTIME
            tokens = self.runtime.generate(made)
            self.forwards["runtime"] += self.runtime.steps
        finally:
            self.runtime.busy.release()
        return laid_out(wanted, made, tokens)

    def note(self, reason: str) -> None:
        """Record that the original runs, and why; warn the first time, or raise if strict."""
        if self.strict:
            raise UnsupportedError(reason)
        self.reasons[reason] += 1
        if self.reasons[reason] == 1:
            warnings.warn(f"tlk runs the original forward: {reason}", FallbackWarning, stacklevel=4)


class _InferenceOnly(torch.autograd.Function):
    """Stands on the way back from tlk's outputs, where there is nothing to differentiate."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a model optimized by tlk has no backward in eval mode: "
            "call model.train(), which runs the original forward, or tlk.restore(model)"
        )


class Optimized:
    """Mixed in before a transformers causal language model's class."""

    training: bool
    _tlk_base: type[nn.Module]  # the class without tlk
    _tlk_pickles_as: type[nn.Module]  # the importable class to rebuild from

    @property
    def _execution(self) -> Execution:
        return self.__dict__.setdefault("_tlk", Execution())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the model's own class: tlk's kernels compute it, or else the original forward does."""
        state = self._execution
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        generation = state.generation
        if not (self.training or (generation is not None and generation.tier == ORIGINAL)):
            try:
                return _run(self, state, arguments)
            except Inexpressible as reason:
                state.note(str(reason))
        state.forwards["original"] += 1
        return self._original_forward(**arguments)

    def _original_forward(self, **arguments: Any) -> Any:
        """transformers' own forward, on the same weights."""
        cache, mask = arguments["past_key_values"], arguments["attention_mask"]
        if isinstance(cache, PagedCache) and mask is not None and mask.ndim == 2:
            cache.expect(mask[:, cache.length :].bool())
        return self._tlk_base.forward(self, **arguments)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate: on tlk's runtime, else its own loop over tlk's forward."""
        state = self._execution
        _check_not_empty(args, kwargs)
        generation, given = Generation(ORIGINAL, None), kwargs.get("past_key_values")
        if not self.training:
            try:
                cache = _cache_for_generate(self, state, args, kwargs)
                generation = Generation(LOOP, cache if cache is not given else None)
                if cache is not None:
                    kwargs["past_key_values"], cache.trusted = cache, True
            except Inexpressible as reason:
                state.note(str(reason))
        outer, state.generation = state.generation, generation
        try:
            out = super().generate(*args, **kwargs)  # type: ignore[misc]
            if generation.tier == LOOP and not generation.asked:
                state.loops[_decoding(self, args, kwargs)] += 1
            return out
        finally:
            state.generation = outer
            state.generates[generation.tier] += 1
            if isinstance(cache := kwargs.get("past_key_values"), PagedCache):
                cache.trusted = False

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, synced_gpus: bool = False, streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Where transformers' generate starts its greedy and sampling loop."""
        state = self._execution
        generation = state.generation
        if generation is not None and generation.tier == LOOP:
            generation.asked = True
            wanted = Wanted(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
                streamer, model_kwargs,
            )  # fmt: skip
            try:
                return _on_runtime(state, wanted)
            except NeedsLoop as reason:
                state.loops[str(reason)] += 1
        return super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
            streamer, **model_kwargs,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the weights, then bind again: moved views would be copies apart from each other."""
        state = self._execution
        bound = state.binding is not None
        state.unbind()
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        state.refused = None
        if bound:
            try:
                state.bind(self)  # type: ignore[arg-type]
            except UnsupportedError as error:
                state.note(str(error))
        return out

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; a quantized one is written in the standard layout of its formats.

        Of the arguments it then takes `max_shard_size`, in bytes, and `format`, a layout's name.
        """
        if not any(isinstance(m, QuantLinear) for m in self.modules()):  # type: ignore[attr-defined]
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        shard = kwargs.pop("max_shard_size", SHARD)
        layout = kwargs.pop("format", None)
        if args or kwargs or not isinstance(shard, int):
            raise TypeError(
                "a quantized model is saved with max_shard_size, in bytes, and format, "
                f"got {[*args, *kwargs, shard]}"
            )
        save(self, Path(save_directory), format=layout, shard=shard)
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "_tlk"}
        own = self._execution
        return _rebuild, (self._tlk_pickles_as, own.strict, own.limits, own.kv_scales), state


def _rebuild(kind: Any, strict: bool, limits: Limits, kv_scales: KvScales) -> Any:
    cls = optimized_class(kind)
    model = cls.__new__(cls)
    model.__dict__["_tlk"] = Execution(strict=strict, limits=limits)
    model.__dict__["_tlk"].kv_scales = kv_scales
    return model


@lru_cache
def optimized_class(base: Any) -> Any:
    """The subclass of class `base` that runs on tlk, under the same name; `base` itself if it does."""
    if issubclass(base, Optimized):
        return base
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    cls: Any = type(base.__name__, (Optimized, base), names)
    cls._tlk_base = cls._tlk_pickles_as = base
    return cls


def _cache(binding: Binding) -> PagedCache:
    scales = binding.decoder.cache_scales(binding.specs[0].dtype)
    return PagedCache(binding.specs, binding.device, scales, binding.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _on_runtime(state: Execution, wanted: Wanted) -> Tensor:
    return state.generate(wanted)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(model: Any, state: Execution, arguments: dict[str, Any]) -> Any:
    cache = arguments["past_key_values"]
    if isinstance(cache, PagedCache) and cache.trusted and cache.length and state.binding:
        binding = state.binding
    else:
        binding = state.ready(model)
    arguments = _checked(model.config, binding, arguments)
    cache = cache if cache is not None else _cache(binding)
    labels, embeds = arguments["labels"], arguments["inputs_embeds"]
    with torch.no_grad():
        call = flatten(
            arguments["input_ids"], embeds, arguments["attention_mask"],
            arguments["position_ids"], arguments["logits_to_keep"], cache,
            windowed=binding.windowed,
        )  # fmt: skip
        kind = "decode" if call.batch.max_q == 1 and cache.length else "prefill"
        counting = nullcontext() if kind in state.ops else count_ops()
        with counting as counts, consulted() as sources:
            rows = _compute(binding, call, cache)
        if counts is not None:
            state.ops[kind] = counts
            state.configs |= sources
        cache.advance(call.new, call.batch.max_q)
    state.forwards["tlk"] += 1
    if torch.is_grad_enabled() and (weight := _needs_grad(model, embeds)) is not None:
        rows = _InferenceOnly.apply(rows, weight)
    logits = call.layout(rows)
    loss = None
    if labels is not None:
        extra = {k: v for k, v in arguments.items() if k in LOSS and v is not None}
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.vocab_size, **extra
        )
    wanted = arguments["use_cache"] or arguments["past_key_values"] is not None
    out = CausalLMOutputWithPast(
        loss=loss, logits=logits, past_key_values=cache if wanted else None
    )
    return out if arguments["return_dict"] else out.to_tuple()


def _compute(binding: Binding, call: Call, cache: PagedCache) -> Tensor:
    assert cache.kv is not None
    decoder = binding.decoder
    decoder.prepare(call.length)
    hidden = decoder(call.ids, call.batch, cache.kv, embeds=call.embeds)
    rows = call.batch.logit_rows
    return decoder.logits(hidden if rows is None else hidden[rows])


def _checked(config: Any, binding: Binding, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with transformers' defaults filled in; raises for what tlk cannot express."""
    a = dict(arguments)
    ids, embeds, cache = a["input_ids"], a["inputs_embeds"], a["past_key_values"]
    if (ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    inputs = ids if ids is not None else embeds
    if inputs.ndim != (2 if ids is not None else 3):
        raise ValueError(
            f"inputs must have shape [B, q] or [B, q, hidden], got {tuple(inputs.shape)}"
        )
    if inputs.shape[1] == 0:
        raise ValueError(f"inputs must hold at least one token, got shape {tuple(inputs.shape)}")
    if cache is not None and not isinstance(cache, PagedCache):
        raise Inexpressible(f"past_key_values is a {type(cache).__name__}, not tlk's PagedCache")
    if isinstance(cache, PagedCache) and cache.specs != binding.specs:
        raise ValueError("past_key_values is the cache of another model")
    for name in ("output_attentions", "output_hidden_states"):
        wanted = a.get(name)
        wanted = getattr(config, name, None) if wanted is None else wanted
        if wanted is not None and wanted is not False:  # 0 names the first hidden state
            raise Inexpressible(f"{name} needs the modules of transformers")
    known = IGNORED | (LOSS if a["labels"] is not None else frozenset())
    for name in set(a) - NAMED - known:
        if a[name] is not None:
            raise Inexpressible(f"the argument {name}")
    if inputs.device != binding.device:
        raise ValueError(f"inputs must be on {binding.device} like the model, got {inputs.device}")
    if a["use_cache"] is None:
        a["use_cache"] = getattr(config, "use_cache", True)
    if a.get("return_dict") is None:
        a["return_dict"] = getattr(config, "return_dict", True)
    return a


def _needs_grad(model: Any, embeds: Tensor | None) -> Tensor | None:
    if embeds is not None and embeds.requires_grad:
        return embeds
    return next((p for p in model.parameters() if p.requires_grad), None)


def _check_not_empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    for given in (*args[:1], *named):
        if isinstance(given, Tensor) and 0 in given.shape[:2]:
            raise ValueError(
                f"generate needs at least one sequence of at least one token, got shape {tuple(given.shape)}"
            )


def _option(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The option `name` of a call of generate, from wherever transformers takes it."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = config or model.generation_config
    return kwargs[name] if name in kwargs else getattr(config, name, None)


def _decoding(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The option that made transformers decode otherwise than greedily or by sampling."""
    for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "dola_layers"):
        if _option(model, args, kwargs, name) is not None:
            return name
    beams = _option(model, args, kwargs, "num_beams")
    return f"num_beams={beams}" if beams not in (None, 1) else "another decoding method"


def _cache_for_generate(
    model: Any, state: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PagedCache | None:
    """The cache under which transformers' loop runs over tlk's forward; None: as it would anyway."""
    binding = state.ready(model)

    def option(name: str) -> Any:
        return _option(model, args, kwargs, name)

    given = kwargs.get("past_key_values")
    if given is not None and not isinstance(given, PagedCache):
        raise Inexpressible(f"past_key_values is a {type(given).__name__}, not tlk's PagedCache")
    if (name := option("cache_implementation")) is not None:
        raise Inexpressible(f"cache_implementation={name!r}")
    if isinstance(kwargs.get("custom_generate"), str):
        raise Inexpressible("custom_generate names code of a repository")
    for name in ("output_attentions", "output_hidden_states"):
        if option(name):
            raise Inexpressible(f"{name} needs the modules of transformers")
    if given is not None:
        return given
    if option("use_cache") is False:
        return None
    return _cache(binding)
