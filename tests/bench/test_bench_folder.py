"""What `nox -s bench` collects."""

import os
import subprocess
import sys
from pathlib import Path

from tlk.bench.case import load_cases

ROOT = Path(__file__).parents[2]


def test_every_module_of_cases_has_its_benchmark():
    for name in load_cases():
        file = ROOT / "bench" / f"bench_{name}.py"
        assert f"from tlk.bench.cases.{name} import CASES" in file.read_text(encoding="utf-8")


def test_the_time_of_a_calibrated_layer_is_taken_anywhere():
    """On a tiny layer where there is no GPU."""
    command = [sys.executable, "-m", "pytest", "bench/bench_quantize.py", "-q", "-k", "nearest"]
    # a worker of this run would not measure
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "test_a_layer[nearest]" in done.stdout, done.stdout[-2000:]
