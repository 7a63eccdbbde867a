"""What a long run has finished so far, in a folder beside its result, so that it can go on later.

Each piece is one safetensors file with a JSON text beside its tensors. A piece is there whole or not
at all: it is written under another name first.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlk.errors import CheckpointError

STATE = "run.json"


class Partial:
    """The pieces of one run in `folder`, which `about` identifies.

    Raises CheckpointError if the folder holds pieces of another run. `anew` throws away what is there.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, anew: bool = False) -> None:
        self.folder = folder
        if anew and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state, text = folder / STATE, json.dumps(about, indent=2, sort_keys=True)
        if not state.is_file():
            state.write_text(text + "\n", encoding="utf-8")
        elif (before := state.read_text(encoding="utf-8").strip()) != text:
            raise CheckpointError(
                f"{folder} holds an unfinished run that differs in {_difference(before, about)}: "
                "delete it, finish it as it was begun, or do not resume"
            )

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep the piece `name`."""
        path = self._path(name)
        unfinished = path.with_suffix(".unfinished")
        plain = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, unfinished, metadata={"about": json.dumps(about)})
        unfinished.replace(path)

    def has(self, name: str) -> bool:
        """Whether the piece `name` is there."""
        return self._path(name).is_file()

    def load(self, name: str, device: str = "cpu") -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the text of the piece `name`, or None if it is not there."""
        path = self._path(name)
        if not self.has(name):
            return None
        try:
            with safe_open(path, "pt", device=device) as file:
                tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
                return tensors, json.loads(file.metadata()["about"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is corrupt, delete it: {error}") from error

    def remove(self) -> None:
        """Throw all pieces away."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _difference(before: str, about: Mapping[str, Any]) -> str:
    try:
        other = json.loads(before)
    except ValueError:
        return "everything"
    now = json.loads(json.dumps(about))
    return ", ".join(sorted(k for k in {*now, *other} if now.get(k) != other.get(k)))
