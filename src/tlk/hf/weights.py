"""A decoder from a checkpoint's files, without a model of transformers in between.

The headers are checked first: what is missing, left over or misshapen is an error before anything
is allocated. Then the decoder is built empty, in its dtype on its device, and the tensors stream
into their rows of its fused parameters, in the order in which they lie in the files. One tensor is in
host memory at a time, mapped from its file; with several ranks only a rank's own part is read. It
costs one pass over the files and no memory beyond the parameters.

`random_decoder` has the shapes of a config and no checkpoint, to measure with.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.checkpoint import open_files
from tlk.hf.hub import complete_config, read_config, read_quantization, snapshot
from tlk.hf.quantized_weights import (
    KVScales,
    kv_dtype_of,
    load_quantized_layers,
    plan,
    read_kv_scales,
)
from tlk.models.decoder import Decoder, set_kv_scales
from tlk.models.families import FAMILIES, check_weights, load_weights, weight_sources
from tlk.models.layers import LayerNorm, RMSNorm
from tlk.quant.files.recognise import recognise

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD = "lm_head.weight"
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedDecoder:
    """A decoder and where it came from.

    config: the fields of config.json, completed by the defaults of transformers. bytes: of this
    rank's parameters. seconds: what loading took. quantization: what the checkpoint says of how it is
    quantized; None: it is not. kv_scales: those of an 8-bit cache, per layer, which the decoder has
    too; empty where there are none.
    """

    decoder: Decoder
    config: dict[str, Any]
    family: str
    dtype: torch.dtype
    bytes: int
    seconds: float
    quantization: Mapping[str, Any] | None = None
    kv_scales: tuple[KVScales | None, ...] = ()


def load_decoder(
    path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> LoadedDecoder:
    """The model at `path`, a folder or a hub id, as a decoder in eval mode on `device`.

    dtype: float32, float16 or bfloat16, or its name; None or "auto" is what config.json names, else
    that of the embedding in the file. A config that ties lm_head to the embedding makes them one
    tensor: the file may hold lm_head too, but only an equal one. Layers that the checkpoint stores
    quantized stay so, in the formats of tlk.quant.
    Raises CheckpointError, naming file and keys, if the checkpoint is not whole, not safetensors or
    of another model; UnsupportedError for a model_type, quantization or storage that tlk does not run.
    """
    started = time.perf_counter()
    wanted = _parse_dtype(dtype)
    folder = snapshot(path)
    fields = read_config(folder)
    wanted = wanted or _config_dtype(fields)
    quantization = read_quantization(folder, fields)
    scheme = None if quantization is None else recognise(quantization)
    config = complete_config(fields)
    decoder = _on_meta(config)
    sources = weight_sources(FAMILIES[config["model_type"]], decoder.config)
    with open_files(folder) as files:
        tensors = {
            key: InFile(folder / name, file, key)
            for name, file in files.items()
            for key in file.offset_keys()
        }
        quantized = plan(folder, decoder, sources, tensors, scheme)
        dense = {key: tensor for key, tensor in tensors.items() if key in quantized.dense}
        stored = _check(folder, decoder, quantized.sources, dense)
        chosen = wanted or stored
        decoder = decoder.to(chosen).to_empty(device=device)
        size = sum(tensor.bytes for tensor in tensors.values())
        with tqdm(
            total=size, unit="B", unit_scale=True, desc="weights", disable=not progress
        ) as bar:
            load_weights(decoder, quantized.sources, dense, bar.update)
            load_quantized_layers(decoder, quantized, tensors, torch.device(device), bar.update)
        kv_scales = read_kv_scales(decoder, quantized, tensors)
        found = {i: own for i, own in enumerate(kv_scales) if own is not None}
        set_kv_scales(decoder, found, kv_dtype_of(quantization or {}))
    seconds = time.perf_counter() - started
    return LoadedDecoder(
        decoder, config, config["model_type"], chosen, _bytes(decoder), seconds, quantization, kv_scales
    )  # fmt: skip


def random_decoder(
    config: str | Mapping[str, Any],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedDecoder:
    """A decoder of the shapes of `config` with random weights, made on `device`.

    config: a config.json, a folder that holds one, or its fields. dtype None is the config's own, else
    float32. Matrices are normal with a variance of 1 / inputs and norms scale by about 1, so that
    activations keep a plausible size through any depth. The same seed gives the same weights on the
    same device; ranks draw the same numbers for their parts.
    """
    started = time.perf_counter()
    fields = config if isinstance(config, Mapping) else read_config(Path(config).expanduser())
    complete = complete_config(fields)
    chosen = _parse_dtype(dtype) or _config_dtype(fields) or torch.float32
    decoder = _on_meta(complete).to(chosen).to_empty(device=device)
    _randomize(decoder, torch.Generator(device).manual_seed(seed))
    seconds = time.perf_counter() - started
    return LoadedDecoder(
        decoder, complete, complete["model_type"], chosen, _bytes(decoder), seconds
    )


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor in an open safetensors file; indexing it reads that part."""

    file: Path
    opened: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.key).get_shape())

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        bits = re.findall(r"\d+", self.opened.get_slice(self.key).get_dtype())  # F8_E4M3, BOOL
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8

    def read(self) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def dtype(self) -> torch.dtype:
        """UnsupportedError if it is none that tlk runs."""
        name = self.opened.get_slice(self.key).get_dtype()
        if name not in STORED:
            raise UnsupportedError(
                f"{self.file}: {self.key} is stored as {name}; tlk reads {', '.join(STORED)}"
            )
        return STORED[name]

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        try:
            if all(p == slice(0, size) for p, size in zip(part, self.shape, strict=True)):
                return self.opened.get_tensor(self.key)  # mapped, where a slice is copied
            return self.opened.get_slice(self.key)[part]
        except SafetensorError as error:
            raise CheckpointError(f"{self.file}: {self.key} cannot be read: {error}") from error


