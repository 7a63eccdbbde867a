"""The house rules a machine can check."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlk.bench.case import load_cases

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/tlk"
FILES = sorted(SOURCE.rglob("*.py"))
# A module may import its own package and everything in the rows above it.
ROWS = [
    {"errors"},
    {"kernels"},
    {"quant"},
    {"parallel"},
    {"models"},
    {"runtime"},
    {"hf"},
    {"quantize"},
    {"optimize"},
    {"llm", "verify", "dropin"},
    {"bench", "demo", "doctor"},
    {"cli"},
]
THIRD_PARTY = {
    "transformers": {
        "hf",
        "dropin.py",
        "bench/peers.py",  # measures it
        "demo/generate.py",  # its TextStreamer prints whole words as tokens come
        "demo/train.py",  # writes the embedded model as a checkpoint of transformers
    },
    "tokenizers": {"hf", "demo/train.py"},  # trains the embedded model's tokenizer
    "safetensors": {"hf"},
    "huggingface_hub": {"hf"},
    "torch.distributed": {"parallel.py"},
    "matplotlib": {"bench/kernel_page.py", "bench/kernel_plot.py"},  # an extra
    # measured if they are installed
    "flashinfer": {"bench/kernel_peers/flashinfer_peers.py"},
    "liger_kernel": {"bench/kernel_peers/liger_peers.py"},
    "gemlite": {"bench/kernel_peers/quantized_peers.py"},
    "bitsandbytes": {"bench/kernel_peers/quantized_peers.py"},
}


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def row(package: str) -> int:
    return next(i for i, packages in enumerate(ROWS) if package in packages)


def imports(path: Path) -> Iterator[str]:
    """What a file imports, down to the name: tlk.hf.cache.PagedCache."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    if (here := package(path)) == "__init__":
        return  # the public names, from everywhere
    for imported in imports(path):
        top, *rest = imported.split(".")
        known = top == "tlk" and any(rest[0] in packages for packages in ROWS)
        assert not known or rest[0] == here or row(rest[0]) < row(here), f"imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_third_parties_stay_where_they_belong(path):
    for imported in imports(path):
        for library, places in THIRD_PARTY.items():
            if imported == library or imported.startswith(f"{library}."):
                assert {package(path), name(path)} & places, f"imports {imported}"


def test_every_public_source_has_its_test():
    for path in FILES:
        if path.stem.startswith("_") or path.stem == "errors":
            continue
        mirrored = ROOT / "tests" / path.relative_to(SOURCE).with_name(f"test_{path.name}")
        if path.parent == SOURCE / "bench/cases":
            mirrored = ROOT / "tests/bench/test_cases.py"
        assert mirrored.exists(), f"{name(path)} has no {mirrored.relative_to(ROOT)}"


@pytest.mark.parametrize("path", [*FILES, ROOT / "tests/interpreter.py"], ids=lambda p: p.name)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_settings_in_the_environment(path):
    if path == SOURCE / "kernels/tuning.py":  # TLK_CACHE_DIR
        return
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not {n.attr for n in nodes if isinstance(n, ast.Attribute)} & {"environ", "getenv"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_error_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if path == SOURCE / "runtime/engine.py" and caught == "Exception":
                continue  # a step that fails must fail its requests, with the cause, and no others
            assert caught not in {"everything", "Exception", "BaseException"}, f"line {node.lineno}"


def ops() -> dict[str, list[str]]:
    """The ops of every kernel file: the launchers under an @op(...)."""
    found: dict[str, list[str]] = {}
    for path in sorted((SOURCE / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Call) and ast.unparse(d.func) == "op" for d in node.decorator_list
            ):
                found.setdefault(path.stem, []).append(node.name.removeprefix("_"))
    return found


@pytest.mark.parametrize("module", ops())
def test_every_op_has_mutants_and_benchmarks(module):
    mutants = ROOT / "tests/mutants" / f"{module}.toml"
    assert mutants.exists(), f"no {mutants.relative_to(ROOT)}"
    seeded, needed = len(tomllib.loads(mutants.read_text())["mutant"]), 3 * len(ops()[module])
    assert seeded >= needed, f"{seeded} mutants, {needed} are needed for {ops()[module]}"
    measured = {case.op for case in load_cases().get(module, ())}
    assert measured >= set(ops()[module]), f"bench/cases/{module}.py measures only {measured}"
    assert (ROOT / f"bench/bench_{module}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_code_comes_with_a_checkpoint(path):
    """Pickles are never read, and a repository's own code is never trusted on the user's behalf."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load")
    assert not {i.partition(".")[0] for i in imports(path)} & {"pickle", "dill", "cloudpickle"}
