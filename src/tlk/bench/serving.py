"""`tlk bench throughput` and `tlk bench latency`: the engine under load, beside what it is measured by.

throughput: all prompts arrive at once; how long until the last token. latency: one batch at a time;
how long each takes. Prompts are random tokens, drawn anew for every run, so that no run finds those of
another in the prefix cache, and every request draws exactly `output_len` tokens. The engine is
driven without text. The record says with what it was measured: options, versions, the machine's own limits
in the same process, and with `compare` transformers on the same weights.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tlk.bench import metrics, peers
from tlk.bench.ceilings import ceilings, machine
from tlk.bench.metrics import Run, Served
from tlk.bench.sources import Source, load_source
from tlk.bench.step_profile import StepProfile, profile_steps
from tlk.errors import EngineError
from tlk.runtime.engine import Engine
from tlk.runtime.options import EngineOptions, pick_device
from tlk.runtime.params import SamplingParams

Kind = Literal["throughput", "latency"]
PROFILED_STEPS = 20
WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What is measured, and on what.

    model: a folder or hub id; None with random_weights: one of SHAPES, a config.json or its folder.
    num_prompts are those of `throughput`, batch_size those of `latency`. warmup and repeats: runs; None
    is what the kind of benchmark takes by default. compare_prompts: how many of the prompts the peers
    get. Raises ValueError naming the field.
    """

    model: str | None = None
    random_weights: str | None = None
    input_len: int = 128
    output_len: int = 128
    num_prompts: int = 128
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_memory: int | None = None
    enforce_eager: bool = False
    compile: bool = False
    deterministic: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    temperature: float = 0.0
    seed: int = 0
    warmup: int | None = None
    repeats: int | None = None
    profile: bool = False
    compare: str | None = None
    compare_prompts: int = 128

    def __post_init__(self) -> None:
        if (self.model is None) == (self.random_weights is None):
            raise ValueError("give either a model or random_weights, and not both")
        for name in ("input_len", "output_len", "num_prompts", "batch_size", "compare_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.compare not in (None, "transformers"):
            raise ValueError(f"compare must be transformers, got {self.compare}")

    def engine(self) -> EngineOptions:
        """The engine's share of them."""
        own = {f.name for f in fields(EngineOptions)} & {f.name for f in fields(self)}
        return EngineOptions(**{name: getattr(self, name) for name in own})

    def command(self, kind: Kind) -> str:
        """The command line that measures this."""
        words = ["tlk", "bench", kind, *([self.model] if self.model else [])]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "model" or value == (None if f.default is MISSING else f.default):
                continue
            words += [f"--{f.name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(words)


def measure(kind: Kind, options: ServingOptions) -> dict[str, Any]:
    """Measure, and return the record: plain values, for JSON."""
    device = pick_device(options.device)
    limits = ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the ceilings' tensors
    source = load_source(
        options.model,
        options.random_weights,
        options.dtype,
        device,
        options.seed,
        peer=options.compare is not None,
        quantization=options.quantization,
    )
    sizes, figures = source.sizes(), _measure_peers(kind, options, source)
    engine = Engine(source.decoder, options.engine(), progress=True)
    try:
        load = _Load(engine, options, device)
        figures["tlk"] = load.throughput() if kind == "throughput" else load.latency()
        profiled = load.profile(kind) if options.profile else None
        return {
            "benchmark": kind,
            "command": options.command(kind),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **machine(device),
            "options": asdict(options),
            "ceilings": limits,
            "model": sizes,
            "start_s": {"load": source.seconds, **engine.timings},
            "memory": engine.ledger.to_dict(),
            "max_model_len": engine.max_model_len,
            "notices": engine.notices,
            "engine": engine.stats(),
            "figures": figures,
            "shares": _shares(kind, options, figures["tlk"], sizes, limits),
            "profile": profiled.to_dict() if profiled is not None else None,
        }
    finally:
        engine.close()


def drive(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> Run:
    """Serve all prompts at once and note when each token came; EngineError if a request fails."""
    served = [Served(len(p), 0.0, []) for p in prompts]
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        served[i] = Served(len(prompt), time.perf_counter(), [])
        engine.add(prompt, params, id=str(i))
    while engine.has_work:
        updates = engine.step()
        now = time.perf_counter()
        for update in updates:
            request = update.sequence.request
            if request.error is not None:
                raise EngineError(f"a request failed: {request.error}") from request.error
            served[int(request.id)].tokens.extend([now] * len(update.tokens))
    return Run(max(r.tokens[-1] for r in served) - start, served)


class _Load:
    """Drives an engine with random prompts."""

    def __init__(self, engine: Engine, options: ServingOptions, device: torch.device) -> None:
        self._engine, self._options, self._device = engine, options, device
        self._prompts = np.random.default_rng(options.seed)

    def throughput(self) -> dict[str, Any]:
        """All prompts at once; warmed up by a few tokens of as many as run together."""
        o = self._options
        few = min(o.num_prompts, o.max_num_seqs)
        for _ in range(1 if o.warmup is None else o.warmup):
            self._run(few, min(o.output_len, WARMUP_TOKENS))
        runs = [self._run(o.num_prompts, o.output_len) for _ in range(o.repeats or 1)]
        return metrics.throughput(runs)

    def latency(self) -> dict[str, Any]:
        """One batch after another."""
        o = self._options
        for _ in range(2 if o.warmup is None else o.warmup):
            self._run(o.batch_size, o.output_len)
        runs = [self._run(o.batch_size, o.output_len) for _ in range(o.repeats or 5)]
        return metrics.latency(runs)

    def profile(self, kind: Kind) -> StepProfile:
        """Steps in which as many sequences as ran together decode, half way through their output."""
        o, engine = self._options, self._engine
        count = o.batch_size if kind == "latency" else min(o.num_prompts, o.max_num_seqs)
        context = o.input_len + o.output_len // 2
        steps = min(PROFILED_STEPS, (engine.max_model_len - context - 8) // 2)
        if steps < 1:
            raise ValueError(
                f"max_model_len must leave room to profile behind {context} tokens, got {engine.max_model_len}"
            )
        params = SamplingParams(
            max_tokens=None, temperature=o.temperature, ignore_eos=True, detokenize=False
        )
        requests = [
            engine.add(prompt, params, id=str(i))
            for i, prompt in enumerate(self._random(count, context))
        ]
        while any(len(r.sequences[0].output) < 2 for r in requests):
            engine.step()
        profiled = profile_steps(engine.step, steps, self._device)
        for request in requests:
            engine.abort(request.id)
        while engine.has_work:
            engine.step()
        return profiled

    def _run(self, count: int, new: int) -> Run:
        o = self._options
        params = SamplingParams(
            max_tokens=new, temperature=o.temperature, ignore_eos=True, detokenize=False
        )
        run = drive(self._engine, self._random(count, o.input_len), params)
        short = [len(r.tokens) for r in run.requests if len(r.tokens) != new]
        if short:
            raise ValueError(
                f"output_len must fit behind input_len in max_model_len "
                f"({self._engine.max_model_len}): a request got {short[0]} of {new} tokens"
            )
        return run

    def _random(self, count: int, length: int) -> list[list[int]]:
        return random_prompts(self._prompts, count, length, self._engine.vocab_size)


def random_prompts(
    rng: np.random.Generator, count: int, length: int, vocab_size: int
) -> list[list[int]]:
    """Prompts of random tokens, all of one length."""
    prompts: list[list[int]] = rng.integers(0, vocab_size, (count, length)).tolist()
    return prompts


def _measure_peers(kind: Kind, options: ServingOptions, source: Source) -> dict[str, Any]:
    """transformers' figures by the name of what ran; none if they are not wanted."""
    model: Any = source.peer
    if model is None:
        return {}
    o, rng = options, np.random.default_rng(options.seed)
    count = o.batch_size if kind == "latency" else min(o.num_prompts, o.compare_prompts)
    prompts = random_prompts(rng, count, o.input_len, source.decoder.config.vocab_size)

    def figures(seconds: dict[str, float]) -> dict[str, Any]:
        served = [Served(o.input_len, 0.0, [0.0] * o.output_len) for _ in range(count)]
        rates = metrics.rates(seconds["median"], served)
        return {"prompts": count, "seconds": seconds, **rates}

    def generate(static: bool, repeats: int) -> dict[str, Any]:
        return figures(peers.generate(model, prompts, o.output_len, repeats, static))

    if kind == "latency":
        return peers.compare(
            {
                "transformers generate": lambda: generate(False, 1),
                "transformers generate, static cache + compile": lambda: generate(True, 3),
            }
        )
    return peers.compare(
        {
            "transformers generate": lambda: generate(False, 1),
            "transformers generate_batch": lambda: figures(
                peers.generate_batch(model, prompts, o.output_len)
            ),
        }
    )


def _shares(
    kind: Kind,
    options: ServingOptions,
    figures: Mapping[str, Any],
    sizes: Mapping[str, int],
    limits: Mapping[str, float],
) -> dict[str, float]:
    """How near a batch comes to the limits: decode to reading the weights, prefill to a matmul."""
    if kind == "throughput":
        return {}
    shares = {}
    if "median_tpot_ms" in figures:
        read = sizes["decode_bytes"] / (figures["median_tpot_ms"] / 1000)
        shares["decode_bytes_per_s"] = read
        shares["decode_of_copy"] = read / limits["copy_bytes_per_s"]
    tokens = options.batch_size * options.input_len
    done = 2 * tokens * sizes["linear_parameters"] / (figures["median_ttft_ms"] / 1000)
    return {
        **shares,
        "prefill_linear_flops": done,
        "prefill_of_matmul": done / limits["matmul_flops"],
    }


def write(record: Mapping[str, Any], file: Path) -> None:
    """The record as JSON; one more line of a .jsonl file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    else:
        file.write_text(json.dumps(record, indent=2) + "\n")


def show(record: Mapping[str, Any]) -> str:
    """The figures as text."""
    limits = record["ceilings"]
    where = record["gpu"] or record["cpu"]
    lines = [
        f"{where}: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matmul {limits['matmul_n']}³ {limits['matmul_flops'] / 1e12:.2f} TFLOP/s",
        "start: " + ", ".join(f"{k} {v:.2f} s" for k, v in record["start_s"].items()),
        *record["notices"],
    ]
    for name, figures in record["figures"].items():
        lines.append(f"{name}:")
        flat = {k: v for k, v in figures.items() if not isinstance(v, list | dict)}
        lines += [
            f"  {k:24s} {v:.4g}" if isinstance(v, float) else f"  {k:24s} {v}"
            for k, v in flat.items()
        ]
    lines += [f"{k:26s} {v:.4g}" for k, v in record["shares"].items()]
    return "\n".join(lines)
