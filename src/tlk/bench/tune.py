"""`tlk tune`: measure which configurations are fastest on this GPU, and keep them in tables.

    tlk tune                                        # all ops, Llama-3.1-8B's layers, into the user's cache
    tlk tune matmul --shapes qwen3-0.6b ./my-model  # one op, other models
    tlk tune --sm 89                                # no GPU: which candidates fit an RTX 4090, and why not

For each key of a table (op, dtype, shape, bucket of tokens): the candidates of the op's search space are
compiled on the CPU and those with bad machine code dropped (tune_prune.py), the rest are checked and
timed (tune_time.py), and the winner is written at once. So a run that is stopped, or out of its budget,
has measured something, the next one goes on where it ended, and several may share the work.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tlk.bench.shapes import SHAPES
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import PARTS, RUNNING, Key, Projection, keys, projections
from tlk.bench.tune_prune import Trial, compiled, distinct
from tlk.bench.tune_time import Verdict, verdict
from tlk.errors import UnsupportedError
from tlk.hf.weights import DTYPES
from tlk.kernels import tuning
from tlk.kernels._device import sm, sm_count
from tlk.kernels.aot import GPUS
from tlk.kernels.tunable import TUNABLE
from tlk.kernels.tuning import Config, Entry

Space = dict[Key, list[Config]]
"""Candidates by key; the heuristic's own choice is one of them."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `tlk tune` was asked for; `add_arguments` says what the fields mean."""

    ops: tuple[str, ...] = tuple(TUNABLE)
    shapes: tuple[str, ...] = ("llama-3.1-8b",)
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = RUNNING
    table: bool = False
    again: bool = False
    budget: float = float("inf")
    jobs: int = len(os.sched_getaffinity(0))
    sm: int | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.ops) - TUNABLE.keys():
            raise ValueError(f"ops must be of {', '.join(TUNABLE)}, got {', '.join(unknown)}")
        if self.sm is not None and self.sm not in GPUS:
            raise ValueError(f"sm must be one of {sorted(GPUS)}, got {self.sm}")
        if min(self.tokens) < 1 or self.jobs < 1:
            raise ValueError("tokens and jobs must be at least 1")

    def wanted(self) -> list[Key]:
        """What is to be measured, few tokens first."""
        layers = [layer for model in self.shapes for layer in projections(model)]
        return keys(self.ops, layers, self.tokens, self._shape)

    def _shape(self, op: str, layer: Projection) -> tuple[torch.dtype, tuple[int, ...]] | None:
        dims = CALLS[op].dims(layer)
        return None if dims is None else (CALLS[op].dtype or DTYPES[self.dtype], dims)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line: the fields of `Options`."""
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"of {', '.join(TUNABLE)}; all if none is named")
    models = ", ".join((*SHAPES, *PARTS))
    add("--shapes", nargs="+", metavar="MODEL", help=f"a config.json, its folder, or of {models}")
    add("--dtype", choices=tuple(DTYPES), help="of the activations")
    add("--tokens", nargs="+", type=int, metavar="N", help="of a step; powers of two to 8192")
    add("--table", action="store_true", help="write the table that the package ships, not your own")
    add("--again", action="store_true", help="measure also what the table holds already")
    add("--budget", type=float, metavar="SECONDS", help="begin no measurement after so long")
    add("--jobs", type=int, metavar="N", help="compilations at a time; one per CPU core")
    add("--sm", type=int, help="only compile, for this capability: needs no GPU, writes nothing")


def run(**arguments: Any) -> int:
    """The command `tlk tune`; returns the exit code, 1 if some kernel gave a wrong result."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if value not in (None, [])
    }
    options = Options(**given)
    if options.sm is not None:
        print(gate(options, options.sm))
        return 0
    verdicts = tune(options, _gpu())
    wrong = [(v.key, config) for v in verdicts for config in v.wrong]
    for key, config in wrong:
        print(f"wrong result: {key}: {describe(config)}", file=sys.stderr)
    return 1 if wrong else 0


def gate(options: Options, arch: int) -> str:
    """Compile the candidates for `arch` and say how many are fit to be timed, and why others are not."""
    space = candidates(options.wanted(), arch, GPUS[arch].sm_count)
    kept, reasons = prune(space, arch, options.jobs, "compiling")
    lines = [f"{key}: {len(kept[key])} of {len(space[key])} candidates" for key in space]
    return "\n".join([*lines, *(f"{n} × {why}" for why, n in reasons.most_common())])


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tuning times kernels on a GPU; --sm N compiles candidates without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


