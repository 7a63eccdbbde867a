"""The layers of a checkpoint that are quantized already, kept in files beside what they will become."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlk.hf.partial import Partial
from tlk.hf.streaming import Streamed
from tlk.models.layers import Linear, parameter
from tlk.quant.format import Format, Packed
from tlk.quantize.layers import LayerResult
from tlk.quantize.plan import Plan, Target
from tlk.quantize.rounding import SCALED
from tlk.quantize.run import by_layer, parts

PACKED, DENSE, KV = "packed", "dense", "kv"
"""What the keys of a piece begin with."""


@dataclass(slots=True)
class Pieces:
    """Gives the layers of `source` their weights, and keeps what was found of them in `partial`.

    calibrated: layers that were found before are needed once more, for the data to run through.
    """

    source: Streamed
    plan: Plan
    partial: Partial
    device: torch.device
    calibrated: bool

    def load(self, i: int) -> LayerResult | None:
        """Put layer `i`, or what belongs to the head, on the device, and what was found of it before."""
        modules = self._modules(i)
        piece = self.partial.load(_name(i))
        if piece is None or self.calibrated:
            for module in modules:
                self.source.load(module, self.device)
        if piece is None:
            return None
        tensors, about = piece
        result = _result(tensors, about)
        if self.calibrated:
            self._restore(i, tensors, result)
        return result

    def done(self, i: int, result: LayerResult) -> None:
        """Keep what was found of layer `i`, and let its weights go."""
        if not self.partial.has(_name(i)):
            about = {"reports": result.reports, "seconds": result.seconds}
            self.partial.save(_name(i), self._tensors(i, result), about)
        if i < self.plan.layers:
            self.source.decoder.layers[i] = nn.Identity()

    def layers(self) -> Iterator[tuple[str, Format, Packed]]:
        """Every quantized module of the checkpoint, its format and its packed tensors, on the device.

        There because a file's layout is another one, and packing is faster where layers are worked on.
        """
        for i in sorted(by_layer(self.plan)):
            piece = self.partial.load(_name(i), str(self.device))
            assert piece is not None
            targets = self._targets(i)
            formats = {m: t.format for t in targets.values() for m in t.modules}
            for module, packed in parts(_result(*piece), targets).items():
                yield module, formats[module], packed

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Every other tensor of the checkpoint, in its own dtype, with the scales it may have taken."""
        quantized = {f"{m}.weight" for t in self.plan.targets.values() for m in t.modules}
        index, changed = -1, dict[str, Tensor]()
        for key in sorted(set(self.source.tensors) - quantized, key=self._layer_of):
            if (i := self._layer_of(key)) != index:
                index, changed = i, self._changed(i)
            tensor, place = self.source.tensor(key), self.source.places.get(key)
            if place is not None and place.parameter in changed:
                rows = changed[place.parameter][place.row : place.row + place.rows]
                tensor = rows.to(tensor.dtype)
            yield key, tensor

    def _layer_of(self, key: str) -> int:
        place = self.source.places.get(key)
        name = "" if place is None else place.parameter
        return int(name.split(".")[1]) if name.startswith("layers.") else self.plan.layers

    def _changed(self, i: int) -> dict[str, Tensor]:
        """The dense parameters that scales were folded into, by the decoder's names."""
        tensors = (self.partial.load(_name(i)) or ({}, None))[0]
        prefix = f"{DENSE}|"
        return {
            f"layers.{i}.{key.removeprefix(prefix)}": tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }

    def _targets(self, i: int) -> dict[str, Target]:
        return by_layer(self.plan).get(i, {})

    def _modules(self, i: int) -> tuple[str, ...]:
        return (f"layers.{i}",) if i < self.plan.layers else ("final_norm", "lm_head")

    def _tensors(self, i: int, result: LayerResult) -> dict[str, Tensor]:
        """Packed tensors, and those that took a scale: norms, biases, and dense layers."""
        tensors = {
            f"{PACKED}|{name}|{part}": tensor
            for name, packed in result.packed.items()
            for part, tensor in packed.items()
        }
        for part, amax in zip("kv", result.kv_amax or (), strict=False):
            tensors[f"{KV}|{part}"] = amax
        if i < self.plan.layers and any(
            t.config.method in SCALED for t in self._targets(i).values()
        ):
            packed = {f"{name}.{part}" for name, p in result.packed.items() for part in p}
            for name, tensor in self.source.decoder.layers[i].named_parameters():
                if name not in packed:
                    tensors[f"{DENSE}|{name}"] = tensor
        return tensors

    def _restore(self, i: int, tensors: Mapping[str, Tensor], result: LayerResult) -> None:
        decoder = self.source.decoder
        prefix = f"layers.{i}." if i < self.plan.layers else ""
        for name, target in self._targets(i).items():
            linear = decoder.get_submodule(prefix + name)
            assert isinstance(linear, Linear)
            moved = {part: t.to(self.device) for part, t in result.packed[name].items()}
            linear.store(target.format, moved)
        for key, tensor in tensors.items():
            if key.startswith(DENSE):
                owner, _, own = (prefix + key.partition("|")[2]).rpartition(".")
                setattr(decoder.get_submodule(owner), own, parameter(tensor.to(self.device)))


def _name(i: int) -> str:
    return f"layer-{i:05}"


def _result(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> LayerResult:
    """What `Pieces` kept of a layer, as it was found."""
    result = LayerResult(seconds=about["seconds"])
    result.reports = {name: tuple(of_parts) for name, of_parts in about["reports"].items()}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("|")
        if kind == PACKED:
            name, _, part = rest.partition("|")
            result.packed.setdefault(name, {})[part] = tensor
    if f"{KV}|k" in tensors:
        result.kv_amax = (tensors[f"{KV}|k"], tensors[f"{KV}|v"])
    return result
