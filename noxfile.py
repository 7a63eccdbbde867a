"""Everything that is checked, runnable here: `nox` for the quick checks, `nox -s gpu` on a GPU.

Without a GPU: lint, types, tests, aot, mutants (what .ci/run runs), aot-all and compat.
"""

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.envdir = ".nox"
nox.options.sessions = ["lint", "types", "tests"]
PROJECT = nox.project.load_toml("pyproject.toml")
# Two workers for two cores: without this every worker's matmuls start a thread a core.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, *groups: str) -> None:
    """Install tlk at the pinned versions, with dependency groups of pyproject.toml."""
    wanted = nox.project.dependency_groups(PROJECT, *groups)
    session.install("-c", "constraints.txt", "-e", ".", *wanted)


@nox.session(reuse_venv=True)
def env(session: nox.Session) -> None:
    """The environment of all sessions that require it: torch is installed once and not five times."""
    install(session, "test", "lint")


def run(session: nox.Session, module: str, *args: str) -> None:
    """Run a module in the environment of `env`."""
    python = Path(
        nox.options.envdir, "env", "Scripts" if sys.platform == "win32" else "bin", "python"
    )
    session.run(str(python), "-m", module, *args, external=True, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=["env"])
def types(session: nox.Session) -> None:
    run(session, "mypy")


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """Kernels run interpreted on a CPU, compiled on a GPU."""
    run(session, "pytest", "-n", "logical", "--dist", "worksteal", *session.posargs)


@nox.session(venv_backend="none", requires=["env"])
def aot(session: nox.Session) -> None:
    """Compile each benchmark case for every SM in one dtype; fail on spills, misfits, scalar loads."""
    run(session, "tlk.bench.aot", *session.posargs)


@nox.session(venv_backend="none", requires=["env"])
def mutants(session: nox.Session) -> None:
    """Plant a sample of the seeded bugs, another at each commit; `nox -s mutants -- --all` for all."""
    run(session, "tests.mutants.run", *(session.posargs or ("--sample", "24")))


@nox.session(name="aot-all")
@nox.parametrize("triton", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
def aot_all(session: nox.Session, triton: str) -> None:
    """Compile in every dtype, with the oldest Triton that tlk supports and those after it."""
    install(session)
    session.install("--no-deps", f"triton=={triton}")
    session.run("python", "-m", "tlk.bench.aot", "--dtype", "all", *session.posargs, env=ONE_THREAD)


@nox.session
def compat(session: nox.Session) -> None:
    """The oldest torch, triton and transformers that tlk supports."""
    oldest = ["torch==2.11.0", "triton==3.6.0", "transformers==5.17.0"]
    session.install("-e", ".", *oldest, *nox.project.dependency_groups(PROJECT, "test"))
    session.run("pytest", "-n", "logical", *(session.posargs or ("tests",)), env=ONE_THREAD)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The same tests compiled, in the environment at hand, one process: memory stays honest."""
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Time every case and its peers on the GPU at hand."""
    session.run("python", "-m", "pytest", *(session.posargs or ("bench",)))
