"""Measured kernel configurations: where they lie, and which one a call uses.

    lookup(op, version, device, dtype, dims, running) -> Config | None

`running` is the dimension that changes from call to call (tokens), `dims` are the ones a model
fixes, in the order the op states. A table is a JSON list of entries, one file per op and SM::

    [{"version": 1, "device": "NVIDIA H200", "dtype": "bfloat16", "dims": [6144, 4096],
      "bucket": 4, "config": {"backend": "dot", "BLOCK_N": 32, "num_warps": 4}}, ...]

`bucket` b stands for 2**(b-1) < running <= 2**b. Tables lie in the package (``tuned/<sm>/<op>.json``)
and in the user's cache (``<cache_dir>/tuned/<sm>/<op>.json``). The first of these that has an entry
within `REACH` answers: the user's own measurements on this device, shipped ones on this device, any
on this SM. None sends the caller to its heuristic. Nothing here compiles, times or touches the GPU,
and an SM never reads another SM's table: a tile that fits sm_90 need not fit sm_120.

`record` adds entries to a table while other processes read it or add to it.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, Literal

import torch

from tlk.kernels._device import sm

Config = Mapping[str, Any]
"""What a launcher needs: a "backend" and that backend's parameters."""

SHIPPED = Path(__file__).parent.parent / "tuned"

REACH = 2.0
"""Octaves in any one dimension beyond which a measurement says nothing about a shape."""

Source = Literal[
    "forced", "user cache", "shipped table for this device", "table for this SM", "heuristic"
]
"""Where the configuration of a call comes from; a heuristic has not been measured."""

SOURCES: tuple[Source, ...] = ("user cache", "shipped table for this device", "table for this SM")
"""The tables in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the lookups of a block are to do beside their work."""

    forced: Mapping[str, Config | None]
    seen: set[tuple[str, Source]]


_SCOPE: ContextVar[_Scope | None] = ContextVar("tlk_lookups", default=None)


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement: the best configuration of an op at a shape on a device.

    The rest is where it comes from: median microseconds a call of `config`, of what the heuristic
    had chosen and of what leaves the work to a library, the version of Triton, and the day.
    """

    version: int
    device: str
    dtype: str
    dims: tuple[int, ...]
    bucket: int
    config: Config
    us: float | None = None
    default_us: float | None = None
    library_us: float | None = None
    triton: str | None = None
    date: str | None = None

    @property
    def key(self) -> tuple[str, str, tuple[int, ...], int]:
        """What the measurement is of; a table holds one entry for each."""
        return self.device, self.dtype, self.dims, self.bucket


@dataclass(frozen=True, slots=True)
class Table:
    """The file that holds an op's entries for an SM."""

    op: str
    path: Path
    entries: tuple[Entry, ...]


