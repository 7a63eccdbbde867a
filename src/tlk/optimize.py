"""`optimize`, `restore` and `report`: put a transformers model on tlk's kernels, and see what ran."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from tlk.errors import UnsupportedError
from tlk.hf.execution import Execution, Optimized, optimized_class
from tlk.hf.generate import Limits
from tlk.hf.quant_linear import QuantLinear
from tlk.quant.config import QuantConfig
from tlk.quantize.in_place import quantize_in_place, read_again

M = TypeVar("M", bound=nn.Module)


def optimize(
    model: M,
    *,
    quantization: str | QuantConfig | None = None,
    calibration: Any = None,
    strict: bool = False,
    max_num_seqs: int | None = None,
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
) -> M:
    """Run `model`, a causal language model of transformers, on tlk's kernels; returns the same object.

    `model` keeps its class name, its parameters and their names; weights that one matmul reads become
    views of one storage. forward() and generate() run on tlk wherever it can express the call and on
    transformers' own code elsewhere: with a FallbackWarning the first time, and the reason in
    `report(model)`. In training mode the original forward runs.

    generate() decodes greedily and samples on tlk's runtime, whose pool of cache pages is allocated by
    the first call, made anew by one that needs a larger one, and freed by `restore` or with the model.

    quantization: a method, such as "int4-awq", or a QuantConfig: the linear layers are quantized in place,
    their 16-bit weights are freed, and the modules become `QuantLinear`s of the same names. The
    original forward still runs, on dequantized weights; `save_pretrained` writes the standard format of the
    method; `restore` reads the checkpoint that the model came from again. calibration: texts, a JSONL
    file's path or token ids, which int8, int4-awq and int4-gptq need; texts want a tokenizer beside
    the model's files.

    strict: raise UnsupportedError, now or at a later call, where the original forward would run, or
    where a layer cannot be quantized.
    max_num_seqs: sequences of one generate that run at once, the others wait; None: up to 256, and
    memory for as many as there are. max_model_len: tokens of prompt and continuation that the pool
    has room for from the start, for each of them; None: what the calls need.
    kv_cache_dtype: "fp8" or "int8" keep keys and values in 8 bits, with scales from `calibration` where
    the model is quantized now, else the checkpoint's; "auto": as the model computes them.

    Raises TypeError if `model` is no torch module, ValueError for a limit below 1, UnsupportedError for
    another kv_cache_dtype. A model of an
    unknown family is returned as it came, unless it is to be quantized: UnsupportedError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    limits = Limits(max_num_seqs, max_model_len, kv_cache_dtype)
    if quantization is not None:
        quantize_in_place(
            model, quantization, calibration, kv_cache_dtype=kv_cache_dtype, strict=strict
        )
    elif calibration is not None:
        raise ValueError("calibration needs a quantization that it is for")
    if not isinstance(model, Optimized):
        return _first_time(model, strict, limits)
    state = model._execution
    if limits != state.limits:
        if limits.kv_cache_dtype != state.limits.kv_cache_dtype:
            state.unbind()  # the binding knows what its caches hold
        state.limits = limits
        state.free()
    state.strict, state.refused = strict, None
    _bind(model, state)
    return model


def _first_time(model: M, strict: bool, limits: Limits) -> M:
    state = Execution(strict=strict, limits=limits)
    _bind(model, state)
    model.__dict__["_tlk"] = state
    if state.binding is not None:
        kind: Any = type(model)
        model.__class__ = optimized_class(kind)
    return model


def _bind(model: nn.Module, state: Execution) -> None:
    try:
        state.bind(model)
    except UnsupportedError as error:
        state.note(str(error))


def restore(model: M) -> M:
    """Undo `optimize`: the original class, and a storage of its own for every parameter.

    A model that was quantized is read again from the checkpoint it came from; UnsupportedError if
    that is not there. Returns the same object; a model that was not optimized is left as it is.
    """
    if (state := model.__dict__.get("_tlk")) is None:
        return model
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        state.free()
        read_again(model)
        return model
    state.release(model)
    if isinstance(model, Optimized):
        model.__class__ = type(model)._tlk_base
    del model.__dict__["_tlk"]
    return model


