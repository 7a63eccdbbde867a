"""Checkpoints of transformers, strictly: safetensors only, and every key accounted for.

`load` goes through transformers' own loading; `open_files` gives the files to who reads them himself.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlk.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load(kind: Any, path: Any, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """`kind.from_pretrained(path, *args, **kwargs)`, refusing what transformers only warns about.

    kind: a class of transformers, or what else has its `from_pretrained`. Returns the model and the loading info.
    Raises CheckpointError if a file is corrupt, truncated or a pickle, or if keys are missing, left
    over or of another shape (these last are allowed with ignore_mismatched_sizes=True).
    """
    if kwargs.get("use_safetensors") is False:
        raise CheckpointError(
            "use_safetensors=False would load pickles, which can run code; tlk does not"
        )
    kwargs["use_safetensors"] = True
    if Path(path).is_dir():
        check_files(Path(path) / kwargs.get("subfolder", ""))
    allowed = kwargs.pop("ignore_mismatched_sizes", False)
    model, info = kind.from_pretrained(
        path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    problems = {
        "missing": sorted(info["missing_keys"]),
        "left over": sorted(info["unexpected_keys"]),
        "of another shape": [] if allowed else sorted(str(k) for k in info["mismatched_keys"]),
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {text}")
    return model, info


def load_model(path: str, *, dtype: Any = "auto", device: str = "cpu") -> nn.Module:
    """The causal language model at `path` (a folder or a hub id), in eval mode on `device`."""
    model, _ = load(AutoModelForCausalLM, path, dtype=dtype)
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path` (a folder or a hub id)."""
    return AutoTokenizer.from_pretrained(path)


def check_files(folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds a whole safetensors checkpoint; reads headers only."""
    with open_files(folder):
        pass


@contextmanager
def open_files(folder: Path) -> Iterator[dict[str, Any]]:
    """The opened safetensors files of the checkpoint in `folder`, by name, to read tensors from.

    They are those that transformers reads: model.safetensors, else what the index names; a folder
    with neither is read whole. Opening checks the headers: a file's size must agree with them, and
    its keys with the index. Raises CheckpointError.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: not a model folder")
    where = {} if (folder / SINGLE).is_file() else _weight_map(folder)
    names = set(where.values())
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise CheckpointError(f"{folder} lacks the shards {', '.join(absent)}")
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in sorted(names) if names else _file_names(folder):
            try:
                files[name] = stack.enter_context(safe_open(folder / name, "pt"))
            except SafetensorError as error:
                raise CheckpointError(
                    f"{folder / name} is corrupt or truncated: {error}"
                ) from error
        _check_keys(
            folder, where, {(key, name) for name, f in files.items() for key in f.offset_keys()}
        )
        yield files


def _file_names(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if files := sorted(p.name for p in folder.glob("*.safetensors")):
        return files
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    also = f"; pickles are not loaded ({', '.join(pickles)}), save them as safetensors"
    raise CheckpointError(f"{folder} holds no .safetensors file{also if pickles else ''}")


def shard_names(folder: Path) -> set[str]:
    """The files that the index in `folder` names."""
    return set(_weight_map(folder).values())


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every key by the index; empty where there is none."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is corrupt: {error!r}") from error


def _check_keys(folder: Path, where: dict[str, str], found: set[tuple[str, str]]) -> None:
    named = set(where.items())
    if missing := sorted(key for key, _ in named - found):
        raise CheckpointError(
            f"{folder}: the shards lack keys that the index names: {', '.join(missing)}"
        )
    if where and (surplus := sorted(f"{key} in {name}" for key, name in found - named)):
        raise CheckpointError(
            f"{folder}: the shards hold keys that the index does not name: {', '.join(surplus)}"
        )
    times = Counter(key for key, _ in found)
    if twice := sorted(key for key, n in times.items() if n > 1):
        raise CheckpointError(f"{folder}: several files hold the keys {', '.join(twice)}")
