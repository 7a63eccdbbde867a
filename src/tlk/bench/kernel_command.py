"""The command line of `tlk bench kernels`."""

import argparse
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlk import __version__
from tlk.bench import kernel_table
from tlk.bench.case import Case, load_cases
from tlk.bench.ceilings import machine
from tlk.bench.goals import GOALS, judge
from tlk.bench.kernel_page import require_plots, write_page
from tlk.bench.kernel_peers.peer import PEER_ERRORS, reason
from tlk.bench.kernels import Bench, Row, WrongResultError, dtypes_of, name_of, small
from tlk.bench.limits import Limits, kernel_limits
from tlk.bench.record import append, commit, read, to_csv, together
from tlk.errors import UnsupportedError
from tlk.kernels._device import sm
from tlk.runtime.options import pick_device

LINES = "kernels.jsonl"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """What is measured, and where it goes. Raises ValueError naming the field."""

    names: Sequence[str] = ()
    pattern: str | None = None
    goals: bool = False
    peers: Sequence[str] | None = None
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 20
    json_file: Path | None = None
    out: Path | None = None
    from_file: Path | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.dtype not in ("auto", "all", *DTYPES):
            raise ValueError(f"dtype must be auto, all, {', '.join(DTYPES)}, got {self.dtype!r}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"filter must be a regular expression: {error}") from error

    def command(self) -> str:
        """The command line that measures this."""
        words = ["tlk", "bench", "kernels", *self.names]
        flags = {"filter": self.pattern, "device": self.device, "dtype": self.dtype}
        for name, value in flags.items():
            words += [f"--{name}", value] if value not in (None, "auto") else []
        words += ["--goals"] if self.goals else []
        words += ["--peers", *self.peers] if self.peers is not None else []
        words += ["--repeats", str(self.repeats)] if self.repeats != 20 else []
        return shlex.join(words)

    def wants(self, peer: str) -> bool:
        """Whether a peer of this name is measured."""
        return self.peers is None or any(p.lower() in peer.lower() for p in self.peers if p)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `run` takes."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="kernel files or ops, all of them by default"
    )
    parser.add_argument(
        "--list", dest="listed", action="store_true", help="name the cases and measure nothing"
    )
    parser.add_argument(
        "--filter", dest="pattern", metavar="REGEX", help="only cases in whose op-shape it is found"
    )
    parser.add_argument("--goals", action="store_true", help="only cases that a goal is about")
    parser.add_argument(
        "--peers", nargs="*", metavar="PEER", help="only peers whose names contain one of these"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "all", *DTYPES), default="auto", help="each case's first: auto"
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples of each time")
    parser.add_argument(
        "--json", type=Path, dest="json_file", metavar="FILE", help="append a line of JSON per row"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write JSON, CSV, a plot per op and a page there"
    )
    parser.add_argument(
        "--from", type=Path, dest="from_file", metavar="FILE",
        help="measure nothing: show the rows of a file that --json wrote, and hand them to --json and --out",
    )  # fmt: skip
    parser.add_argument("--commit", help="what is measured, where git does not tell")


def run(listed: bool = False, **options: Any) -> int:
    """Measure, print, and write what is wanted; 1 if a kernel failed or a row was refused."""
    chosen = KernelOptions(**options)
    cases = select(chosen)
    if listed:
        print(*(f"{case}  {' '.join(map(name_of, case.dtypes))}" for case in cases), sep="\n")
        return 0
    if chosen.from_file is not None:
        return _show(chosen, chosen.from_file, {case.op for case in cases})
    device = pick_device(chosen.device)
    if device.type == "cpu" and chosen.device != "cpu":
        raise UnsupportedError(
            "the speed of kernels needs a GPU and torch finds none: --list names the cases, "
            "--device cpu times the references of the small ones, `tlk doctor` says what is missing"
        )
    _prepare(chosen)
    limits = kernel_limits(device)
    about = _about(chosen, device, limits)
    print(f"{about['gpu'] or about['cpu']}: {limits}", kernel_table.HEADER, sep="\n", flush=True)
    rows, failed = [], 0
    for found in _measured(cases, chosen, device, limits):
        if isinstance(found, Row):
            rows.append(found)
            print(kernel_table.line(found), flush=True)
            failed += _keep(chosen, found, about)
        else:
            failed += 1
            print(f"tlk: {found}", file=sys.stderr, flush=True)
    _draw(chosen, rows, about, _notes(rows, about, limits))
    return 1 if failed else 0


