"""What tlk_quant.json tells of a quantized model: how it was made, on what data, and how far it is off."""

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import torch

from tlk._version import __version__
from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import Calibration
from tlk.quantize.plan import Plan
from tlk.quantize.run import Quantized

PACKAGES = ("torch", "triton", "transformers")


def describe(
    config: QuantConfig,
    planned: Plan,
    data: Calibration | None,
    result: Quantized,
    device: torch.device,
    kv_cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Method and config, calibration data, the error of every layer, what stayed in 16 bit, versions."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "method": config.method,
        "config": config.to_dict(),
        "calibration": None if data is None else data.description,
        "calibration_sha256": data_sha256(data),
        "kv_cache_dtype": kv_cache_dtype,
        "layers": result.report,
        "kept_in_16_bit": dict(planned.kept),
        "fallbacks": [name for name, r in result.report.items() if "fallback" in r],
        "seconds": round(result.seconds, 1),
        "memory_bytes": result.memory,
        "device": where or "cpu",
        "versions": {"tlk": __version__} | {p: version(p) for p in PACKAGES},
    }


def data_sha256(data: Calibration | None) -> str | None:
    """The hash of the token ids."""
    return None if data is None else hashlib.sha256(data.ids.numpy().tobytes()).hexdigest()
