"""What the kernels are meant to reach, as data: a must and a stretch for each row, and its peers.

The figures were measured on one NVIDIA H200 (torch 2.11.0+cu130, triton 3.6.0), all peers in one run.
Ratios count, since machines differ: a sum of microseconds is the goal on an H200, and elsewhere its
ratio to the best peer on that machine. No goal lies beyond 0.97 of the ceiling that was measured in
the same run: where it would, that share of the ceiling counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tlk.bench.kernels import Row
from tlk.bench.limits import Limits

REACHABLE = 0.97


@dataclass(frozen=True, slots=True)
class Target:
    """`value` times as fast as the best peer, of the bandwidth of a copy, or microseconds in sum."""

    kind: Literal["peer", "copy", "µs"]
    value: float

    def __str__(self) -> str:
        unit = {"peer": "× the best peer", "copy": " of copy", "µs": " µs"}[self.kind]
        return f"{self.value:g}{unit}"


@dataclass(frozen=True, slots=True)
class Goal:
    """The rows `shapes` of `op`, taken together, against the fastest of `peers`.

    A row that is kept must have all of `peers`. `peer_us`: what the best of them took in sum, in the
    run that the targets come from.
    """

    name: str
    op: str
    shapes: tuple[str, ...]
    peers: tuple[str, ...]
    must: Target
    stretch: Target | None = None
    peer_us: float = 0.0
    dtype: str = "bfloat16"

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Those of `rows` that the goal is about."""
        return [
            r for r in rows if r.op == self.op and r.dtype == self.dtype and r.shape in self.shapes
        ]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal fares in a run; None where a row or every peer is missing."""

    goal: Goal
    seconds: float | None = None
    best_peer: str | None = None
    ratio: float | None = None
    must: bool | None = None
    stretch: bool | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.goal.name}: not measured"
        parts = [f"{self.goal.name}: {self.seconds * 1e6:.1f} µs"]
        if self.ratio is not None:
            parts.append(f"{self.ratio:.2f}× {self.best_peer}")
        parts.append(f"must ({self.goal.must}) {_met(self.must)}")
        if self.goal.stretch is not None:
            parts.append(f"stretch ({self.goal.stretch}) {_met(self.stretch)}")
        return ", ".join(parts)


def _met(met: bool | None) -> str:
    return {True: "met", False: "missed", None: "not judged"}[met]


def judge(goals: Iterable[Goal], rows: Sequence[Row], limits: Limits, gpu: str) -> list[Verdict]:
    """The verdict on each goal of which at least one row was measured."""
    found = [(goal, goal.rows(rows)) for goal in goals]
    return [_verdict(goal, mine, limits, gpu) for goal, mine in found if mine]


def _verdict(goal: Goal, rows: list[Row], limits: Limits, gpu: str) -> Verdict:
    if {r.shape for r in rows} != set(goal.shapes):
        return Verdict(goal)
    seconds = sum(r.seconds.median for r in rows)
    best, taken = min(
        ((name, _sum(name, rows)) for name in goal.peers), key=lambda pair: pair[1]
    )  # fmt: skip
    least = sum(r.bound.seconds for r in rows) / REACHABLE

    def met(target: Target | None) -> bool | None:
        if target is None:
            return None
        if target.kind == "copy":
            allowed = sum(r.bytes for r in rows) / (target.value * limits.copy)
        elif target.kind == "µs" and "H200" in gpu:
            allowed = target.value * 1e-6
        elif taken == float("inf"):
            return None
        elif target.kind == "µs":
            allowed = taken * target.value / goal.peer_us
        else:
            allowed = taken / target.value
        return seconds <= max(allowed, least)

    known = taken < float("inf")
    return Verdict(
        goal, seconds, best if known else None, taken / seconds if known else None,
        met(goal.must), met(goal.stretch),
    )  # fmt: skip


def _sum(peer: str, rows: list[Row]) -> float:
    """Seconds of `peer` over all rows; infinity if it lacks one."""
    results = [r.peers[peer].seconds if peer in r.peers else None for r in rows]
    return sum(float("inf") if s is None else s.median for s in results)


def lacking(row: Row, goals: Iterable[Goal]) -> dict[str, str]:
    """The peers that `row` must have and has no time of, with the reason."""
    named = {peer for goal in goals if goal.rows([row]) for peer in goal.peers}
    missing = {}
    for peer in sorted(named):
        result = row.peers.get(peer)
        if result is None or result.seconds is None:
            missing[peer] = "was not asked for" if result is None else str(result.reason)
    return missing


LAYERS = ("N6144-K4096", "N4096-K4096", "N28672-K4096", "N4096-K14336")
ATTENTION = ("flashinfer fa3", "torch cudnn", "torch flash")


def _layer(m: int, suffix: str = "", prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}M{m}-{layer}{suffix}" for layer in LAYERS)


def _peer(value: float) -> Target:
    return Target("peer", value)


def _us(value: float) -> Target:
    return Target("µs", value)


COPY = Target("copy", 0.92)


def _attention() -> Iterable[Goal]:
    for head, name, must in (("D=128", "mha", 0.92), ("D=64", "d64", 0.90)):
        for mask, infix in (("causal", ""), ("full", "full-")):
            for n in (4096, 16384):
                yield Goal(
                    f"flash attention {head} {mask} S={n}", "flash_attention",
                    (f"{name}-{infix}{n}",), ATTENTION, _peer(must), _peer(1.0),
                )  # fmt: skip


def _decode() -> Iterable[Goal]:
    for batch, length in (
        (1, 131072), (16, 4096), (32, 4096), (128, 1024), (128, 8192), (256, 512),
    ):  # fmt: skip
        shape = f"decode-B{batch}-S{length}"
        yield Goal(f"paged {shape}", "paged_attention", (shape,), ("flashinfer",), _peer(1.0), COPY)


def _rows() -> Iterable[Goal]:
    for op in ("rms_norm", "add_rms_norm"):
        yield Goal(f"{op} T=8192", op, ("T8192-N4096",), ("flashinfer",), _peer(1.0), COPY)
        yield Goal(f"{op} T=1", op, ("T1-N4096",), ("flashinfer",), _peer(1.0))
    for t in (1, 8192):
        shapes = (f"T{t}-I14336",)
        yield Goal(f"silu_and_mul T={t}", "silu_and_mul", shapes, ("flashinfer",), _peer(1.0))


def _sampling() -> Iterable[Goal]:
    for setting, name in (("k50-p0.9", "top-k + top-p"), ("p0.9", "top-p")):
        for batch in (1, 32, 128, 512):
            yield Goal(
                f"sampling {name} B={batch}", "sample", (f"S{batch}-V128256-{setting}",),
                ("flashinfer", "flashinfer from probs"), _peer(1.0), _peer(2.0),
            )  # fmt: skip


def _linears() -> Iterable[Goal]:
    for m, must, peer_us in ((1, 114, 120), (16, 116, 122)):
        yield Goal(
            f"bf16 linears M={m}", "matmul", _layer(m), ("torch",), _us(must), _us(110), peer_us
        )


def _quantized() -> Iterable[Goal]:
    """Of what a variant's rows took: M, must, stretch and the best peer, in sum."""
    few, many, bnb = ("tinygemm", "gemlite"), ("cublas bf16", "gemlite"), ("bitsandbytes",)
    for variant, m, peers, must, stretch, peer_us in (
        ("int4", 1, few, 49, 34, 69), ("int4", 16, few, 80, 45, 183),
        ("int4", 64, many, 115, 70, 130), ("int4", 256, many, 220, 190, 202),
        ("nf4", 1, bnb, 56, 45, 112), ("nf4", 16, bnb, 100, 55, 368),
        ("fp8", 1, ("_scaled_mm",), 76, 60, 113), ("int8", 1, ("_scaled_mm",), 76, 60, 113),
    ):  # fmt: skip
        yield Goal(
            f"{variant} weights, linears M={m}", "dequant_mm", _layer(m, prefix=f"{variant}-"),
            peers, _us(must), _us(stretch), peer_us,
        )  # fmt: skip


def _products() -> Iterable[Goal]:
    yield Goal(
        "fp8 linears M=16", "scaled_mm", _layer(16, "-fp8"), ("_scaled_mm",), _us(76), _us(60), 101
    )
    for kind, peer, must, stretch in (
        ("fp8", "_scaled_mm", 0.95, 1.0),
        ("int8", "_int_mm", 1, 1.3),
    ):
        shapes = (f"M8192-N8192-K8192-{kind}",)
        yield Goal(
            f"{kind} matmul 8192³", "scaled_mm", shapes, (peer,), _peer(must), _peer(stretch)
        )


GOALS: tuple[Goal, ...] = (
    *(*_attention(), *_decode(), *_rows(), *_sampling()),
    *(*_linears(), *_quantized(), *_products()),
)
