"""Which linear layer of a decoder is stored how, and under which names in the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from tlk.errors import UnsupportedError
from tlk.models.decoder import Decoder, linears
from tlk.models.families import part_heights
from tlk.quant.config import QuantConfig, config_of
from tlk.quant.format import Format


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer to quantize: the checkpoint's modules it is fused from, and their rows, in order."""

    modules: tuple[str, ...]
    heights: tuple[int, ...]
    config: QuantConfig
    format: Format


@dataclass(frozen=True, slots=True)
class Plan:
    """targets: by the decoder's name of the layer. kept: the checkpoint's modules that stay in 16
    bit though no one asked for it, and why. linears: all linear layers by the checkpoint's names.
    layers: how many the decoder has. method: of most targets.
    """

    targets: Mapping[str, Target]
    kept: Mapping[str, str]
    linears: tuple[str, ...]
    layers: int
    method: str


def plan(
    decoder: Decoder,
    sources: Mapping[str, tuple[str, ...]],
    config: QuantConfig,
    *,
    strict: bool = False,
) -> Plan:
    """What `config` makes of `decoder`, whose weights come from the tensors `sources`.

    A layer that its format cannot hold stays in 16 bit. Raises UnsupportedError for such a layer if
    `strict`, and if nothing at all would be quantized; ValueError where layers that are one matmul
    would be stored differently, or for a name in ignore or per_layer that no module has.
    """
    targets: dict[str, Target] = {}
    kept: dict[str, str] = {}
    seen: list[str] = []
    for name, linear in linears(decoder).items():
        modules = tuple(key.removesuffix(".weight") for key in sources[f"{name}.weight"])
        seen += modules
        found = [config_of(config, module) for module in modules]
        if any(f != found[0] for f in found[1:]):
            raise ValueError(
                f"{', '.join(modules)} are one matmul and must be quantized alike, or none of them"
            )
        if (own := found[0]) is None:
            continue
        heights = part_heights(decoder, name, len(modules))
        if reason := _refusal(own.format, heights, linear.in_features):
            kept |= dict.fromkeys(modules, reason)
        else:
            targets[name] = Target(modules, heights, own, own.format)
    _check_names(config, set(seen))
    if kept and strict:
        what = "; ".join(f"{module}: {reason}" for module, reason in kept.items())
        raise UnsupportedError(f"layers that {config.method} cannot hold: {what}")
    if not targets:
        why = "; ".join(f"{m}: {reason}" for m, reason in kept.items()) or "all is ignored"
        raise UnsupportedError(f"{config.method} would quantize nothing: {why}")
    return Plan(targets, kept, tuple(seen), len(decoder.layers), config.method)


def _refusal(format: Format, heights: tuple[int, ...], k: int) -> str | None:
    """Why a layer of parts of `heights` outputs and `k` inputs cannot be stored, or None."""
    reasons = (format.refusal(height, k) for height in heights)
    if refused := next((reason for reason in reasons if reason), None):
        return refused
    block = getattr(format, "block", None)
    for height in heights[:-1]:
        if block and height % block:
            return f"{height} outputs are not divisible by {block}, and others follow in one matmul"
    return None


def _check_names(config: QuantConfig, modules: set[str]) -> None:
    """A plain name that no module has is most likely a misspelt one; lm_head may be tied."""
    for key in (*config.ignore, *config.per_layer):
        plain = not key.startswith("re:") and key not in ("Linear", "lm_head")
        if plain and key not in modules:
            raise ValueError(
                f"ignore and per_layer must name modules, classes or expressions, got {key!r}"
            )
