"""Two gloo processes on a CPU hold half a tiny model each, and compute what one process does."""

import socket

import pytest
import torch

from tests.models.zoo import decoder_of, paged_logits, random_ids, relative_error, tiny
from tlk import parallel

MODELS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"tie_word_embeddings": True},
    "nemotron": {"mlp_bias": True},
}
CHUNKS = [[(0, 7), (2, 8)], [(2, 1), (0, 9), (1, 1)], [(0, 1)]]


def logits(model_type):
    model = tiny(model_type, **MODELS[model_type])
    return paged_logits(decoder_of(model), random_ids(model), CHUNKS)


def one_rank(rank, port, expected, failures):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    parallel.init(torch.device("cpu"), rank=rank, world=2, address=address)
    try:
        check_collectives(rank)
        for model_type, whole in expected.items():
            error = relative_error(logits(model_type), whole)
            if error > 1e-5:
                failures.put(f"rank {rank}: {model_type} off by {error}")
    finally:
        parallel.shutdown()


def check_collectives(rank):
    assert (parallel.rank(), parallel.world()) == (rank, 2)
    x = torch.tensor([[1.0, 10.0]]) * (rank + 1)
    assert parallel.all_gather(x, 0).tolist() == [[1, 10], [2, 20]]
    assert parallel.all_gather(x).tolist() == [[1, 10, 2, 20]]
    y = parallel.all_reduce(x)
    assert y is x and x.tolist() == [[3, 30]]
    weight = {"weight": torch.arange(8).view(4, 2), "bias": torch.arange(4)}
    out, inner = parallel.shard(weight, "out"), parallel.shard(weight, "in")
    assert out["bias"].tolist() == [2 * rank, 2 * rank + 1] and out["weight"].shape == (2, 2)
    assert inner["bias"].tolist() == [0, 1, 2, 3]
    assert inner["weight"].tolist() == [[rank], [2 + rank], [4 + rank], [6 + rank]]
    assert parallel.shard(weight, None) is weight
    with pytest.raises(ValueError, match="kv_heads is 3, not divisible by 2 ranks"):
        parallel.per_rank("kv_heads", 3)


def test_two_ranks_compute_what_one_does():
    expected = {model_type: logits(model_type) for model_type in MODELS}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    arguments = (port, expected, failures)
    torch.multiprocessing.spawn(one_rank, arguments, nprocs=2)
    assert failures.empty(), failures.get()


def test_one_process_is_one_rank():
    assert (parallel.rank(), parallel.world()) == (0, 1)
    x = torch.ones(2)
    assert parallel.all_reduce(x) is x and parallel.all_gather(x) is x
    assert parallel.per_rank("heads", 7) == 7
    weight = {"weight": torch.ones(3, 2)}
    assert parallel.shard(weight, "out") is weight
