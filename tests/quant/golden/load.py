"""Read a file of golden vectors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent
REFERENCE = "="


@dataclass(frozen=True)
class Case:
    """One layer as a tool stored it: tensors by suffix, and the weight [N, K] it makes of them."""

    name: str
    tensors: dict[str, Tensor]
    reference: Tensor
    config: dict[str, Any]
    tolerance: float
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.reference.shape)


def cases(tool: str) -> dict[str, Case]:
    """The cases in the file of `tool`, by name."""
    with safe_open(FOLDER / f"{tool}.safetensors", "pt") as file:
        found = {}
        for name, what in json.loads(file.metadata()["cases"]).items():
            own = {
                key.removeprefix(f"{name}/"): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
                if key.startswith(f"{name}/")
            }
            reference = own.pop(REFERENCE)
            found[name] = Case(
                name, own, reference, what["config"], what["tolerance"], what["share"]
            )
        return found


def check(case: Case, dequantized: Tensor) -> None:
    """Assert that `dequantized` float32 [N, K] is the tool's weight, in the dtype that the tool has it in."""
    ours = dequantized.to(case.reference.dtype).float()
    assert ours.shape == case.reference.shape
    error = (ours - case.reference.float()).abs() / case.reference.float().abs().max()
    assert error.max() <= case.tolerance, f"{case.name}: {error.max()}"
    assert (error > 1e-6).float().mean() <= case.share, (
        f"{case.name}: {(error > 1e-6).sum()} weights"
    )


def script_hash(tool: str) -> tuple[str, str]:
    """The SHA-256 of the script of `tool` as it is, and as it was when it wrote the file."""
    with safe_open(FOLDER / f"{tool}.safetensors", "pt") as file:
        then = file.metadata()["script"]
    return hashlib.sha256((FOLDER / f"make_{tool}.py").read_bytes()).hexdigest(), then


def versions(tool: str) -> dict[str, str]:
    """Of the packages that wrote the file of `tool`."""
    with safe_open(FOLDER / f"{tool}.safetensors", "pt") as file:
        return dict(json.loads(file.metadata()["versions"]))
