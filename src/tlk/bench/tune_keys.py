"""Which shapes to tune for: the linear layers of a model, each at a few numbers of tokens.

And what the tuner must know of an op to call it there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlk.bench.case import Inputs
from tlk.bench.shapes import SHAPES
from tlk.hf.hub import complete_config, read_config
from tlk.kernels.tuning import Config, bucket
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES
from tlk.models.layers import Linear, RMSNorm

RUNNING = tuple(2**b for b in range(14))
"""Tokens of a step: the upper ends of the buckets from 1 to 8192."""

MOST_LOGITS = 256
"""Rows that an output head is tuned for at most: it sees one of each sequence."""

EPS = 1e-5
"""Of every norm."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer's weight [outputs, inputs], and what the layers before and after it are.

    norm: an RMSNorm before it; gated: [gate; up] with their activation after it; residual: added to
    the residual stream; head: gives logits.
    """

    outputs: int
    inputs: int
    norm: bool = False
    gated: bool = False
    residual: bool = False
    head: bool = False


PARTS = {
    "qwen3-30b-a3b": (  # what is dense in it
        Projection(5120, 2048, norm=True),
        Projection(2048, 4096, residual=True),
        Projection(151936, 2048, norm=True, head=True),
    )
}
"""Models of families that tlk does not run yet, of which it has some layers."""


@dataclass(frozen=True, slots=True)
class Key:
    """One row of a table to be measured: `op` at the top of a bucket, for a layer that runs it."""

    op: str
    dtype: torch.dtype
    dims: tuple[int, ...]
    running: int
    layer: Projection

    @property
    def entry(self) -> tuple[str, tuple[int, ...], int]:
        """dtype, dims and bucket, as an entry of a table has them."""
        return str(self.dtype).removeprefix("torch."), self.dims, bucket(self.running)

    def __str__(self) -> str:
        return f"{self.op} {'×'.join(map(str, self.dims))} {self.entry[0]} M{self.running}"


@dataclass(frozen=True, slots=True)
class Call:
    """`run(*inputs(Inputs(...)))` executes the op once, `reference` in float32 on the same inputs.

    `run` may write over its inputs, as a model would. library: the configuration that leaves the
    work to a library, measured beside the others.
    """

    inputs: Callable[[Inputs], tuple[Any, ...]]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    library: Config | None = None


@dataclass(frozen=True, slots=True)
class Calls:
    """For which layers a model runs an op, as `dims` or None, and how it calls it there.

    dtype: what its tables are keyed by if it is not the model's own.
    """

    dims: Callable[[Projection], tuple[int, ...] | None]
    make: Callable[[Key], Call]
    dtype: torch.dtype | None = None


def model_weight(new: Inputs, n: int, k: int) -> Tensor:
    """Random as a model's [n, k]: outputs of the size of the inputs."""
    weight = new.randn(n, k)
    return weight if new.empty else weight.mul_(k**-0.5)  # gigabytes that nobody will read


def projections(model: str) -> list[Projection]:
    """The distinct linear layers of a name in `SHAPES` or `PARTS`, a config.json or its folder.

    Raises ValueError for another name, UnsupportedError for a family that tlk does not know.
    """
    if model in PARTS:
        return list(PARTS[model])
    path = Path(model)
    if model not in SHAPES and not path.exists():
        known = ", ".join((*SHAPES, *PARTS))
        raise ValueError(f"shapes must be a config.json, its folder or one of {known}, got {model}")
    fields = complete_config(SHAPES[model] if model in SHAPES else read_config(path))
    config = FAMILIES[fields["model_type"]].config(fields)
    with torch.device("meta"):
        decoder = Decoder(config)
    return list(dict.fromkeys(_layers(decoder)))


def _layers(decoder: Decoder) -> Iterator[Projection]:
    norm = isinstance(decoder.final_norm, RMSNorm)  # a LayerNorm is always a kernel of its own
    places = {
        "qkv": {"norm": norm},
        "gate_up": {"norm": norm, "gated": True},
        "up": {"norm": norm},
        "out": {"residual": True},
        "down": {"residual": True},
        "lm_head": {"norm": norm, "head": True},
    }
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            place = places[name.rpartition(".")[2]]
            yield Projection(module.out_features, module.in_features, **place)
    if decoder.lm_head is None:
        yield Projection(*decoder.embedding.weight.shape, **places["lm_head"])


def keys(
    ops: Iterable[str],
    layers: Iterable[Projection],
    running: Iterable[int],
    shape: Callable[[str, Projection], tuple[torch.dtype, tuple[int, ...]] | None],
) -> list[Key]:
    """The distinct keys, few tokens first; `shape(op, layer)` gives dtype and dims, or None.

    Of two layers with the same dims, the one before a residual is measured: reading that counts.
    """
    found: dict[tuple[object, ...], Key] = {}
    layers = sorted(set(layers), key=lambda x: (x.outputs, x.inputs, not x.residual, str(x)))
    for tokens in sorted(set(running)):
        for op in ops:
            for layer in layers:
                at = None if layer.head and tokens > MOST_LOGITS else shape(op, layer)
                if at is not None:
                    key = Key(op, *at, tokens, layer)
                    found.setdefault((op, *key.entry), key)
    return list(found.values())
