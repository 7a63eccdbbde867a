"""Reading the dict of a transformers config: as `config.to_dict()` of 5.x gives it, or an older config.json.

What a family does not model raises `UnsupportedError` with the field and its value, so that no
model runs with a setting ignored.
"""

from collections.abc import Mapping
from typing import Any

from tlk.errors import CheckpointError, UnsupportedError
from tlk.models.config import Activation, RopeConfig, RopeKind

Fields = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu_squared",
}
_GATED = ("silu", "gelu", "gelu_tanh")
_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
_EXTENDED = ("llama3", "yarn", "longrope")  # kinds that know the length of the first training


def required(hf: Fields, *names: str) -> list[Any]:
    """The values of `names`; CheckpointError listing those that are missing."""
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise CheckpointError(f"config has no {', '.join(missing)}")
    return [hf[name] for name in names]


def unsupported(field: str, value: object, known: str) -> UnsupportedError:
    """The error for a field whose value this family does not model."""
    return UnsupportedError(f"config {field}={value!r} is not supported, only {known}")


def expect(hf: Fields, field: str, *known: object) -> None:
    """Raise UnsupportedError unless `field` is absent or has one of the `known` values."""
    if field in hf and hf[field] not in known:
        raise unsupported(field, hf[field], " or ".join(map(repr, known)))


def activation(hf: Fields, default: str, *, gated: bool) -> Activation:
    """`hidden_act`; in a gated MLP only those that have a kernel with the product."""
    name = hf.get("hidden_act") or default
    found = _ACTIVATIONS.get(name)
    if found is None or (gated and found not in _GATED):
        known = [k for k, v in _ACTIVATIONS.items() if not gated or v in _GATED]
        raise unsupported("hidden_act", name, ", ".join(known))
    return found


def head_counts(hf: Fields, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, key heads and head_dim."""
    heads, hidden = required(hf, "num_attention_heads", "hidden_size")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise unsupported("num_key_value_heads", kv_heads, f"divisors of {heads}")
    return heads, kv_heads, hf.get("head_dim") or default_head_dim or hidden // heads


def windows(hf: Fields, window: int | None, default: list[str]) -> list[int]:
    """The sliding window of every layer, 0 for full attention, by `layer_types` or `default`."""
    kinds = hf.get("layer_types") or default
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, "full_attention or sliding_attention")
        if kind == "sliding_attention" and not window:
            raise unsupported(
                "sliding_window", window, "a size where layer_types has sliding_attention"
            )
    if len(kinds) != required(hf, "num_hidden_layers")[0]:
        raise CheckpointError(f"layer_types has {len(kinds)} entries, not num_hidden_layers")
    return [int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds]


def rope(hf: Fields, head_dim: int, partial: float | None = None) -> RopeConfig:
    """The rotary positions, from `rope_parameters`, or `rope_theta` and `rope_scaling`.

    `partial` is the family's own partial_rotary_factor where the config names none; None: the
    family rotates whole heads only.
    """
    (length,) = required(hf, "max_position_embeddings")
    p: dict[str, Any] = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if nested := [key for key, value in p.items() if isinstance(value, Mapping)]:
        raise unsupported("rope_parameters", nested, "one set for all layers")
    if p.get("mrope_section"):
        raise unsupported("mrope_section", p["mrope_section"], "text positions")
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise unsupported("rope_type", kind, ", ".join(_ROPE_KINDS))
    if kind in ("linear", "dynamic", "llama3") and p.get("factor") is None:
        raise CheckpointError(f"rope_type {kind} has no factor")
    default = 1.0 if partial is None else partial
    fraction = float(p.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or default)
    if partial is None and fraction != 1.0:
        raise unsupported("partial_rotary_factor", fraction, "1.0")
    original = hf.get("original_max_position_embeddings") or p.get(
        "original_max_position_embeddings"
    )
    return RopeConfig(
        rotary_dim=int(head_dim * fraction),
        theta=p.get("rope_theta") or hf.get("rope_theta") or 10000.0,
        max_position_embeddings=length,
        kind=_ROPE_KINDS[kind],
        original_max_position_embeddings=(original or length) if kind in _EXTENDED else None,
        **_scaling(p, kind),
    )


def _scaling(p: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of `RopeConfig` that belong to `kind`, as far as `p` sets them."""
    names = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ),
        "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    }.get(kind, ())
    found = {name: p[name] for name in names if p.get(name) is not None}
    if kind == "longrope":
        required(p, "short_factor", "long_factor")
    return {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in found.items()}
