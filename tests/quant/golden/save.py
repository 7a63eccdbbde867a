"""Write a file of golden vectors, from a script beside it. Runs in each tool's own environment."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REFERENCE = "="


class Golden:
    """The cases of one tool."""

    def __init__(self, script: str, versions: dict[str, str]) -> None:
        self.script, self.versions = Path(script), versions
        self.tensors: dict[str, torch.Tensor] = {}
        self.cases: dict[str, Any] = {}

    def add(
        self,
        case: str,
        tensors: dict[str, torch.Tensor],
        reference: torch.Tensor,
        config: dict[str, Any],
        tolerance: float = 0.0,
        share: float = 1.0,
    ) -> None:
        """tensors by suffix, and the tool's own dequantized weight, `reference` [N, K].

        tolerance: of the tool's arithmetic, relative to the largest weight; share: of the weights that
        may be off so far, where the tool's codes and its reference are rounded differently.
        """
        for suffix, tensor in (tensors | {REFERENCE: reference}).items():
            self.tensors[f"{case}/{suffix}"] = tensor.detach().clone().contiguous()
        self.cases[case] = {
            "config": config, "shape": list(reference.shape), "tolerance": tolerance,
            "share": share,
        }  # fmt: skip

    def save(self) -> None:
        metadata = {
            "versions": json.dumps(self.versions),
            "script": hashlib.sha256(self.script.read_bytes()).hexdigest(),
            "cases": json.dumps(self.cases),
        }
        path = self.script.with_name(self.script.stem.removeprefix("make_") + ".safetensors")
        save_file(self.tensors, path, metadata)
        print(path, path.stat().st_size, "bytes,", len(self.cases), "cases")
