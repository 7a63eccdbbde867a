"""The fastest configuration of an op at one key: checked against the reference, then timed.

All candidates are timed once; the best of them meet the heuristic's own choice and the library again in
rounds, one after the other, so that a GPU that grows warm or slow is so for all of them. The winner is
faster than the heuristic by more than the noise, or it is the heuristic's choice.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tlk.bench.case import Inputs
from tlk.bench.timing import Spread, copies, time_calls
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Call, Key
from tlk.bench.tune_prune import distinct
from tlk.kernels import tuning
from tlk.kernels.tuning import Config

FINALISTS = 3
ROUNDS = 3
LEAST_GAIN = 0.01
"""Below this share of the time a difference is noise, however narrow the samples' spread."""

ERRORS = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-13}
"""Largest error of a row beside its largest value: a few roundings of inner results and of the output."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A configuration, and microseconds a call: their median and the width of their middle half."""

    config: Config
    us: float
    noise: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a key's table entry becomes. wrong: configurations whose results are not the op's."""

    key: Key
    best: Timed
    default: Timed
    library: Timed | None
    wrong: list[Config]


def verdict(
    key: Key,
    candidates: Sequence[Config],
    default: Config,
    device: torch.device,
) -> Verdict:
    """Time `candidates`, the heuristic's `default` and the library at `key`, random inputs, cold L2.

    Raises RuntimeError if the default's own result is wrong: then there is nothing to compare with.
    """
    call = CALLS[key.op].make(key)
    torch.manual_seed(0)
    inputs = _inputs(call, key, device)
    configs = distinct([default, *([call.library] if call.library else []), *candidates])
    exact = call.reference(*inputs[0])
    right: list[Config] = []
    wrong: list[Config] = []
    for config in configs:
        with tuning.forced(key.op, config):
            try:
                actual = call.run(*_copied(inputs[0]))
            except OutOfResources:  # of a GPU with less than others of its SM
                continue
        (right if _equal(actual, exact, ERRORS[exact.dtype]) else wrong).append(config)
        del actual
    if default not in right:
        raise RuntimeError(f"{key}: the heuristic's {dict(default)} does not run, or wrongly")
    del exact

    def timed(config: Config, repeats: int) -> Spread:
        with tuning.forced(key.op, config):
            return time_calls([partial(call.run, *tensors) for tensors in inputs], repeats, device)

    quick = sorted(right, key=lambda config: timed(config, 3).median)
    known = [c for c in right if c in (default, call.library)]
    final = [*known, *[c for c in quick if c not in known][:FINALISTS]]
    rounds = [[timed(config, 7) for config in final] for _ in range(ROUNDS)]
    times = [_summary(*column) for column in zip(final, zip(*rounds, strict=True), strict=True)]
    library = next((t for t in times if t.config == call.library), None)
    return Verdict(key, winner(times[0], times), times[0], library, wrong)


def winner(default: Timed, times: Sequence[Timed]) -> Timed:
    """The fastest of `times` if it beats `default` by more than the noise of both, else `default`."""
    best = min(times, key=lambda t: t.us)
    noise = max(LEAST_GAIN * default.us, best.noise + default.noise)
    return best if default.us - best.us > noise else default


def _summary(config: Config, rounds: Sequence[Spread]) -> Timed:
    medians = [r.median for r in rounds]
    spread = statistics.median(r.p80 - r.p20 for r in rounds)
    noise = max(spread, max(medians) - min(medians)) / 2
    return Timed(config, 1e6 * statistics.median(medians), 1e6 * noise)


def _inputs(call: Call, key: Key, device: torch.device) -> list[tuple[Any, ...]]:
    """As many sets as keep every call from finding its weight in L2."""
    new = Inputs(str(device), key.dtype)
    first = call.inputs(new)
    nbytes = sum(t.nbytes for t in first if isinstance(t, Tensor))
    return [first, *(_copied(first) for _ in range(copies(nbytes) - 1))]


def _copied(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in tensors)


def _equal(actual: Tensor, exact: Tensor, error: float) -> bool:
    largest = exact.float().abs().amax(-1)
    return bool(((actual.float() - exact.float()).abs().amax(-1) <= error * largest).all())
