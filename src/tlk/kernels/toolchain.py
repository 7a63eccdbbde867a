"""What Triton needs on this machine before it can launch a kernel.

Triton compiles a kernel with the ptxas of its own wheel, but the small launcher around it with the
C compiler of the host, against the headers of the running Python. A slim container has neither, and
says so only in the middle of the first launch.
"""

import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

from triton import knobs

from tlk.errors import UnsupportedError

INSTALL = "apt install gcc python3-dev (Debian, Ubuntu) or dnf install gcc python3-devel (Fedora)"


def c_compiler() -> str | None:
    """The C compiler that Triton will call: the one configured for it, else gcc, else clang."""
    configured = knobs.build.cc
    if configured is not None:
        return shutil.which(configured)
    return shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path:
    """Where Triton will look for Python.h; the file need not exist."""
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's own scheme, for which Triton reads the standard one
        scheme = "posix_prefix"
    return Path(sysconfig.get_path("include", scheme)) / "Python.h"


def ptxas_version() -> str | None:
    """The release of the assembler that Triton will call, or None if it has none."""
    try:
        return str(knobs.nvidia.ptxas.version)
    except RuntimeError:
        return None


@lru_cache
def require_c_compiler() -> None:
    """Raise UnsupportedError, naming what to install, if Triton cannot build its launchers here."""
    if knobs.build.impl is not None:
        return
    if c_compiler() is None:
        wanted = f"the C compiler {knobs.build.cc}" if knobs.build.cc else "a C compiler"
        raise UnsupportedError(f"Triton needs {wanted} to launch kernels: {INSTALL}")
    if not python_header().is_file():
        raise UnsupportedError(
            f"Triton needs the headers of this Python to launch kernels, and {python_header()} "
            f"does not exist: {INSTALL}"
        )
