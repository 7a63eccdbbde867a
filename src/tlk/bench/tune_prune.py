"""Drop candidates that cannot be the fastest by looking at their machine code, before anything is timed.

What the ahead-of-time gate refuses (tlk.kernels.aot) is refused here: a block over the shared memory,
spills, a dot without tensor cores, local memory in the main loop, scalar loads. Compilation runs in
forked processes that never touch the GPU, one for each configuration; its results stay in Triton's
cache, so that the GPU finds every kernel compiled.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from tlk.bench.case import Inputs
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Key
from tlk.kernels import tuning
from tlk.kernels.aot import Failure, dry_run, forked, measure, violations
from tlk.kernels.tunable import TUNABLE
from tlk.kernels.tuning import Config


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate at a key; `refusal`: what its machine code has against it."""

    key: Key
    config: Config
    refusal: str | None = None


def spelled(config: Config) -> str:
    """A configuration as JSON: equal ones are spelled alike."""
    return json.dumps(config, sort_keys=True)


def distinct(configs: Iterable[Config]) -> list[Config]:
    """`configs` without repetitions, in their order."""
    return list({spelled(config): config for config in configs}.values())


def compiled(trials: Iterable[Trial], arch: int, jobs: int) -> Iterator[list[Trial]]:
    """Compile `trials` for `arch`, `jobs` processes at a time; yields them with their refusals.

    Those of one op that differ in its launch or shape alone come together, as one process ends.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_kernel(trial), []).append(trial)
    parts = list(groups.values())
    calls: list[Callable[[], list[str | None]]] = [partial(_refusals, part, arch) for part in parts]
    for index, result in forked(calls, jobs):
        part = parts[index]
        if isinstance(result, Failure):  # LLVM ends the process on some kernels
            result = [result.message.strip().splitlines()[-1]] * len(part)
        yield [Trial(t.key, t.config, why) for t, why in zip(part, result, strict=True)]


def _kernel(trial: Trial) -> str:
    launch_only = TUNABLE[trial.key.op].launch_only
    meta = trial.config.get("meta", {})
    code = {name: value for name, value in meta.items() if name not in launch_only}
    return f"{trial.key.op} {trial.key.dtype} {spelled({**trial.config, 'meta': code})}"


def _refusals(trials: Sequence[Trial], arch: int) -> list[str | None]:
    """In a process of its own: what is wrong with each trial, or None."""
    seen: dict[tuple[str, bool], list[str]] = {}
    return [next(iter(_wrong(trial, arch, seen)), None) for trial in trials]


def _wrong(trial: Trial, arch: int, seen: dict[tuple[str, bool], list[str]]) -> list[str]:
    key = trial.key
    call = CALLS[key.op].make(key)
    inputs = call.inputs(Inputs("cpu", key.dtype, empty=True))
    try:
        with dry_run(arch) as launches, tuning.forced(key.op, trial.config):
            call.run(*inputs)
    except (OutOfResources, CompilationError, PTXASError) as error:
        return [str(error).strip().splitlines()[-1]]
    found = []
    for launch in launches:
        what = launch.compiled.hash, launch.large
        if what not in seen:
            seen[what] = violations(measure(launch.compiled), launch.large)
        found += seen[what]
    return found
