"""The kernels that are written in Gluon, for one SM, beside a portable one each.

Gluon moves between versions of Triton: such a module, `<name>_sm90.py`, states in `missing()` why it
cannot run here, and one that cannot even be imported is as good as absent. The portable kernel runs then.
"""

import pkgutil
from importlib import import_module
from pathlib import Path

import triton

SUFFIX = "_sm90"


def gluon_kernels() -> dict[str, str | None]:
    """Why each of them cannot run with this Triton, or None; by name, without what it is for."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return {
        name.removesuffix(SUFFIX).strip("_"): _missing(f"{__package__}.{name}")
        for name in names
        if name.endswith(SUFFIX)
    }


def untested(versions: tuple[str, ...]) -> str | None:
    """Why a kernel that was right on a GPU with these versions of Triton cannot run here, or None."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter has no Gluon"
    if not triton.__version__.startswith(versions):
        return f"the kernel is untested with Gluon of triton {triton.__version__}"
    return None


def _missing(module: str) -> str | None:
    try:
        reason: str | None = import_module(module).missing()
    except ImportError as error:
        return f"triton {triton.__version__} has another Gluon: {error}"
    return reason
