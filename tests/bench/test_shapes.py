import pytest
import torch

from tlk.bench.shapes import SHAPES
from tlk.hf.hub import complete_config
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES

PARAMETERS = {
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.55e9,
    "llama-3.2-1b": 1.236e9,
    "qwen3-0.6b": 0.596e9,
    "tiny": 1.7e6,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_config_of_the_size_it_says(name):
    config = complete_config(SHAPES[name])
    with torch.device("meta"):
        decoder = Decoder(FAMILIES[config["model_type"]].config(config))
    parameters = sum(p.numel() for p in decoder.parameters())
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.02)
