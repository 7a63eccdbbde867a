import copy

import pytest
import torch
from transformers import LlamaConfig, NemotronConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from tlk.models import hf_fields
from tlk.models.batch import LayerKV
from tlk.models.config import RopeConfig
from tlk.models.rope import RotaryEmbedding

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 3.0, 3.5, 4.0],
    "long_factor": [2.0, 2.2, 3.3, 4.0, 5.5, 6.0, 7.5, 9.0],
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": YARN,
    "yarn scaled": YARN | {"attention_factor": 1.7, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    "longrope": LONG,
    "longrope factor": LONG | {"factor": 6.0},
    "longrope scaled": LONG | {"attention_factor": 1.3},
}


def llama(parameters, length=64):
    return LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": 10000.0} | copy.deepcopy(parameters),
    )


def tables(module, length):
    positions = torch.arange(length)[None]
    cos, sin = module(torch.zeros(1), positions)
    return cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]


def assert_same(rope, module, length):
    rope.prepare(length)
    for ours, theirs in zip((rope.cos, rope.sin), tables(module, length), strict=True):
        torch.testing.assert_close(ours[:length], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind):
    config = llama(KINDS[kind])
    module = LlamaRotaryEmbedding(config)
    rope = RotaryEmbedding(hf_fields.rope(config.to_dict(), 16))
    # below, up to and beyond the first training and the maximum, and back
    for length in (20, 24, 25, 64, 65, 90, 80, 70, 64, 30, 100):
        assert_same(rope, module, length)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn"])
def test_partial_rotation_is_that_of_transformers(kind):
    config = NemotronConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.75} | KINDS[kind],
    )
    module = NemotronRotaryEmbedding(config)
    rope = RotaryEmbedding(hf_fields.rope(config.to_dict(), 32, partial=0.5))
    assert rope.cos.shape == (0, 12)
    for length in (30, 90):
        assert_same(rope, module, length)


def test_tables_grow_by_doubling_and_keep_their_address_until_then():
    rope = RotaryEmbedding(RopeConfig(rotary_dim=8, theta=100.0, max_position_embeddings=64))
    rope.prepare(10)
    address = rope.cos.data_ptr()
    rope.prepare(10)
    assert rope.cos.data_ptr() == address and rope.cos.shape == (10, 4)
    rope.prepare(11)
    assert rope.cos.shape == (20, 4)
    rope.prepare(300)
    assert rope.cos.shape == (300, 4)


def test_longrope_switches_in_place():
    rope = RotaryEmbedding(hf_fields.rope(llama(LONG).to_dict(), 16))
    rope.prepare(60)
    address, long = rope.cos.data_ptr(), rope.cos.clone()
    rope.prepare(5)
    assert rope.cos.data_ptr() == address and not torch.equal(rope.cos, long)


def test_a_change_of_dtype_leaves_the_tables_in_float32():
    rope = RotaryEmbedding(RopeConfig(rotary_dim=8, theta=100.0, max_position_embeddings=64))
    rope.prepare(50)
    before = rope.cos.clone()
    assert torch.equal(rope.to(torch.bfloat16).cos, before)
    assert rope.sin.dtype == torch.float32 and rope.state_dict() == {}


def test_tables_can_be_built_under_meta_and_prepared_elsewhere():
    with torch.device("meta"):
        rope = RotaryEmbedding(hf_fields.rope(llama(YARN).to_dict(), 16))
        rope.prepare(9, torch.device("cpu"))
    assert rope.cos.device.type == "cpu" and rope.cos.isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_forward_rotates_by_position(interleaved):
    config = RopeConfig(
        rotary_dim=4, theta=10.0, max_position_embeddings=64, interleaved=interleaved
    )
    rope = RotaryEmbedding(config)
    rope.prepare(8)
    q, k, v = torch.randn(3, 2, 6), torch.randn(3, 1, 6), torch.randn(3, 1, 5)
    expected = torch.cat([q, k], 1)
    positions = torch.tensor([0, 7, 3])
    pairs = expected[..., :4].unflatten(-1, (2, 2))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    angle = positions[:, None, None] * torch.tensor([1.0, 10.0**-0.5])
    rotated = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle)
    )
    rotated = rotated if interleaved else rotated.transpose(-1, -2)
    expected[..., :4] = rotated.flatten(-2)
    kv = LayerKV(torch.zeros(3, 1, 2, 6), torch.zeros(3, 1, 2, 5), 0)
    slots = torch.tensor([5, 0, 3])
    rope(q, k, v, positions, kv, slots)
    written = kv.k.transpose(1, 2).flatten(0, 1)[slots]
    torch.testing.assert_close(torch.cat([q, written], 1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kv.v.transpose(1, 2).flatten(0, 1)[slots], v)