def _check(
    folder: Path,
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, InFile],
) -> torch.dtype:
    """Raise unless the files hold exactly this decoder; returns the embedding's dtype."""
    try:
        check_weights(decoder, sources, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} does not fit its config.json: {error}") from error
    dtypes = {key: tensor.dtype() for key, tensor in tensors.items()}
    (embedding,) = sources["embedding.weight"]
    if decoder.lm_head is None and HEAD in tensors:
        _check_tied(tensors[HEAD], tensors[embedding])
    return dtypes[embedding]


def _check_tied(head: InFile, embedding: InFile) -> None:
    """Raise CheckpointError if they differ: tying would drop one of them, whichever is right."""
    rows, columns = embedding.shape
    step = max(1, 2**22 // columns)
    parts = [(slice(i, min(i + step, rows)), slice(0, columns)) for i in range(0, rows, step)]
    if head.shape != embedding.shape or not all(
        torch.equal(head[part].float(), embedding[part].float()) for part in parts
    ):
        raise CheckpointError(
            f"{head.file}: {HEAD} differs from the embedding, but config.json ties them; "
            "with tie_word_embeddings false both are loaded"
        )


def _on_meta(config: Mapping[str, Any]) -> Decoder:
    with torch.device("meta"):
        return Decoder(FAMILIES[config["model_type"]].config(config)).eval()


def _bytes(decoder: Decoder) -> int:
    return sum(p.numel() * p.element_size() for p in decoder.parameters())


@torch.no_grad()
def _randomize(decoder: Decoder, generator: torch.Generator) -> None:
    norms = {
        f"{name}.weight": 1 - module.weight_offset
        for name, module in decoder.named_modules()
        if isinstance(module, RMSNorm | LayerNorm)
    }
    for name, parameter in decoder.named_parameters():
        std = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
        parameter.normal_(norms.get(name, 0.0), std, generator=generator)


def _config_dtype(fields: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, by its new field or its old one."""
    name = fields.get("dtype") or fields.get("torch_dtype")
    try:
        return _parse_dtype(name)
    except ValueError as error:
        raise UnsupportedError(f"config.json: {error}") from error


def _parse_dtype(value: object) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    dtype = DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {value}")
    return dtype
