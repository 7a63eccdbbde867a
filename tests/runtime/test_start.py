import pytest
import torch

from tests.runtime.demo import DEVICE, decoder, pages
from tlk.errors import CapacityError
from tlk.models.decoder import twin
from tlk.runtime.memory import CPU_CACHE_BYTES
from tlk.runtime.options import EngineOptions
from tlk.runtime.runner import Runner
from tlk.runtime.start import start

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def started(progress=False, **options):
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 16}
    runner = Runner(twin(decoder()), EngineOptions(**(small | options)))
    return runner, start(runner, progress=progress)


def test_the_ledger_counts_weights_and_cache():
    runner, s = started(kv_cache_memory=pages(20), max_model_len=200)
    assert s.ledger.weights == sum(p.nbytes for p in decoder().parameters())
    assert s.ledger.kv_cache == pages(20) and s.pages == [20]
    assert (s.max_model_len, s.notices) == (200, [])
    assert runner.tables[0].shape == (4, 13)


def test_the_context_is_the_models_unless_the_cache_is_smaller():
    made_for = decoder().config.max_position_embeddings
    assert started(kv_cache_memory=1 << 26)[1].max_model_len == made_for
    _, s = started(kv_cache_memory=pages(2))
    assert s.max_model_len == 32 and "max_model_len is 32" in s.notices[0]
    with pytest.raises(CapacityError):
        started(kv_cache_memory=5)


def test_a_longer_context_than_the_models_is_refused():
    with pytest.raises(
        ValueError, match=r"max_model_len must be at most the model's \d+ positions"
    ):
        started(max_model_len=10**6)


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without a GPU")
def test_a_cpu_has_a_gibibyte_of_cache_unless_less_is_of_use():
    _, s = started(max_num_seqs=4096)
    assert CPU_CACHE_BYTES - pages(1) < s.ledger.kv_cache <= CPU_CACHE_BYTES
    _, s = started()
    assert s.ledger.kv_cache < CPU_CACHE_BYTES and s.ledger.graphs == s.ledger.activations == 0


@needs_gpu
def test_the_pool_takes_what_the_share_leaves():
    total = torch.cuda.mem_get_info()[1]
    runner, s = started(gpu_memory_utilization=0.18, max_num_seqs=4096)
    assert set(s.timings) == {"warm-up", "capture"}
    used = total - torch.cuda.mem_get_info()[0]
    assert 0.15 * total < used <= 0.18 * total
    assert s.ledger.activations > 0 and runner.graphs is not None


def test_progress_is_shown_only_if_wanted(capfd):
    started(kv_cache_memory=1 << 22)
    assert capfd.readouterr().err == ""
