"""Tiny random models of transformers, the same as tlk decoders, and steps through paged caches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tlk.kernels._op import count_ops
from tlk.models.batch import Batch, KVCache, PagedKV, Scales, group_specs
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, load_weights, weight_sources

TINY = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def tiny(model_type: str, **fields: object) -> PreTrainedModel:
    """A random model whose every parameter matters: no zero bias, no unit norm."""
    config = CONFIG_MAPPING[model_type](**(TINY | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise)
    return model


def decoder_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder with the model's weights, loaded strictly."""
    family = FAMILIES[model.config.model_type]
    config = family.config(model.config.to_dict())
    decoder = Decoder(config).to(dtype)
    load_weights(decoder, weight_sources(family, config), model.state_dict())
    return decoder


Steps = Sequence[Sequence[tuple[int, int]]]


class Pages:
    """The bookkeeping of a cache: which pages, in shuffled order, hold which sequence."""

    def __init__(
        self,
        specs: Sequence[PagedKV],
        lengths: Sequence[int],
        device: str,
        scales: Sequence[Scales | None] | None = None,
    ) -> None:
        self.groups, _ = group_specs(specs)
        self.page = self.groups[0].page_size
        self.done = [0] * len(lengths)
        most = max(-(-length // self.page) for length in lengths)
        count = most * len(lengths) + 1
        generator = torch.Generator().manual_seed(3)
        self.tables = [
            torch.randperm(count, generator=generator)[: count - 1].view(len(lengths), most)
            for _ in self.groups
        ]
        self.device = device
        self.cache = KVCache.allocate(specs, [count] * len(self.groups), device, scales)

    def step(self, chunks: Sequence[tuple[int, int]], padding: int = 0) -> Batch:
        """A batch of the next `n` tokens of every (sequence, n), and `padding` rows."""
        positions, queries, lengths = [], [0], []
        slots: list[list[int]] = [[] for _ in self.groups]
        for sequence, n in chunks:
            for position in range(self.done[sequence], self.done[sequence] + n):
                positions.append(position)
                for table, slot in zip(self.tables, slots, strict=True):
                    page = table[sequence, position // self.page].item()
                    slot.append(page * self.page + position % self.page)
            self.done[sequence] += n
            queries.append(queries[-1] + n)
            lengths.append(self.done[sequence])
        rows = [sequence for sequence, _ in chunks]
        return Batch(
            positions=self.tensor(positions + [0] * padding, torch.int64),
            slots=tuple(self.tensor(slot + [-1] * padding, torch.int64) for slot in slots),
            cu_seqlens_q=self.tensor(queries, torch.int32),
            seq_lens=self.tensor(lengths, torch.int32),
            page_tables=tuple(t[rows].to(self.device, torch.int32) for t in self.tables),
            max_q=max(n for _, n in chunks),
        )

    def tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def paged_logits(
    decoder: Decoder,
    sequences: Sequence[Tensor],
    steps: Steps,
    page_size: int = 4,
    padding: int = 0,
    device: str = "cpu",
    kv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The logits of every sequence's tokens, after running `steps` of (sequence, tokens)."""
    dtype = kv_dtype or decoder.embedding.weight.dtype
    lengths = [len(s) for s in sequences]
    specs = decoder.cache_specs(dtype, page_size)
    pages = Pages(specs, lengths, device, decoder.cache_scales(dtype))
    out: list[list[Tensor]] = [[] for _ in sequences]
    for chunks in steps:
        starts = list(pages.done)
        batch = pages.step(chunks, padding)
        ids = [sequences[s][starts[s] : starts[s] + n] for s, n in chunks]
        flat = torch.cat([*ids, torch.zeros(padding, dtype=torch.int64)]).to(device)
        decoder.prepare(max(pages.done))
        logits = decoder.logits(decoder(flat, batch, pages.cache))
        parts = logits[: len(flat) - padding].split([n for _, n in chunks])
        for (sequence, _), part in zip(chunks, parts, strict=True):
            out[sequence].append(part)
    assert pages.done == lengths, "the steps do not cover the sequences"
    return [torch.cat(parts) for parts in out]


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """What transformers computes for each sequence alone, in one forward without a cache."""
    return [model(s[None].to(model.device), use_cache=False).logits[0] for s in sequences]


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest expected logit."""
    a, e = torch.cat(list(actual)).float().cpu(), torch.cat(list(expected)).float().cpu()
    return ((a - e).abs().max() / e.abs().max()).item()


# three sequences: chunked prefill beside decode, a sequence of one token, a chunk across pages
SEQUENCES = (17, 1, 9)
STEPS = [[(0, 7), (2, 8)], [(2, 1), (0, 8), (1, 1)], [(0, 1)], [(0, 1)]]
WHOLE = [[(0, 17)], [(1, 1), (2, 9)]]


def random_ids(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    vocab = model.config.vocab_size
    return [torch.randint(0, vocab, (n,), generator=generator) for n in SEQUENCES]


def assert_float32_agrees(model: PreTrainedModel) -> None:
    """Prefill at once, and in chunks with decode through shuffled pages: 1e-4 of transformers."""
    ids = random_ids(model)
    expected, decoder = transformers_logits(model, ids), decoder_of(model)
    assert relative_error(paged_logits(decoder, ids, WHOLE, page_size=16), expected) < 1e-4
    assert relative_error(paged_logits(decoder, ids, STEPS, padding=3), expected) < 1e-4


def assert_bfloat16_agrees(model: PreTrainedModel) -> None:
    """In bfloat16 at most twice as far from float32 as transformers is."""
    ours, theirs = bfloat16_errors(model, random_ids(model), STEPS)
    assert 0 < ours <= 2 * theirs, f"error {ours:.3g}, transformers' own {theirs:.3g}"


def bfloat16_errors(
    model: PreTrainedModel, ids: Sequence[Tensor], steps: Steps, device: str = "cpu"
) -> tuple[float, float]:
    """How far tlk and transformers in bfloat16 are from float32 on the same weights, by norm."""
    frequencies = {n: b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")}
    model = model.to(torch.bfloat16)
    buffers = dict(model.named_buffers())
    for name, frequency in frequencies.items():  # from_pretrained keeps them in float32
        buffers[name].data = frequency
    theirs = torch.cat(transformers_logits(model, ids)).float()
    decoder = decoder_of(model, torch.bfloat16).to(device)
    ours = torch.cat(paged_logits(decoder, ids, steps, padding=3, device=device)).float().cpu()
    exact = torch.cat(transformers_logits(model.float(), ids))
    return (ours - exact).norm().item(), (theirs - exact).norm().item()


def forward_counts(model: PreTrainedModel) -> dict[str, int]:
    """The tlk ops of one forward and its logits, by name, whatever runs them."""
    ids = random_ids(model)
    with count_ops() as counts:
        paged_logits(decoder_of(model), ids, [[(0, 17), (1, 1), (2, 9)]])
    return {name.partition("[")[0]: n for name, n in counts.items()}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: a tied head is not saved."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state
