import dataclasses

import pytest

from tests.models.zoo import tiny
from tlk.models.families import FAMILIES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_configs_are_values(model_type):
    """Equal configs are one dict key: that is how layers come to share rotary tables."""
    hf = tiny(model_type).config.to_dict()
    first, second = (FAMILIES[model_type].config(hf) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.vocab_size = 1
    assert first.layers[0].attention.rope == first.layers[1].attention.rope
