"""A model's folder, on this machine or from the hub, and what its small files say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import CONFIG_MAPPING

from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.checkpoint import SINGLE, shard_names
from tlk.models.families import FAMILIES

SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Configs, index and tokenizer; the weights are asked for by their names in the index."""

QUANTIZATION = ("quantization_config", "compression_config")
"""Fields of config.json that say how its weights are stored."""

GENERATION = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
)


def snapshot(path: str) -> Path:
    """The folder `path`, or a copy of the hub's model of that id, downloaded if it is not here yet.

    Only safetensors files that belong to the model are downloaded. Raises CheckpointError if there
    is neither such a folder nor such a model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).startswith(("/", ".", "~")):
        raise CheckpointError(f"{path} is no folder, and not the id of a model on the hub either")
    try:
        folder = Path(str(snapshot_download(path, allow_patterns=list(SMALL))))
        weights = sorted({SINGLE, *shard_names(folder)})
        # the same commit, whatever has been pushed meanwhile
        return Path(str(snapshot_download(path, revision=folder.name, allow_patterns=weights)))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"{path} is no folder, and the hub does not give a model of that id: {error}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The fields of config.json in the folder `path`, or of the file `path`, as they stand there."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no config.json: not a model folder"
            if path.is_dir()
            else f"{path} is no file"
        )
    return _read(file)


def read_quantization(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the checkpoint in `folder`, whose config.json has `fields`, says that it is quantized; None: not.

    That is config.json's quantization_config, else quantize_config.json or quant_config.json (AutoGPTQ
    and AutoAWQ of old), else hf_quant_config.json (ModelOpt), which says more than its config.json.
    """
    own = fields.get("quantization_config") or fields.get("compression_config")
    modelopt = folder / "hf_quant_config.json"
    if modelopt.is_file() and (not own or str(own.get("quant_method")).startswith("modelopt")):
        return _read(modelopt)
    if own:
        return dict(own)
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            return _read(folder / name)
    return None


def complete_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `fields` of a config.json with the defaults of transformers where it leaves them out.

    How the file is quantized (`read_quantization`) is left out: it is nothing of the model. Raises
    UnsupportedError for a model_type that tlk does not run, and CheckpointError for values that
    transformers refuses.
    """
    kind, known = fields.get("model_type"), ", ".join(FAMILIES)
    if kind not in FAMILIES:
        raise UnsupportedError(f"model_type {kind!r} is of no family that tlk knows: {known}")
    model = {name: value for name, value in fields.items() if name not in QUANTIZATION}
    try:
        return dict(CONFIG_MAPPING[kind].from_dict(model).to_dict())
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the {kind} config is not valid: {error}") from error


def generation_defaults(path: str) -> dict[str, Any]:
    """How the model at `path` wants to generate: generation_config.json, else config.json.

    "eos_token_id": a list, empty where there is none; "pad_token_id" and "bos_token_id": an int or
    None; and those of do_sample, temperature, top_p, top_k, min_p, repetition_penalty and
    max_new_tokens that the file sets.
    """
    folder = snapshot(path)
    file = folder / "generation_config.json"
    config = read_config(folder)
    found = _read(file) if file.is_file() else config
    ids = {name: _token_ids(found, name) for name in ("eos", "pad", "bos")}
    if not ids["eos"]:
        ids["eos"] = _token_ids(config, "eos")
    how = {name: found[name] for name in GENERATION if found.get(name) is not None}
    return {
        "eos_token_id": ids["eos"],
        "pad_token_id": next(iter(ids["pad"]), None),
        "bos_token_id": next(iter(ids["bos"]), None),
        **how,
    }


def _token_ids(fields: Mapping[str, Any], name: str) -> list[int]:
    value = fields.get(f"{name}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{name}_token_id must be one or several token ids, got {value!r}")
    return ids


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is corrupt: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} is corrupt: it holds no JSON object")
    return fields
