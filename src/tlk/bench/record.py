"""What a run of kernel benchmarks leaves behind: lines of JSON, and CSV.

Files of results that are committed, `bench/results/<gpu>.jsonl`, take no row whose goal names a peer
that the row has no time of, none without a commit, and none of another GPU.
"""

import csv
import io
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlk.bench.goals import Goal, lacking
from tlk.bench.kernels import PeerResult, Row
from tlk.bench.limits import Bound
from tlk.bench.timing import Spread

COLUMNS = (
    *("op", "shape", "dtype", "operands", "implementation", "version", "median_us", "p20_us"),
    *("p80_us", "repeats", "speed", "unit", "of_ceiling", "ceiling", "times_as_fast", "reason"),
)


ABOUT = ("command", "time", "commit", "gpu", "cpu", "versions", "limits")


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is not kept, and why."""

    row: Row
    why: str

    def __str__(self) -> str:
        return f"{self.row}: {self.why}"


def to_dict(row: Row, run: Mapping[str, Any]) -> dict[str, Any]:
    """The row and what it was measured with, for JSON."""
    return {
        "benchmark": "kernel",
        **run,
        "op": row.op,
        "shape": row.shape,
        "dtype": row.dtype,
        "operands": row.operands,
        **_figures(row, row.seconds),
        "bytes": row.bytes,
        "flops": row.flops,
        "ceiling": {**asdict(row.bound), "reached": round(row.of_limit(), 4)},
        "peers": {name: _peer_dict(row, name, peer) for name, peer in row.peers.items()},
    }


def _figures(row: Row, seconds: Spread) -> dict[str, Any]:
    return {
        "median_us": round(seconds.median * 1e6, 3),
        "p20_us": round(seconds.p20 * 1e6, 3),
        "p80_us": round(seconds.p80 * 1e6, 3),
        "repeats": seconds.repeats,
        "speed": round(row.speed(seconds.median), 4),
        "unit": row.bound.unit,
    }


def _peer_dict(row: Row, name: str, peer: PeerResult) -> dict[str, Any]:
    if peer.seconds is None:
        return {"reason": peer.reason, "version": peer.version}
    figures = _figures(row, peer.seconds)
    return {**figures, "ratio": round(row.ratio(name) or 0.0, 4), "version": peer.version}


def from_dict(record: Mapping[str, Any]) -> Row:
    """The row that `to_dict` wrote. Raises KeyError for another record."""
    ceiling = record["ceiling"]
    peers = {
        name: PeerResult(
            _spread(peer) if "median_us" in peer else None, peer.get("reason"), peer["version"]
        )
        for name, peer in record["peers"].items()
    }
    return Row(
        **{name: record[name] for name in ("op", "shape", "dtype", "operands", "bytes", "flops")},
        seconds=_spread(record),
        bound=Bound(ceiling["seconds"], ceiling["by"], ceiling["unit"]),
        peers=peers,
    )


def _spread(figures: Mapping[str, Any]) -> Spread:
    median, p20, p80 = (figures[name] * 1e-6 for name in ("median_us", "p20_us", "p80_us"))
    return Spread(median, p20, p80, figures["repeats"])


def read(file: Path) -> list[tuple[Row, dict[str, Any]]]:
    """The rows of a file of lines, the last of each case and dtype, each with the run it is of.

    Lines of other benchmarks are passed over. Raises ValueError if there is no row.
    """
    rows: dict[str, tuple[Row, dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("benchmark") == "kernel" and "limits" in record:
            row = from_dict(record)
            rows[f"{row} {row.operands}"] = row, {name: record[name] for name in ABOUT}
    if not rows:
        raise ValueError(f"{file} has no line that `tlk bench kernels --json` wrote")
    return list(rows.values())


def together(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last of several runs on one GPU, with the commands and the commits of all of them."""
    latest = dict(max(runs, key=lambda run: str(run["time"])))
    for name in ("command", "commit"):
        found = dict.fromkeys(str(run[name]) for run in runs if run[name])
        latest[name] = "; ".join(found) or None
    return latest


def to_csv(rows: Iterable[Row], version: str) -> str:
    """One line for each implementation of each row, tlk's first."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        what = {"op": row.op, "shape": row.shape, "dtype": row.dtype, "operands": row.operands}
        ceiling = {"ceiling": row.bound.by, "unit": row.bound.unit}
        own = {"implementation": "tlk", "version": version, "times_as_fast": 1.0}
        share = {"of_ceiling": round(row.of_limit(), 4)}
        table.writerow(what | ceiling | own | share | _figures(row, row.seconds))
        for name, peer in row.peers.items():
            line = what | ceiling | {"implementation": name, "version": peer.version}
            if peer.seconds is None:
                table.writerow(line | {"reason": peer.reason})
                continue
            share = {
                "of_ceiling": round(row.bound.seconds / peer.seconds.median, 4),
                "times_as_fast": round(row.seconds.median / peer.seconds.median, 4),
            }
            table.writerow(line | share | _figures(row, peer.seconds))
    return text.getvalue()


def committed(file: Path) -> bool:
    """Whether `file` is one of the results that are kept with the sources."""
    return file.suffix == ".jsonl" and file.resolve().parts[-3:-1] == ("bench", "results")


def gpu_slug(name: str) -> str:
    """The file's name for a GPU: "NVIDIA H100 80GB HBM3" is h100."""
    words = [
        w for w in re.split(r"[\s_]+", name) if not re.fullmatch(r"(?i)nvidia|geforce|tesla", w)
    ]
    if words and words[0].upper() == "RTX" and len(words) > 1:
        return "".join(words[:2]).lower()
    return words[0].lower() if words else "gpu"


def commit(folder: Path) -> str | None:
    """The commit that `folder` is at, "-dirty" if tracked files differ.

    None outside of a repository, and in one that does not track the folder: the site-packages of
    somebody else's project.
    """
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["ls-files", "--error-unmatch", "."],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "-uno"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[1] + ("-dirty" if run[2] else "")


def append(
    file: Path, rows: Sequence[Row], run: Mapping[str, Any], goals: Sequence[Goal]
) -> list[Refused]:
    """Append the rows as lines of JSON; those that a file of committed results must not take come back."""
    kept: list[Row] = []
    refused: list[Refused] = []
    for row in rows:
        why = _why_not(row, run, file, goals) if committed(file) else None
        if why is None:
            kept.append(row)
        else:
            refused.append(Refused(row, why))
    if kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(to_dict(row, run)) + "\n" for row in kept)
    return refused


def _why_not(row: Row, run: Mapping[str, Any], file: Path, goals: Sequence[Goal]) -> str | None:
    if not run.get("gpu") or gpu_slug(run["gpu"]) != file.stem:
        return f"measured on {run.get('gpu') or 'no GPU'}, and not on that of {file.name}"
    if not run.get("commit"):
        return "no commit is known: give --commit"
    missing = lacking(row, goals)
    said = "; ".join(f"{peer} ({why})" for peer, why in missing.items())
    return f"has no time of {said}, which its goal names" if missing else None
