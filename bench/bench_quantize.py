"""Seconds and memory that calibration takes of one layer: `pytest bench/bench_quantize.py`.

On a GPU a layer of Llama-3.1-8B with random weights sees 128 rows of 2048 random tokens, as many as
`tlk quantize` takes by default; without one, a tiny layer and few tokens, to see that it runs. The table
holds the wall-clock time of the layer, a fresh one each round after one that compiles kernels;
`extra_info` of the saved JSON has the peak memory and how far the outputs are off. Reading and
writing files is not part of it.
"""

from typing import Any

import pytest
import torch

from tlk.bench.shapes import SHAPES
from tlk.hf.weights import random_decoder
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import LENGTH, SAMPLES
from tlk.quantize.in_place import quantize_decoder

METHODS = {"gptq": "int4-gptq", "awq": "int4-awq", "smoothquant": "int8", "nearest": "int4"}
CUDA = torch.cuda.is_available()
SHAPE, ROWS, COLUMNS, ROUNDS = ("llama-3.1-8b", SAMPLES, LENGTH, 2) if CUDA else ("tiny", 2, 32, 1)
VOCABULARY = 1024  # of a small embedding: no head is quantized


def layer() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder of one layer, and the names of its weights."""
    fields = SHAPES[SHAPE] | {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    made = random_decoder(fields, dtype=torch.bfloat16, device="cuda" if CUDA else "cpu")
    sources = weight_sources(FAMILIES[made.family], made.decoder.config)
    return (made.decoder, sources), {}


@pytest.mark.parametrize("name", METHODS)
def test_a_layer(benchmark, name):
    ids = torch.randint(0, VOCABULARY, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    config = QuantConfig(METHODS[name], calibration=ids)

    def run(decoder: Any, sources: Any) -> Any:
        found = quantize_decoder(decoder, sources, config, None, progress=False)
        if CUDA:
            torch.cuda.synchronize()
        return found

    found = benchmark.pedantic(run, setup=layer, rounds=ROUNDS, warmup_rounds=1)
    assert len(found["layers"]) == 7
    errors = {module: report["output_error"] for module, report in found["layers"].items()}
    benchmark.extra_info.update(
        shape=SHAPE, tokens=ids.numel(), method=config.method, memory_gib=found["memory_bytes"] / 2**30,
        output_errors=errors, gpu=torch.cuda.get_device_name() if CUDA else None,
    )  # fmt: skip