def cache_dir() -> Path:
    """Where tlk keeps what it measured on this machine: $TLK_CACHE_DIR, else ~/.cache/tlk."""
    configured = os.environ.get("TLK_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "tlk"


def bucket(running: int) -> int:
    """The log2 bucket that holds `running`: 1 → 0, 2 → 1, 3 and 4 → 2, 5 to 8 → 3."""
    return (running - 1).bit_length()


def lookup(
    op: str,
    version: int,
    device: torch.device,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
) -> Config | None:
    """The measured configuration nearest to this call, or None where there is none.

    Depends on shapes, dtype and device only. The first call reads the op's tables, later ones of
    the same shape cost about a microsecond. Raises ValueError naming a table that does not parse.
    """
    found = _lookup(op, version, device, sm(device), dtype, dims, bucket(running))
    if (scope := _SCOPE.get()) is not None:
        found = (scope.forced[op], "forced") if op in scope.forced else found
        scope.seen.add((op, found[1]))
    return found[0]


def source_of(
    op: str,
    version: int,
    device: torch.device,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
) -> Source:
    """Where `lookup` finds its answer to the same arguments."""
    scope = _SCOPE.get()
    if scope is not None and op in scope.forced:
        return "forced"
    return _lookup(op, version, device, sm(device), dtype, dims, bucket(running))[1]


@contextlib.contextmanager
def forced(op: str, config: Config | None) -> Iterator[None]:
    """Make every `lookup` of `op` in the block answer `config`; None leaves it to the heuristic.

    For whoever measures, in this thread. The config is taken as it is: it must fit the call.
    """
    before = _SCOPE.get() or _Scope({}, set())
    token = _SCOPE.set(_Scope({**before.forced, op: config}, before.seen))
    try:
        yield
    finally:
        _SCOPE.reset(token)


@contextlib.contextmanager
def consulted() -> Iterator[set[tuple[str, Source]]]:
    """Collect of every `lookup` in the block, in this thread, its op and where the answer came from."""
    before = _SCOPE.get() or _Scope({}, set())
    seen: set[tuple[str, Source]] = set()
    token = _SCOPE.set(_Scope(before.forced, seen))
    try:
        yield seen
    finally:
        _SCOPE.reset(token)


@lru_cache(maxsize=4096)
def _lookup(
    op: str,
    version: int,
    device: torch.device,
    arch: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running_bucket: int,
) -> tuple[Config | None, Source]:
    name = device_name(device)
    mine, shipped = (_entries(path) for path in _paths(op, arch))
    here = [e for e in mine if e.device == name], [e for e in shipped if e.device == name]
    for entries, source in zip((*here, (*mine, *shipped)), SOURCES, strict=True):
        fitting = [
            e
            for e in entries
            if e.version == version
            and e.dtype == str(dtype).removeprefix("torch.")
            and len(e.dims) == len(dims)
        ]
        if (nearest := _nearest(fitting, dims, running_bucket)) is not None:
            return nearest.config, source
    return None, "heuristic"


def _nearest(entries: Iterable[Entry], dims: tuple[int, ...], running_bucket: int) -> Entry | None:
    best, best_distance = None, float("inf")
    for entry in entries:
        octaves = [float(abs(entry.bucket - running_bucket))]
        octaves += [abs(log2(max(a, 1) / max(b, 1))) for a, b in zip(entry.dims, dims, strict=True)]
        distance = sum(d * d for d in octaves)
        if max(octaves) <= REACH and distance < best_distance:
            best, best_distance = entry, distance
    return best


def tables(device: torch.device) -> list[Table]:
    """Every table that `lookup` may read for `device`, the user's own first."""
    folders = (folder.parent for folder in _paths("_", sm(device)))
    files = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return [Table(path.stem, path, _entries(path)) for path in files]


def forget() -> None:
    """Read the tables again at the next lookup, because they have changed on disk."""
    _lookup.cache_clear()
    _entries.cache_clear()


def device_name(device: torch.device) -> str:
    """The name that table entries carry: as CUDA reports it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table_path(op: str, arch: int, shipped: bool = False) -> Path:
    """The file of an op's entries for an SM: the user's own, or the one in the package."""
    return _paths(op, arch)[shipped]


def record(path: Path, entries: Iterable[Entry]) -> None:
    """Put `entries` into the table at `path`, in the place of older ones of the same keys.

    Readers find the old table or the new one, whole. A lock on the folder lets several processes
    add to a table at once. One line per entry, sorted, so that two tables are easy to compare.
    Raises ValueError naming the table if it does not parse.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        merged = {e.key: e for e in (*read(path), *entries)}
        rows = (json.dumps(_row(merged[key]), ensure_ascii=False) for key in sorted(merged))
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write("[\n" + ",\n".join(rows) + "\n]\n")
        os.chmod(file.name, 0o644)  # temporary files are for their owner alone
        os.replace(file.name, path)
    forget()


def _row(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` alone; the end of the process gives it back too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _paths(op: str, arch: int) -> tuple[Path, Path]:
    """The user's table and the shipped one."""
    return (
        cache_dir() / "tuned" / f"sm_{arch}" / f"{op}.json",
        SHIPPED / f"sm_{arch}" / f"{op}.json",
    )


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of the table at `path` as it is now; none if there is no file.

    Raises ValueError naming a table that does not parse.
    """
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Entry(**{**row, "dims": tuple(row["dims"])}) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"tuning table {path} must be a list of entries with the fields "
            f"{', '.join(Entry.__slots__[:6])}: {error}; delete it or run `tlk tune` again"
        ) from error


_entries = lru_cache(read)
