"""A checkpoint of which only some modules are in memory at a time, to work through layer by layer.

The decoder is built without memory; `load` gives one of its modules its weights, mapped from the files,
and whoever is done with a layer takes it out of the decoder again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.checkpoint import open_files
from tlk.hf.hub import complete_config, read_config, read_quantization, snapshot
from tlk.hf.weights import DTYPES, HEAD, InFile
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, Place, check_weights, weight_sources
from tlk.models.layers import parameter


@dataclass(frozen=True, slots=True)
class Streamed:
    """A checkpoint in `folder` and its decoder, whose parameters lie nowhere until they are loaded.

    fields: config.json as it stands there; config: completed by the defaults of transformers.
    tensors: all that the files hold; places: where those go that the decoder has. dtype: the model's.
    """

    folder: Path
    fields: Mapping[str, Any]
    config: Mapping[str, Any]
    decoder: Decoder
    sources: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, InFile]
    places: Mapping[str, Place]
    dtype: torch.dtype

    def load(self, module: str, device: torch.device | str) -> None:
        """Give the parameters of the decoder's `module` memory on `device`, and their weights."""
        prefix = f"{module}."
        parts: dict[str, list[str]] = {}
        for key, place in self.places.items():
            if place.parameter.startswith(prefix):
                parts.setdefault(place.parameter, []).append(key)
        for name, keys in parts.items():
            keys.sort(key=lambda key: self.places[key].row)
            whole = torch.cat([self.tensors[key].read().to(device, self.dtype) for key in keys])
            owner, _, own = name.rpartition(".")
            setattr(self.decoder.get_submodule(owner), own, parameter(whole))

    def tensor(self, key: str) -> Tensor:
        """A tensor of the files, as it is stored."""
        return self.tensors[key].read()


@contextmanager
def stream(path: str) -> Iterator[Streamed]:
    """The checkpoint at `path`, a folder or a hub id, open while the block runs.

    Raises CheckpointError and UnsupportedError as `load_decoder` does, and UnsupportedError for a
    checkpoint that is quantized already.
    """
    folder = snapshot(path)
    fields = read_config(folder)
    if (quantization := read_quantization(folder, fields)) is not None:
        method = quantization.get("quant_method")
        raise UnsupportedError(
            f"{folder} is quantized already, with {method}: give the checkpoint it was made from"
        )
    config = complete_config(fields)
    family = FAMILIES[config["model_type"]]
    with torch.device("meta"):
        decoder = Decoder(family.config(config)).eval()
    sources = weight_sources(family, decoder.config)
    with open_files(folder) as files:
        tensors = {
            key: InFile(folder / name, file, key)
            for name, file in files.items()
            for key in file.offset_keys()
        }
        try:
            places = check_weights(decoder, sources, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} does not fit its config.json: {error}") from error
        stored = {key: tensor.dtype() for key, tensor in tensors.items()}
        (embedding,) = sources["embedding.weight"]
        if decoder.lm_head is None and HEAD in tensors:
            _check_tied(folder, tensors, embedding)
        wanted = str(fields.get("dtype") or fields.get("torch_dtype") or "")
        dtype = DTYPES.get(wanted.removeprefix("torch."), stored[embedding])
        yield Streamed(folder, fields, config, decoder, sources, tensors, places, dtype)


def _check_tied(folder: Path, tensors: Mapping[str, InFile], embedding: str) -> None:
    if not torch.equal(tensors[HEAD].read(), tensors[embedding].read()):
        raise CheckpointError(
            f"{folder}: {HEAD} differs from the embedding, but config.json ties them"
        )
