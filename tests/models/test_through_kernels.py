"""Every family through the Triton kernels: their numbers in the interpreter, their launches on every GPU."""

import pytest
import torch

from tests.models.zoo import (
    Pages,
    bfloat16_errors,
    decoder_of,
    paged_logits,
    relative_error,
    tiny,
    transformers_logits,
)
from tlk.kernels._op import count_ops
from tlk.kernels.aot import GPUS, dry_run
from tlk.models.families import FAMILIES

FIELDS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "nemotron": {"attention_bias": True},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 51}
IDS = [torch.arange(9) * 5 % 51, torch.tensor([50, 7])]
STEPS = [[(0, 6)], [(0, 2), (1, 1)], [(0, 1), (1, 1)]]  # prefill; prefill beside decode; decode
OPS = {"rope_and_write_kv_", "paged_attention", "matmul_add_"}
MORE = {"nemotron": {"layer_norm", "matmul"}}
GATED = {"norm_linear", "gated_linear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, device):
    model = tiny(family, **SMALL, **FIELDS[family])
    expected = transformers_logits(model, IDS)
    with count_ops() as counts:
        actual = paged_logits(decoder_of(model).to(device), IDS, STEPS, padding=1, device=device)
    assert relative_error(actual, expected) < 1e-4
    ran = OPS | MORE.get(family, set()) | (set() if family == "nemotron" else GATED)
    assert {name.partition("[")[0] for name in counts} == ran
    assert not [name for name in counts if "reference" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, device):
    model = tiny(family, **SMALL, **FIELDS[family])
    ours, theirs = bfloat16_errors(model, IDS, STEPS, device)
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("sm", GPUS)
def test_launches_on_every_gpu(sm):
    decoders = [
        decoder_of(tiny(family, **SMALL, **FIELDS[family]), torch.bfloat16) for family in FAMILIES
    ]
    for decoder in decoders:
        decoder.prepare(9)
        pages = Pages(decoder.cache_specs(torch.bfloat16), [9, 4], "cpu")
        for chunks in ([(0, 8), (1, 3)], [(0, 1), (1, 1)]):  # prefill, decode
            batch = pages.step(chunks)
            ids = torch.zeros(len(batch.positions), dtype=torch.int64)
            with dry_run(sm) as launches, count_ops() as counts:
                decoder.logits(decoder(ids, batch, pages.cache))
            assert not [name for name in counts if "reference" in name]
            by_triton = sum(n for name, n in counts.items() if name.endswith("[triton]"))
            assert len(launches) >= by_triton > 0