def tune(options: Options, device: torch.device) -> list[Verdict]:
    """Measure what the table does not hold yet, and write each result as it comes.

    Raises UnsupportedError on a GPU that candidates cannot be compiled for ahead of time.
    """
    arch, processors = sm(device), sm_count(device)
    if arch not in GPUS:
        known = ", ".join(f"sm_{known}" for known in GPUS)
        raise UnsupportedError(f"candidates are compiled for {known}, not for sm_{arch}")
    todo = [k for k in options.wanted() if options.again or not _is_measured(k, device, options)]
    space = candidates(todo, arch, processors)
    end, verdicts = time.monotonic() + options.budget, []
    with tqdm(total=len(space), unit="shape", disable=None) as progress:
        for key, configs in _fit(space, arch, options.jobs, end):
            progress.update()
            if not options.again and _is_measured(key, device, options):
                continue  # by another process, meanwhile
            default = TUNABLE[key.op].default(arch, processors, key.dtype, key.dims, key.running)
            verdicts.append(verdict(key, configs, default, device))
            tuning.record(_path(key, device, options), [entry(verdicts[-1], device)])
            progress.write(line(verdicts[-1]))
    folder = tuning.table_path("", arch, options.table).parent
    print(f"{len(verdicts)} of {len(space)} shapes measured, in {folder}")
    return verdicts


def _fit(space: Space, arch: int, jobs: int, end: float) -> Iterator[tuple[Key, list[Config]]]:
    """The keys with those of their candidates that compile well, until the clock shows `end`.

    Compiled for one number of tokens at a time, so that something is measured early.
    """
    for tokens, part in groupby(space, key=lambda key: key.running):
        keys = list(part)
        if time.monotonic() < end:
            kept, _ = prune({k: space[k] for k in keys}, arch, jobs, f"compiling, {tokens} tokens")
            for key in keys:
                if time.monotonic() < end:
                    yield key, kept[key]


def candidates(wanted: Iterable[Key], arch: int, processors: int) -> Space:
    """The search space of each key where there is something to choose."""
    space = {}
    for key in wanted:
        op, arguments = TUNABLE[key.op], (arch, processors, key.dtype, key.dims, key.running)
        configs = distinct([op.default(*arguments), *op.candidates(*arguments)])
        if len(configs) > 1:
            space[key] = configs
    return space


def prune(space: Space, arch: int, jobs: int, doing: str) -> tuple[Space, Counter[str]]:
    """`space` without what the compiler's output speaks against, and how often it said what."""
    trials = [Trial(key, config) for key, configs in space.items() for config in configs]
    fit: Space = {key: [] for key in space}
    reasons: Counter[str] = Counter()
    with tqdm(
        total=len(trials), unit="candidate", desc=doing, leave=False, disable=None
    ) as progress:
        for done in compiled(trials, arch, jobs):
            for trial in done:
                if trial.refusal is None:
                    fit[trial.key].append(trial.config)
                else:
                    reasons[trial.refusal] += 1
            progress.update(len(done))
    return fit, reasons


def entry(found: Verdict, device: torch.device) -> Entry:
    """What a table keeps of a verdict."""
    dtype, dims, bucket = found.key.entry
    return Entry(
        version=TUNABLE[found.key.op].version,
        device=tuning.device_name(device),
        dtype=dtype,
        dims=dims,
        bucket=bucket,
        config=found.best.config,
        us=round(found.best.us, 2),
        default_us=round(found.default.us, 2),
        library_us=None if found.library is None else round(found.library.us, 2),
        triton=version("triton"),
        date=datetime.now(UTC).date().isoformat(),
    )


def line(found: Verdict) -> str:
    """A verdict for people to read."""
    best, default, library = found.best, found.default, found.library
    what = "the heuristic's" if best is default else f"heuristic {default.us:.2f}"
    beside = "" if library is None else f", {library.config['backend']} {library.us:.2f}"
    return (
        f"{found.key}: {best.us:.2f} ± {best.noise:.2f} µs {describe(best.config)}; {what}{beside}"
    )


def describe(config: Config) -> str:
    """A configuration in a few words: "dot BLOCK_M=16 BLOCK_N=64 …", "cublas"."""
    meta = (f"{name}={value}" for name, value in config.get("meta", {}).items())
    return " ".join((str(config.get("kernel", config["backend"])), *meta))


def _is_measured(key: Key, device: torch.device, options: Options) -> bool:
    name, at = tuning.device_name(device), TUNABLE[key.op].version
    found = tuning.read(_path(key, device, options))
    return any(e.key == (name, *key.entry) and e.version == at for e in found)


def _path(key: Key, device: torch.device, options: Options) -> Path:
    return tuning.table_path(key.op, sm(device), options.table)
