"""The embedded model as a decoder, and random requests for it."""

import random
from functools import lru_cache

import torch

from tlk.demo.generate import EMBEDDED
from tlk.hf.weights import load_decoder
from tlk.models.decoder import Decoder
from tlk.runtime.engine import Engine, Update
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 1920
EOS = (0,)


@lru_cache
def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(str(EMBEDDED), dtype=dtype, device=DEVICE, progress=False).decoder


def engine(**options) -> Engine:
    """An engine on the embedded model, small unless `options` say otherwise."""
    small = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "kv_cache_memory": 1 << 24,
        "page_size": 16,
    }
    return Engine(decoder(), EngineOptions(**(small | options)), eos=EOS)


def pages(count: int, page_size: int = 16) -> int:
    """Bytes of a pool of `count` pages."""
    specs = decoder().cache_specs(torch.float32, page_size)
    return count * sum(spec.page_bytes() for spec in specs)


def drain(engine: Engine) -> list[Update]:
    """Step until nothing is left; all updates."""
    updates = []
    while engine.has_work:
        updates += engine.step()
    return updates


Job = tuple[list[int], SamplingParams, list[list[int]]]


def random_jobs(count: int, seed: int = 0, most_tokens: int = 14) -> list[Job]:
    """(prompt, params, bad_words) with all kinds of settings; a third share one of three prefixes."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(n)] for n in (16, 37, 48)]
    jobs = []
    for _ in range(count):
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.choice([1, 2, 5, 16, 17, 30]))]
        if rng.random() < 0.4:
            prompt = rng.choice(prefixes) + prompt
        words = [rng.sample(range(VOCAB), rng.choice([1, 2])) for _ in range(rng.choice([0, 0, 3]))]
        jobs.append((prompt, _random_params(rng, most_tokens), words))
    return jobs


def _random_params(rng: random.Random, most_tokens: int) -> SamplingParams:
    most = rng.randrange(1, most_tokens + 1)
    fields: dict[str, object] = {"max_tokens": most, "seed": rng.randrange(2**40)}
    if rng.random() < 0.3:
        return SamplingParams(**fields, temperature=0.0)  # type: ignore[arg-type]
    fields["temperature"] = rng.choice([0.3, 1.0, 1.5])
    fields |= rng.choice(
        [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 5, "top_p": 0.7}]
    )
    fields |= rng.choice(
        [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.4}]
    )
    fields |= rng.choice([{}, {"min_tokens": most // 2}, {"logit_bias": {7: 3.0, 9: -100.0}}])
    fields |= rng.choice([{}, {"stop_token_ids": range(300)}, {"ignore_eos": True}])
    fields |= rng.choice([{}, {}, {"allowed_token_ids": range(100, 900)}, {"n": 3}])
    fields |= rng.choice([{}, {}, {"logprobs": 2}])
    return SamplingParams(**fields)  # type: ignore[arg-type]


def add(engine: Engine, job: Job) -> Request:
    prompt, params, bad_words = job
    return engine.add(prompt, params, bad_words=bad_words)


def outputs(request: Request) -> list[list[int]]:
    return [sequence.output for sequence in request.sequences]