@dataclass(frozen=True, slots=True)
class Report:
    """What ran, as counted while it ran.

    ops: tlk's ops in one prefill and one decode forward, "name[what ran it]" to how often; what ran
    it is "triton", a library such as "cublas", or "reference" (plain PyTorch, on a CPU). configs: of
    those ops that are tuned, where their configurations came from; a heuristic has not been measured.
    quantized: how many of the model's linear layers each format stores; kept: those that were to be
    quantized and stay in 16 bit, and why.
    forwards, generates: how often each path ran so far; of the runtime, its steps and its calls.
    reasons: why transformers' own code ran. loops: why transformers' loop ran over tlk's forward and
    not the runtime. runtime: counts of its engine and the bytes of its pool; empty without one.
    """

    model: str
    family: str | None
    device: str
    dtype: str
    refused: str | None
    quantized: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    generates: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)
    runtime: dict[str, int] = field(default_factory=dict)
    configs: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.device} in {self.dtype}"]
        if self.refused is not None:
            lines.append(f"  runs as transformers wrote it: {self.refused}")
        lines += [f"  {n} linear layers stored as {how}" for how, n in self.quantized.items()]
        lines += [f"  {name} stays in 16 bit: {why}" for name, why in self.kept.items()]
        for kind, ops in self.ops.items():
            lines.append(f"  one {kind} forward: {sum(ops.values())} tlk ops")
            lines += [f"    {count:5d} × {name}" for name, count in sorted(ops.items())]
        for op, sources in self.configs.items():
            lines.append(f"  configurations of {op}: {', '.join(sources)}")
        for what, counts in (("forward", self.forwards), ("generate", self.generates)):
            lines += [f"  {what} calls on {path}: {n}" for path, n in sorted(counts.items())]
        if self.runtime:
            lines.append(f"  the runtime's pool: {self.runtime['kv_cache_bytes'] / 2**20:.1f} MiB")
        for what, counts in (
            ("left to transformers' loop over tlk's forward", self.loops),
            ("left to transformers", self.reasons),
        ):
            if counts:
                lines.append(f"  {what}:")
                lines += [f"    {n} × {reason}" for reason, n in counts.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Which kernels the forwards of `model` run, and what was left to transformers, and why.

    The counts are taken from the first prefill and the first decode forward; if the model has not
    run yet, a forward of a few tokens is made now to take them.
    """
    state = model.__dict__.get("_tlk")
    if state is None:
        raise ValueError("model must come from tlk.optimize, this one does not")
    if isinstance(model, Optimized) and not model.training:
        _probe(model, state)
    some = next(model.parameters(), torch.empty(0))
    return Report(
        model=type(model).__name__,
        family=state.binding.family if state.binding else None,
        device=str(some.device),
        dtype=str(some.dtype).removeprefix("torch."),
        refused=state.refused,
        quantized=dict(
            Counter(str(m.format) for m in model.modules() if isinstance(m, QuantLinear))
        ),
        kept=dict(model.__dict__.get("_tlk_kept", {})),
        ops={kind: dict(counts) for kind, counts in state.ops.items()},
        forwards=dict(state.forwards),
        generates=dict(state.generates),
        reasons=dict(state.reasons),
        loops=dict(state.loops),
        runtime=state.runtime.stats() if state.runtime else {},
        configs=_by_op(state.configs),
    )


def _by_op(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op, source in sorted(sources):
        found.setdefault(op, []).append(source)
    return found


def _probe(model: Any, state: Execution) -> None:
    """Run what has not been counted yet: a prefill of four tokens, and a decode step after it."""
    if state.refused is not None or {"prefill", "decode"} <= set(state.ops):
        return
    before = state.forwards.copy()
    ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model(ids, use_cache=True, return_dict=True).past_key_values
        model(ids[:, :1], past_key_values=cache, return_dict=True)
    state.forwards = before
