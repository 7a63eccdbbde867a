"""Plant seeded bugs in the sources and demand that the tests notice: `python -m tests.mutants.run`.

    python -m tests.mutants.run --all
    python -m tests.mutants.run --only norm matmul
    python -m tests.mutants.run --sample 12      # another twelve for every commit

README.md beside this file says how a mutant is written.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
FIND_TLK = "from importlib.util import find_spec; print(find_spec('tlk').origin)"
TIMEOUT = 300  # seconds: a mutant whose tests hang counts as noticed


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: `replace` becomes `by` in `file`, and `tests` (those that match `select`) must fail."""

    group: str
    name: str
    tests: str
    file: str
    replace: str
    by: str
    select: str = ""

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said to a mutant; `detail` is the end of pytest's output if it survived."""

    mutant: Mutant
    outcome: str
    detail: str = ""


def load(path: Path) -> list[Mutant]:
    """The mutants of one file; KeyError names a field it lacks."""
    content = tomllib.loads(path.read_text())
    return [
        Mutant(
            group=path.stem,
            name=m["name"],
            tests=m.get("tests", content["tests"]),
            file=m.get("file", content["file"]),
            replace=m["replace"],
            by=m["with"],
            select=m.get("select", ""),
        )
        for m in content["mutant"]
    ]


def mutate(source: Path, replace: str, by: str) -> None:
    """Plant a bug in the file `source`; ValueError unless `replace` occurs in it exactly once."""
    text = source.read_text()
    if (count := text.count(replace)) != 1:
        raise ValueError(
            f"must occur exactly once in {source.name}, occurs {count} times: {replace}"
        )
    source.write_text(text.replace(replace, by))


def judge(mutant: Mutant, root: Path = ROOT) -> Verdict:
    """Run the mutant's tests on a copy of the sources that has the bug."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(root / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            mutate(Path(folder) / mutant.file, mutant.replace, mutant.by)
        except (ValueError, FileNotFoundError) as error:
            return Verdict(mutant, "cannot be planted", str(error))
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        found = _run([sys.executable, "-c", FIND_TLK], root, environment).stdout.strip()
        if not found.startswith(str(copy)):
            return Verdict(mutant, "not imported", f"the tests would import {found}")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            mutant.tests,
        ]
        command += ["-k", mutant.select] if mutant.select else []
        try:
            tests = _run(command, root, environment)
        except subprocess.TimeoutExpired:
            return Verdict(mutant, "killed", f"hangs for more than {TIMEOUT} s")
    return Verdict(mutant, outcome(tests.returncode, tests.stdout), tests.stdout[-2000:])


def outcome(code: int, output: str) -> str:
    """What pytest's exit code and summary mean; only a failing test kills a mutant."""
    failed = any(line.startswith("FAILED") for line in output.splitlines())
    if code == 1 and failed:
        return "killed"
    if code == 0:
        return "survived"
    if code == 5:
        return "no test selected"
    return "tests did not run"  # collection or usage error, or an error outside of the test itself


def sample(mutants: Sequence[Mutant], size: int, seed: str) -> list[Mutant]:
    """`size` mutants, the same number from every group as far as possible."""
    chance = random.Random(seed)
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(mutant.group, []).append(mutant)
    # Each group in random order; then everybody's first, everybody's second, ...
    shuffled = [chance.sample(group, len(group)) for group in groups.values()]
    turns = [(turn, chance.random(), m) for group in shuffled for turn, m in enumerate(group)]
    return [m for *_, m in sorted(turns, key=lambda t: t[:2])][:size]


def commit() -> str:
    """The hash of the current commit, which seeds the sample; "" outside of a repository."""
    return _run(["git", "rev-parse", "HEAD"], ROOT, dict(os.environ)).stdout.strip()


def _run(
    command: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.mutants.run", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every mutant (the default)")
    which.add_argument("--sample", type=int, help="so many, spread over the files")
    parser.add_argument("--seed", help="of the sample; the commit's hash if not given")
    parser.add_argument("--only", nargs="+", help="names of files in tests/mutants, without .toml")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    groups = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    if unknown := set(args.only or ()) - groups.keys():
        parser.error(f"--only must name files of {sorted(groups)}, got {sorted(unknown)}")
    mutants = [mutant for name in args.only or groups for mutant in load(groups[name])]
    if args.sample is not None:
        mutants = sample(mutants, args.sample, args.seed or commit())
    return report(mutants, args.jobs)


def report(mutants: Sequence[Mutant], jobs: int) -> int:
    """Judge all `mutants`, print a table; the exit code: 0 if every one was killed."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(judge, mutant) for mutant in mutants]
        done = as_completed(futures)
        verdicts = [
            f.result() for f in tqdm(done, total=len(futures), unit="mutant", mininterval=1)
        ]
    width = max((len(v.outcome) for v in verdicts), default=0)
    for verdict in sorted(verdicts, key=lambda v: str(v.mutant)):
        print(f"{verdict.outcome:<{width}}  {verdict.mutant}")
    failures = [v for v in verdicts if v.outcome != "killed"]
    for verdict in failures:
        print(f"\n{verdict.mutant}: {verdict.outcome}\n{verdict.detail}")
    print(f"{len(verdicts) - len(failures)} of {len(verdicts)} mutants killed")
    return 1 if failures or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
