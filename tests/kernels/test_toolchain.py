import subprocess
from pathlib import Path

import pytest
from triton import knobs

from tlk.errors import UnsupportedError
from tlk.kernels import toolchain


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    toolchain.require_c_compiler.cache_clear()
    yield
    toolchain.require_c_compiler.cache_clear()


def only(*programs):
    return lambda name: f"/usr/bin/{name}" if name in programs else None


def test_gcc_comes_before_clang_as_in_triton(monkeypatch):
    monkeypatch.setattr("shutil.which", only("gcc", "clang"))
    assert toolchain.c_compiler() == "/usr/bin/gcc"
    monkeypatch.setattr("shutil.which", only("clang"))
    assert toolchain.c_compiler() == "/usr/bin/clang"


def test_a_configured_compiler_is_the_only_one_tried(monkeypatch):
    monkeypatch.setenv("CC", "icx")
    monkeypatch.setattr("shutil.which", only("gcc"))
    assert toolchain.c_compiler() is None
    with pytest.raises(UnsupportedError, match=r"the C compiler icx .* apt install gcc"):
        toolchain.require_c_compiler()


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", only())
    with pytest.raises(UnsupportedError, match=r"needs a C compiler .* python3-dev"):
        toolchain.require_c_compiler()


def test_missing_headers_are_named(monkeypatch):
    monkeypatch.setattr("shutil.which", only("gcc"))
    monkeypatch.setattr(toolchain, "python_header", lambda: Path("/nowhere/Python.h"))
    with pytest.raises(UnsupportedError, match=r"/nowhere/Python\.h does not exist"):
        toolchain.require_c_compiler()


def test_a_complete_machine_passes(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", only("clang"))
    monkeypatch.setattr(toolchain, "python_header", lambda: tmp_path / "Python.h")
    toolchain.require_c_compiler()


def test_a_build_function_of_the_users_needs_no_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", only())
    monkeypatch.setattr(knobs.build, "impl", lambda *args: None, raising=False)
    toolchain.require_c_compiler()


def test_headers_are_looked_for_where_triton_looks(monkeypatch):
    asked = []
    monkeypatch.setattr("sysconfig.get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr("sysconfig.get_path", lambda *a: asked.append(a) or "/usr/include/python3")
    assert toolchain.python_header() == Path("/usr/include/python3/Python.h")
    assert asked == [("include", "posix_prefix")]


def test_the_version_of_ptxas_is_the_programs_own(monkeypatch):
    log = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True)
    assert f"release {toolchain.ptxas_version()}" in log.stdout


def test_a_missing_ptxas_has_no_version(monkeypatch):
    class Nvidia:
        @property
        def ptxas(self):
            raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(toolchain.knobs, "nvidia", Nvidia())
    assert toolchain.ptxas_version() is None
