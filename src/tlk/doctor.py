"""`tlk doctor`: is this machine ready to run kernels, and if not, what to do about it."""

import platform
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from os import W_OK, access
from pathlib import Path
from typing import Literal

import torch
from triton import knobs

from tlk.errors import UnsupportedError
from tlk.kernels import toolchain, tuning
from tlk.kernels._device import sm
from tlk.kernels.gluon import gluon_kernels
from tlk.kernels.tunable import TUNABLE

OLDEST_SM = 75
"""Turing: the first capability that the kernels are compiled for."""

ROOM = 1 << 30
"""Bytes that a cache should have left: compiled kernels of a few models."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found: `ok`, a `note` that stops nothing, or a `fault` with its remedy."""

    name: str
    state: Literal["ok", "note", "fault"]
    message: str

    def __str__(self) -> str:
        return f"{self.state:<6}{self.name:<16}{self.message}"


def check() -> list[Check]:
    """Look at everything that running kernels needs; launches nothing."""
    return [
        _versions(),
        _driver(),
        _gpu(),
        _only_a_note_without_a_gpu(_compiler()),
        _only_a_note_without_a_gpu(_ptxas()),
        _tables(),
        *_gluon(),
        _folder("tlk's cache", tuning.cache_dir()),
        _folder("Triton's cache", Path(knobs.cache.dir)),
    ]


def usable(checks: list[Check]) -> bool:
    """Whether no check found a fault; without a GPU tlk is usable, on its references."""
    return all(c.state != "fault" for c in checks)


def _only_a_note_without_a_gpu(check: Check) -> Check:
    if check.state == "fault" and not torch.cuda.is_available():
        return replace(check, state="note")
    return check


def _versions() -> Check:
    found = []
    for package in ("torch", "triton", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Check("versions", "fault", f"{package} is not installed: pip install {package}")
    return Check("versions", "ok", f"Python {platform.python_version()}, {', '.join(found)}")


def _driver() -> Check:
    built_for = torch.version.cuda
    if not (found := _nvidia_smi()):
        return Check("driver", "note", "no NVIDIA driver answers here: kernels need one")
    if built_for is None:
        return Check(
            "driver",
            "fault",
            f"driver {found}, but this torch was built without CUDA: install one from "
            "https://pytorch.org/get-started/locally",
        )
    if not torch.cuda.is_available():
        return Check(
            "driver",
            "fault",
            f"driver {found} does not run the CUDA {built_for} of this torch: "
            "update the driver, or install a torch built for an older CUDA",
        )
    return Check("driver", "ok", f"{found}, torch is built for CUDA {built_for}")


def _nvidia_smi() -> str:
    """The version of the NVIDIA driver, or nothing."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else ""


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check(
            "GPU", "note", "none: every op runs as its PyTorch reference, correct and slow"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    arch, name = sm(device), torch.cuda.get_device_name(device)
    found = f"{name}, sm_{arch}, {free:.1f} of {total:.1f} GiB free"
    if arch < OLDEST_SM:
        return Check("GPU", "fault", f"{found}: kernels need sm_{OLDEST_SM} (Turing) or newer")
    return Check("GPU", "ok", found)


def _compiler() -> Check:
    try:
        toolchain.require_c_compiler()
    except UnsupportedError as error:
        return Check("C compiler", "fault", str(error))
    found = f"{toolchain.c_compiler()}, headers in {toolchain.python_header().parent}"
    return Check("C compiler", "ok", found)


def _ptxas() -> Check:
    if (release := toolchain.ptxas_version()) is None:
        return Check("ptxas", "fault", "Triton's assembler is missing: reinstall triton")
    return Check("ptxas", "ok", f"release {release}, from Triton's own package")


def _tables() -> Check:
    """Where the configurations of each tunable op come from on this GPU."""
    if not torch.cuda.is_available():
        return Check("tuned tables", "note", "none looked for: they belong to a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        found = tuning.tables(device)
    except ValueError as error:
        return Check("tuned tables", "fault", str(error))
    ops: dict[str, list[str]] = {}
    for op, tunable in TUNABLE.items():
        ops.setdefault(_source(op, tunable.version, device, found), []).append(op)
    state: Literal["ok", "note"] = "ok" if set(ops) <= set(tuning.SOURCES[:2]) else "note"
    return Check("tuned tables", state, "; ".join(f"{s}: {', '.join(o)}" for s, o in ops.items()))


def _source(op: str, version: int, device: torch.device, found: list[tuning.Table]) -> str:
    """The first source that `tuning.lookup` finds anything in for `op`."""
    name = tuning.device_name(device)
    own, shipped, others = tuning.SOURCES
    entries = [(t, e) for t in found if t.op == op for e in t.entries if e.version == version]
    here = [table for table, e in entries if e.device == name]
    if any(table.path != tuning.table_path(op, sm(device), shipped=True) for table in here):
        return own
    if here:
        return shipped
    if devices := sorted({e.device for _, e in entries}):
        return f"{others}, measured on {', '.join(devices)}"
    return f"heuristic for sm_{sm(device)}, not measured"


def _gluon() -> list[Check]:
    """Which kernels have a faster one in Gluon, for sm_90 and some Tritons, and whether it runs here."""
    arch = sm(torch.device("cuda")) if torch.cuda.is_available() else None
    here = "there is no GPU" if arch is None else f"this is sm_{arch}"
    checks = []
    for name, reason in gluon_kernels().items():
        if arch != 90:
            more = f"; with this Triton: {reason}" if reason else ""
            checks.append(Check(name, "ok", f"a kernel in Gluon is for sm_90, {here}{more}"))
        elif reason is None:
            checks.append(Check(name, "ok", "the kernel in Gluon, for sm_90"))
        else:
            slower = f"the portable kernel, slower than the one in Gluon: {reason}"
            checks.append(Check(name, "note", slower))
    return checks


def _folder(name: str, path: Path) -> Check:
    there = next(p for p in (path, *path.parents) if p.exists())
    if not (there.is_dir() and access(there, W_OK)):
        return Check(name, "fault", f"{path} cannot be written: change the owner of {there}")
    free = shutil.disk_usage(there).free
    left = f"{path}, {free / 2**30:.1f} GiB free"
    return Check(name, "ok", left) if free >= ROOM else Check(name, "note", f"{left}: nearly full")