def _notes(rows: list[Row], about: dict[str, Any], limits: Limits) -> list[str]:
    """What is said under the table, printed."""
    notes = kernel_table.absent(rows)
    notes += kernel_table.verdicts(judge(GOALS, rows, limits, about["gpu"] or ""))
    print(*notes, sep="\n", end="\n" if notes else "")
    return notes


def _show(chosen: KernelOptions, file: Path, ops: set[str]) -> int:
    """Print, and draw if that is wanted, what an earlier run measured."""
    found = [
        (row, run)
        for row, run in read(file)
        if (not chosen.names or row.op in ops) and re.search(chosen.pattern or "", str(row))
    ]
    if not found:
        raise ValueError(f"filter must match a row of {file}, got {chosen.pattern!r}")
    rows, about = [row for row, _ in found], together([run for _, run in found])
    limits = Limits(**about["limits"])
    print(f"{about['gpu'] or about['cpu']}: {limits}", kernel_table.HEADER, sep="\n")
    for row in rows:
        print(kernel_table.line(row))
    _prepare(chosen)
    refused = sum(_keep(chosen, row, run) for row, run in found)
    _draw(chosen, rows, about, _notes(rows, about, limits))
    return 1 if refused else 0


def select(chosen: KernelOptions) -> list[Case]:
    """The cases that are asked for; ValueError naming what there is none of."""
    modules = load_cases()
    ops = {case.op for cases in modules.values() for case in cases}
    if unknown := set(chosen.names) - modules.keys() - ops:
        raise ValueError(
            f"no kernel is called {', '.join(sorted(unknown))}: "
            f"names are {', '.join(sorted(modules.keys() | ops))}"
        )
    names = set(chosen.names)
    cases = [
        case
        for module, its in modules.items()
        for case in its
        if not names or module in names or case.op in names
    ]
    found = [case for case in cases if re.search(chosen.pattern or "", str(case))]
    if chosen.goals:
        named = {f"{goal.op}-{shape}" for goal in GOALS for shape in goal.shapes}
        found = [case for case in found if str(case) in named]
    if not found:
        raise ValueError(f"filter must match a case, got {chosen.pattern!r}: --list names them")
    return found


def _about(chosen: KernelOptions, device: torch.device, limits: Limits) -> dict[str, Any]:
    """What each record says of the run."""
    return {
        "command": chosen.command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": chosen.commit or commit(Path(__file__).parent),
        **machine(device),
        "limits": limits.to_dict(),
    }


def _measured(
    cases: Sequence[Case], chosen: KernelOptions, device: torch.device, limits: Limits
) -> Iterator[Row | str]:
    """A row of each case as it is measured, or why there is none; at last what was left out."""
    bench = Bench(device, limits, chosen.repeats, chosen.wants)
    skipped = Counter[str]()
    for case, dtype in _work(cases, chosen):
        if why := _beyond(case, dtype, device):
            skipped[why] += 1
            continue
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield bench.row(case, dtype)
        except (WrongResultError, *PEER_ERRORS) as error:
            yield f"{case} {name_of(dtype)}: {reason(error)}"
    for why, count in skipped.items():
        print(f"{count} case{'s' * (count > 1)} left out: {why}")


def _beyond(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `device` cannot run the case."""
    if device.type == "cpu":
        return None if small(case, dtype) else "too large for a CPU"
    return None if sm(device) >= case.oldest else f"for sm_{case.oldest} and newer"


def _work(cases: Sequence[Case], chosen: KernelOptions) -> Iterator[tuple[Case, torch.dtype]]:
    wanted = DTYPES.get(chosen.dtype)
    for case in cases:
        for dtype in dtypes_of(case, wanted, every=chosen.dtype == "all"):
            yield case, dtype


def _prepare(chosen: KernelOptions) -> None:
    """Before anything is measured: what is missing to write it, and an empty file for its lines."""
    if chosen.out is not None:
        require_plots()
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / LINES).write_text("")


def _keep(chosen: KernelOptions, row: Row, about: dict[str, Any]) -> int:
    """Append the row to its files now: a run that ends early keeps what it has. How many refuse it."""
    files = [] if chosen.json_file is None else [chosen.json_file]
    files += [] if chosen.out is None else [chosen.out / LINES]
    refused = [one for file in files for one in append(file, [row], about, GOALS)]
    for one in refused:
        print(f"tlk: refused {one}", file=sys.stderr, flush=True)
    return len(refused)


def _draw(chosen: KernelOptions, rows: list[Row], about: dict[str, Any], notes: list[str]) -> None:
    if chosen.out is not None:
        (chosen.out / "kernels.csv").write_text(to_csv(rows, __version__), encoding="utf-8")
        write_page(chosen.out, rows, about, notes)
