"""Load checkpoints through transformers, strictly: safetensors only, and every key accounted for."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlk.errors import CheckpointError

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
    """Raise CheckpointError unless `folder` holds a whole safetensors checkpoint.

    Reads headers only: their sizes must agree with the files', and the index with the files' keys.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: not a model folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        also = (
            f"; pickles are not loaded ({', '.join(pickles)}), save them as safetensors"
            if pickles
            else ""
        )
        raise CheckpointError(f"{folder} holds no .safetensors file{also}")
    keys: dict[str, set[str]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                keys[file.name] = set(f.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt or truncated: {error}") from error
    if (folder / INDEX).is_file():
        _check_index(folder, keys)


def _check_index(folder: Path, keys: dict[str, set[str]]) -> None:
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder / INDEX} is corrupt: {error!r}") from error
    if absent := sorted(set(where.values()) - set(keys)):
        raise CheckpointError(f"{folder} lacks the shards {', '.join(absent)}")
    if missing := sorted(k for k, file in where.items() if k not in keys[file]):
        raise CheckpointError(
            f"{folder}: the shards lack keys that the index names: {', '.join(missing)}"
        )
