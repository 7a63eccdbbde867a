"""generate on the runtime against transformers' own, on the same weights."""

import copy
import gc
import inspect
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.distributions import Chi2
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
)

import tlk
from tests.models.zoo import tiny
from tlk.errors import CapacityError, EngineError
from tlk.hf import generate as generate_module
from tlk.hf.execution import LOOP, ORIGINAL, RUNTIME
from tlk.hf.generate import Limits, NeedsLoop, Wanted, longest, plan
from tlk.kernels.paged_attention import preferred_page_size
from tlk.models.families import FAMILIES
from tlk.runtime.engine import Update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = preferred_page_size(torch.device(DEVICE))
FIELDS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "nemotron": {"partial_rotary_factor": 0.5},
}


# transformers before 5.20 or so penalizes the padding of padded rows too, which only its loop can do
PENALTY = inspect.signature(RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"]
PADDED_PENALTY = RUNTIME if "Tensor" in str(PENALTY.annotation) else LOOP


def fresh(family="llama", **fields):
    model = tiny(family, **(FIELDS[family] | fields)).to(DEVICE)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def models():
    """Of each family the model as transformers wrote it, and optimized; made when asked for."""
    made = {}

    def of(family="llama"):
        if family not in made:
            made[family] = fresh(family), tlk.optimize(fresh(family))
        original, model = made[family]
        for counts in (model._execution.generates, model._execution.loops):
            counts.clear()
        return original, model

    return of


def prompts(rows=3, count=11, paddings=(4, 0, 9)):
    ids = torch.randint(1, 99, (rows, count), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in zip(mask, paddings, strict=False):
        row[:padding] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def agree(pair, inputs, tier=RUNTIME, **kwargs):
    """The ids of both, which must be equal in all respects, when tlk generates in `tier`."""
    original, model = pair
    kwargs = {"do_sample": False, "max_new_tokens": 12} | kwargs
    theirs = original.generate(**inputs, **kwargs)
    ours = model.generate(**inputs, **kwargs)
    assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
    assert torch.equal(ours, theirs)
    assert set(model._execution.generates) == {tier}
    assert bool(model._execution.loops) == (tier == LOOP)
    return ours


@pytest.mark.parametrize("family", FIELDS)
def test_greedy_tokens_are_those_of_transformers(models, family):
    agree(models(family), {"input_ids": prompts(1)["input_ids"]}, max_new_tokens=40)
    agree(models(family), prompts(), max_new_tokens=40)


@pytest.mark.parametrize("family", FIELDS)
def test_rows_end_at_different_times(models, family):
    pair = models(family)
    new = agree(pair, prompts())[:, 11:]
    ends = [int(new[0, 2]), int(new[1, 7])]  # of every row, some end
    out = agree(pair, prompts(), eos_token_id=ends, pad_token_id=98, max_new_tokens=30)[:, 11:]
    stops = [[i for i, t in enumerate(row) if t in ends][:1] for row in out.tolist()]
    assert len({tuple(s) for s in stops}) > 1 and 98 in out[0]
    agree(pair, prompts(), eos_token_id=ends, min_new_tokens=9)


NEARLY_ALL = list(range(3, 99))  # tokens that end a row as soon as they may
OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "max_length": {"max_length": 17, "max_new_tokens": None},
    "min_length": {"min_length": 18, "eos_token_id": NEARLY_ALL},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": NEARLY_ALL},
    "min beyond max": {"min_new_tokens": 30, "eos_token_id": NEARLY_ALL},
    "both minima": {"min_length": 14, "min_new_tokens": 7, "eos_token_id": NEARLY_ALL},
    "the other way": {"min_length": 19, "min_new_tokens": 2, "eos_token_id": NEARLY_ALL},
    "suppress_tokens": {"suppress_tokens": [*range(1, 50), 5000]},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(40)]},
    "eos outside the vocabulary": {"eos_token_id": 5000},
    "eos is a bad word": {"bad_words_ids": [[7], [8]], "eos_token_id": [7, 8, 30]},
    "logits_to_keep": {"logits_to_keep": 3},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "all": {
        "repetition_penalty": 0.7,
        "min_new_tokens": 4,
        "eos_token_id": list(range(60, 99)),
        "suppress_tokens": [5],
        "bad_words_ids": [[9]],
    },
}


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("kind", OPTIONS)
def test_options(models, kind):
    pair, kwargs = models(), OPTIONS[kind]
    tier = PADDED_PENALTY if "repetition_penalty" in kwargs else RUNTIME
    out = agree(pair, prompts(), tier, **kwargs)
    if tier == LOOP:
        agree(models(), prompts(paddings=()), **kwargs)
    plain = pair[0].generate(**prompts(), do_sample=False, max_new_tokens=12)
    if kind not in ("logits_to_keep", "prefill_chunk_size", "eos outside the vocabulary"):
        assert not torch.equal(out, plain), "the option changes nothing"


def test_bad_words_of_several_tokens(models):
    pair = models()
    inputs = prompts(2, 11, (3,))
    new = agree(pair, inputs)[:, 11:].tolist()
    word = new[0][3:5]
    across = [int(inputs["input_ids"][1, -1]), new[1][0]]  # from the prompt into the output
    out = agree(pair, inputs, bad_words_ids=[word, across])[:, 11:].tolist()
    assert out[0][3:5] != word and out[1][0] != across[1]


def test_what_comes_with_the_model_counts(models):
    original, model = models()
    inputs = prompts(paddings=())
    for m in (original, model):
        m = m.generation_config
        m.eos_token_id, m.repetition_penalty, m.max_length = [3, 40, 41, 42], 1.2, 16
    try:
        agree((original, model), inputs, max_new_tokens=None)
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens = 3
        agree((original, model), inputs, generation_config=config, max_new_tokens=None)
    finally:
        for m in (original, model):
            m = m.generation_config
            m.eos_token_id, m.repetition_penalty, m.max_length = None, None, None
    with pytest.warns(UserWarning, match="default `max_length`") as caught:
        agree((original, model), prompts(), max_new_tokens=None)
    assert len({str(w.message) for w in caught}) == 1 and len(caught) == 2


def test_results_look_like_transformers(models):
    ids = prompts(2)["input_ids"]
    for dtype in (torch.int32, torch.int64):
        assert agree(models(), {"input_ids": ids.to(dtype)}).dtype == torch.int64
    agree(models(), {"inputs": ids})
    agree(models(), {"input_ids": ids, "attention_mask": prompts(2)["attention_mask"].bool()})
    positions = torch.arange(11, device=DEVICE)[None]
    agree(models(), {"input_ids": ids, "position_ids": positions.expand(2, -1)})
    padded = ids.clone()
    padded[0, :4] = 0  # transformers makes the mask itself, from the padding token
    agree(models(), {"input_ids": padded})
    _, model = models()
    model._execution.free()
    with torch.inference_mode():  # what is made inside serves outside
        model.generate(ids, max_new_tokens=4)
    agree(models(), {"input_ids": ids})


def test_arguments_are_checked_as_transformers_does(models):
    for kwargs, message in (
        ({"nonsense": 3}, "nonsense"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 11, "max_new_tokens": None}, "max_length"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ({"stop_strings": "x"}, "tokenizer"),
    ):
        raised = []
        for m in models():
            with pytest.raises(ValueError, match=message) as caught:
                m.generate(**prompts(), **({"max_new_tokens": 3} | kwargs))
            raised.append(str(caught.value))
        assert raised[0] == raised[1]
    _, model = models()
    with pytest.raises(ValueError, match="prompt must hold ids below the vocabulary's 99, got 99"):
        model.generate(torch.tensor([[3, 99]], device=DEVICE), max_new_tokens=3)
    assert not model._execution.runtime.engine.has_work


# ---- sampling


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 4.0, "top_k": 8, "repetition_penalty": 1.6},
        {"temperature": 6.0, "top_k": 0, "top_p": 0.6},
        {"temperature": 6.0, "top_k": 20, "top_p": 0.95, "min_p": 0.4},
    ],
)
def test_samples_have_transformers_distribution(models, options):
    original, model = models()
    ids = prompts(1)["input_ids"]
    config = GenerationConfig(do_sample=True, pad_token_id=0, **options)
    config._eos_token_tensor = None
    warpers = original._get_logits_processor(config, 11, ids, device=DEVICE)
    with torch.no_grad():
        p = warpers(ids, original(ids).logits[:, -1]).softmax(-1)[0].cpu()
    draws = torch.cat(
        [
            model.generate(
                ids, do_sample=True, max_new_tokens=1, num_return_sequences=256, **options
            )[:, -1]
            for _ in range(8)
        ]
    ).cpu()
    counts = torch.bincount(draws, minlength=99)
    assert counts[p == 0].sum() == 0 and set(model._execution.generates) == {RUNTIME}
    kept = p * 2048 > 5  # the rest is counted together
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]]).double()
    expected = torch.cat([p[kept], p[~kept].sum()[None]]).double() * 2048
    real = expected > 0
    freedom = int(real.sum()) - 1
    assert freedom >= 2, "this distribution tests nothing"
    statistic = ((observed - expected) ** 2)[real].div(expected[real]).sum()
    assert Chi2(torch.tensor(float(freedom))).cdf(statistic) < 0.999


def test_samples_follow_torchs_seed(models):
    _, model = models()
    inputs = prompts()

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        kwargs = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2}
        return model.generate(**inputs, max_new_tokens=20, **kwargs)

    first, second = draw(5), draw()
    assert torch.equal(draw(5), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)
    assert first.shape == (6, 31) and torch.equal(
        first[:, :11], inputs["input_ids"].repeat_interleave(2, 0)
    )
    assert len({tuple(row) for row in first[:, 11:].tolist()}) == 6
    several = {"do_sample": True, "num_return_sequences": 2}  # in the order of transformers
    agree(models(), inputs, temperature=1e-3, **several)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)  # greedy draws nothing


# ---- streamers and stop strings


class Calls:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append((value.dtype, value.device.type, value.shape, value.tolist()))

    def end(self):
        self.calls.append("end")


def letters():
    """A tokenizer whose 99 tokens are letters."""
    vocabulary = {chr(32 + i): i for i in range(95)} | {chr(200 + i): 95 + i for i in range(4)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ")


@pytest.mark.parametrize("stop", [False, True])
def test_streamers_are_called_as_transformers_does(models, stop):
    original, model = models()
    inputs = {"input_ids": prompts(1)["input_ids"]}
    kwargs = {"max_new_tokens": 9, "do_sample": False}
    new = original.generate(**inputs, **kwargs)[0, 11:].tolist()
    if stop:
        tokenizer = letters()
        kwargs |= {"stop_strings": [tokenizer.decode(new[4:6])], "tokenizer": tokenizer}
    else:
        kwargs |= {"eos_token_id": new[6]}
    seen = []
    for m in (original, model):
        streamer = Calls()
        m.generate(**inputs, **kwargs, streamer=streamer)
        seen.append(streamer.calls)
    assert seen[0] == seen[1] and seen[1][-1] == "end"
    assert 3 < len(seen[1]) < 1 + 9 + 1
    assert set(model._execution.generates) == {RUNTIME}


def test_a_text_streamer_gets_the_text(models):
    tokenizer, (_, model) = letters(), models()
    inputs = {"input_ids": prompts(1)["input_ids"]}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, 11:])


def test_stop_strings_end_rows_where_transformers_does(models):
    pair, tokenizer = models(), letters()
    inputs = prompts()
    new = pair[0].generate(**inputs, max_new_tokens=14, do_sample=False)[:, 11:].tolist()
    texts = [tokenizer.decode(row) for row in new]
    across = tokenizer.decode(inputs["input_ids"][2, -2:]) + texts[2][0]
    for stops in (
        [texts[0][3:6]],
        [texts[0][3:6], texts[1][8:10]],
        [across, texts[1][8:10]],
        "~~nowhere~~",
    ):
        kwargs = {"stop_strings": stops, "tokenizer": tokenizer, "eos_token_id": 5000}
        out = agree(pair, inputs, max_new_tokens=14, pad_token_id=0, **kwargs)
    assert out.shape[1] == 25
    kwargs["stop_strings"] = texts[0][3:6]
    one = {"input_ids": inputs["input_ids"][1:2]}
    agree(pair, one, **(kwargs | {"eos_token_id": None, "stop_strings": texts[1][3:6]}))
    pair[1]._execution.generates.clear()
    agree(pair, inputs, LOOP, **(kwargs | {"eos_token_id": None}))
    assert "stop_strings without eos_token_id" in str(tlk.report(pair[1]))


class BareRow:
    finish_reason, finished = None, False


def test_nothing_follows_a_stop_string_in_one_step(models):
    """An engine may bring several tokens of a row at once."""
    config = models()[1]._execution.binding.decoder.config
    inputs, finished = prompts(2, 6, ()), []
    call = wanted(inputs["input_ids"], inputs)
    stop = StopStringCriteria(letters(), letters().decode([40, 41]))
    end = EosTokenCriteria(7)
    made = plan(config, Limits(), replace(call, criteria=[*call.criteria, stop, end]))
    engine = SimpleNamespace(
        add=lambda *args, **kwargs: SimpleNamespace(sequences=[BareRow()]), finish=finished.append
    )
    run = generate_module._Run(engine, made)
    run.start()
    first, second = run.ids
    run.take([Update(first, [8, 40, 41, 9], []), Update(second, [40, 9, 8], [])])
    run.take([Update(first, [3], []), Update(second, [41], [])])
    assert run.ids[first][6:] == [8, 40, 41] and run.ids[second][6:] == [40, 9, 8, 41]
    assert finished == [first]


# ---- what is left to transformers' loop


class Twice(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * 2


REFUSED = {
    "num_beams=3": {"num_beams": 3},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "use_cache=False": {"use_cache": False},
    "Twice": {"logits_processor": LogitsProcessorList([Twice()])},
    "MaxTimeCriteria": {"max_time": 1000.0},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 3},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[5], 2.0]]},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [5]},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": 5},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 5},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "LogitNormalization": {"renormalize_logits": True},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.3},
    "PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": lambda b, ids: [5, 6, 7]},
    "ExponentialDecayLengthPenalty": {
        "exponential_decay_length_penalty": (2, 1.5),
        "eos_token_id": 7,
    },
    "TypicalLogitsWarper": {"typical_p": 0.5, "do_sample": True},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.01, "do_sample": True},
    "EtaLogitsWarper": {"eta_cutoff": 0.01, "do_sample": True},
    "TopHLogitsWarper": {"top_h": 0.5, "do_sample": True},
    "TemperatureLogitsWarper without do_sample": {
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    },
    "settings of its own": {
        "logits_processor": LogitsProcessorList([TopKLogitsWarper(5, filter_value=-9.0)]),
        "do_sample": True,
        "top_k": 0,
    },
    "an order of their own": {
        "logits_processor": LogitsProcessorList([TopKLogitsWarper(5)]),
        "do_sample": True,
        "top_k": 9,
    },
    "temperature must be": {"temperature": 1000.0, "do_sample": True},
    "num_return_sequences=257": {"num_return_sequences": 257, "do_sample": True},
    "bad_words_ids longer": {"bad_words_ids": [[5] * 12]},
    "up to 64": {"max_new_tokens": 60},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_the_report_names_what_the_loop_runs(models, reason):
    pair, kwargs = models(), REFUSED[reason]
    if "num_return_sequences" in kwargs:
        pair[1].generate(**prompts(1), **kwargs, max_new_tokens=1)
    else:
        torch.manual_seed(3)
        inputs = {"input_ids": prompts(1)["input_ids"]}
        options = {"do_sample": False, "max_new_tokens": 6} | kwargs
        outs = []
        for m in pair:
            torch.manual_seed(3)
            outs.append(m.generate(**inputs, **options))
        assert torch.equal(*outs)
    report = tlk.report(pair[1])
    assert report.generates == {LOOP: 1} and reason in " ".join(report.loops)
    assert report.reasons == {} and reason in str(report)


@pytest.mark.parametrize("kind", ["cache", "dict", "embeddings", "streamer", "positions"])
def test_inputs_and_outputs_that_only_the_loop_has(models, kind):
    original, model = models()
    inputs = prompts(2)
    kwargs = {"do_sample": False, "max_new_tokens": 5}
    if kind == "dict":
        kwargs["return_dict_in_generate"] = True
    elif kind == "embeddings":
        inputs["inputs_embeds"] = original.get_input_embeddings()(inputs.pop("input_ids")).detach()
    elif kind == "streamer":
        kwargs["streamer"] = Calls()
    elif kind == "positions":
        inputs["position_ids"] = torch.arange(11, device=DEVICE).expand(2, -1) + 3
    theirs = original.generate(**inputs, **kwargs)
    if kind == "cache":
        kwargs["past_key_values"] = model(inputs["input_ids"][:, :4]).past_key_values
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        theirs = original.generate(**inputs, do_sample=False, max_new_tokens=5)
    ours = model.generate(**inputs, **kwargs)
    if kind == "dict":
        assert ours.past_key_values is not None
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)
    report = tlk.report(model)
    reasons = {
        "cache": "past_key_values is given",
        "dict": "return_dict_in_generate, which returns the cache",
        "embeddings": "the argument inputs_embeds",
        "streamer": "a streamer for several sequences",
        "positions": "position_ids that do not count the tokens of each row",
    }
    assert report.generates == {LOOP: 1} and report.loops == {reasons[kind]: 1}


def test_masks_that_are_no_left_padding(models):
    for columns in ([5], [9, 10], list(range(11))):
        inputs = prompts(2, paddings=())
        inputs["attention_mask"][0, columns] = 0
        original, model = models()
        kwargs = {"do_sample": False, "max_new_tokens": 5}
        theirs, ours = (m.generate(**inputs, **kwargs) for m in (original, model))
        assert torch.equal(ours[1], theirs[1])
        assert list(model._execution.loops) == [
            "an attention_mask with holes, or padding that is not on the left"
        ]


def test_the_original_runs_where_it_must(models):
    _, model = models()
    with pytest.warns(tlk.FallbackWarning, match="output_attentions"):
        model.generate(
            **prompts(1), max_new_tokens=3, return_dict_in_generate=True, output_attentions=True
        )
    assert model._execution.generates == {ORIGINAL: 1} and not model._execution.loops


def test_penalties_that_see_the_padding(models):
    """Where transformers penalizes other tokens than those of the prompt, its loop must run."""
    inputs = prompts(2, 6, (2,))
    _, model = models()
    ids = inputs["input_ids"]

    def planned(ignored, ids=ids):
        processor = RepetitionPenaltyLogitsProcessor(1.5)
        processor.prompt_ignore_length = ignored
        return plan(
            model._execution.binding.decoder.config, Limits(), wanted(ids, inputs, [processor])
        )

    assert planned(torch.tensor([2, 0])).params.repetition_penalty == 1.5
    assert planned(0, ids[1:].expand(2, -1) * 0 + 5)  # the same tokens anyway
    for ignored in (None, 3, 7, torch.tensor([0, 0]), torch.tensor([2, 7])):
        with pytest.raises(NeedsLoop, match="repetition_penalty, which sees other tokens"):
            planned(ignored)


def wanted(ids, inputs, processors=(), **config):
    base = {"return_dict_in_generate": False, "is_assistant": False, "num_return_sequences": 1}
    base |= {"do_sample": False, "_pad_token_tensor": torch.tensor(0)}
    criteria = [generate_module.MaxLengthCriteria(20)]
    given = {"attention_mask": inputs["attention_mask"]}
    return Wanted(ids, processors, criteria, SimpleNamespace(**(base | config)), False, None, given)


def test_plans(models):
    config = models()[1]._execution.binding.decoder.config
    inputs = prompts(2, 6, (2,))
    call = wanted(inputs["input_ids"], inputs)
    made = plan(config, Limits(), call)
    assert [len(p) for p in made.prompts] == [4, 6] and made.length == 20
    assert made.params.max_tokens == 14 and made.params.greedy
    short = replace(call, criteria=[generate_module.MaxLengthCriteria(3)])
    assert plan(config, Limits(), short).params.max_tokens == 1
    for changed, reason in (
        ({"synced_gpus": True}, "synced_gpus"),
        ({"config": SimpleNamespace(**(vars(call.config) | {"is_assistant": True}))}, "drafts"),
        ({"criteria": [MaxTimeCriteria(3.0)]}, "MaxTimeCriteria"),
        ({"criteria": StoppingCriteriaList()}, "no max_length"),
        ({"inputs": {"token_type_ids": inputs["input_ids"]}}, "the argument token_type_ids"),
        ({"inputs": {"logits_to_keep": torch.tensor([1])}}, "the argument logits_to_keep"),
        ({"inputs": {"attention_mask": torch.ones(2, 7)}}, r"attention_mask of shape \(2, 7\)"),
        ({"inputs": {"position_ids": torch.arange(6)}}, "position_ids"),
    ):
        with pytest.raises(NeedsLoop, match=reason):
            plan(config, Limits(), replace(call, **changed))
    eos = generate_module.MinLengthLogitsProcessor(3, 7)
    with pytest.raises(NeedsLoop, match="MinLengthLogitsProcessor with tokens of its own"):
        plan(config, Limits(), replace(call, processors=[eos]))


def test_positions_that_depend_on_the_length():
    def most(**rope):
        fields = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4} | rope}
        config = tiny("llama", **fields).config
        return longest(FAMILIES["llama"].config(config.to_dict()))

    assert most(rope_type="default") == most(rope_type="linear", factor=2.0) == 64
    assert most(rope_type="dynamic", factor=2.0) == 64
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert (
        most(rope_type="longrope", factor=4.0, original_max_position_embeddings=16, **factors) == 16
    )
    fields = {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
        | {"original_max_position_embeddings": 16}
        | factors
    }
    pair = fresh(**fields), tlk.optimize(fresh(**fields))
    agree(pair, prompts(), max_new_tokens=5)
    pair[1]._execution.generates.clear()
    agree(pair, prompts(), LOOP, max_new_tokens=6)
    assert "up to 16" in str(tlk.report(pair[1]))


# ---- the life of the engine


def engine_of(model):
    runtime = model._execution.runtime
    return None if runtime is None else runtime.engine


def test_the_engine_serves_later_calls_and_grows():
    pair = fresh(max_position_embeddings=2048), tlk.optimize(fresh(max_position_embeddings=2048))
    model = pair[1]
    assert engine_of(model) is None and tlk.report(model).runtime == {}
    agree(pair, prompts(2))
    first = engine_of(model)
    small = tlk.report(model).runtime["kv_cache_bytes"]
    # 2 sequences of 256 tokens; keys and values of 2 layers, 2 heads, 16 floats
    assert small == 2 * 256 * 2 * 2 * 2 * 16 * 4
    agree(pair, prompts(1))
    agree(pair, prompts(2), max_new_tokens=14)
    assert engine_of(model) is first
    agree(pair, prompts(3))  # more at once
    second = engine_of(model)
    assert second is not first and tlk.report(model).runtime["kv_cache_bytes"] == 3 * small // 2
    agree(pair, prompts(1), max_new_tokens=2)
    assert engine_of(model) is second and second.options.max_num_seqs == 4
    agree(pair, prompts(4, 230))  # no more at once than it was made for, but a larger pool
    assert tlk.report(model).runtime["kv_cache_bytes"] == 2 * small
    long = torch.randint(1, 99, (1, 300), device=DEVICE)  # longer
    agree(pair, {"input_ids": long}, max_new_tokens=3)
    third = engine_of(model)
    assert third is not second and third.max_model_len == 512
    agree(pair, prompts(4))
    assert engine_of(model) is third


def test_limits_are_those_of_optimize():
    model = fresh(max_position_embeddings=2048)
    pair = (
        fresh(max_position_embeddings=2048),
        tlk.optimize(model, max_num_seqs=2, max_model_len=300),
    )
    agree(pair, prompts(5))  # three of them wait
    engine = engine_of(model)
    assert engine.options.max_num_seqs == 2 and engine.max_model_len == 300
    assert tlk.report(model).runtime["kv_cache_bytes"] == 2 * -(-300 // PAGE) * PAGE * 512
    tlk.optimize(model, max_num_seqs=2, max_model_len=300)
    assert engine_of(model) is engine
    copied = copy.deepcopy(model)
    assert copied._execution.limits == Limits(2, 300)
    tlk.optimize(model)
    assert engine_of(model) is None
    agree((pair[0], model), prompts(5))
    assert engine_of(model).options.max_num_seqs == 8
    for wrong in (0, -1, True, 2.0):
        for name in ("max_num_seqs", "max_model_len"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
                tlk.optimize(model, **{name: wrong})


def test_new_weights_get_a_new_engine():
    original, model = fresh(), tlk.optimize(fresh())
    agree((original, model), prompts())
    with torch.no_grad():
        for m in (original, model):  # in place: the same engine must see them
            m.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    before = engine_of(model)
    agree((original, model), prompts())
    assert engine_of(model) is before
    for m in (original, model):
        m.half().float()
    assert engine_of(model) is None
    agree((original, model), prompts())
    for m in (original, model):
        weight = original.model.layers[1].mlp.up_proj.weight
        m.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
    agree((original, model), prompts())
    assert engine_of(model) is not before


def tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("way", ["restore", "nobody holds it", "to"])
def test_the_engine_goes_with_the_model(way):
    def use():
        model = tlk.optimize(fresh())
        model.generate(**prompts(), max_new_tokens=3)
        return model

    use()
    before = tensors()
    model = use()
    gc.disable()
    try:
        pool = torch.utils.weak.WeakTensorKeyDictionary()
        for layer in engine_of(model)._runner.cache.layers:
            pool[layer.k] = pool[layer.v] = 1
        del layer
        assert len(pool) == 4
        if way == "restore":
            tlk.restore(model)
        elif way == "to":
            model.half()
        else:
            del model.__dict__["_tlk"]
        assert len(pool) == 0  # without the help of the garbage collector
    finally:
        gc.enable()
    model = pool = None
    assert tensors() <= before


def test_copies_and_pickles_leave_the_engine_behind():
    model = tlk.optimize(fresh(), max_num_seqs=3)
    want = model.generate(**prompts(), max_new_tokens=3)
    engine = engine_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert engine_of(other) is None and other._execution.limits.max_num_seqs == 3
        assert torch.equal(other.generate(**prompts(), max_new_tokens=3), want)
        assert engine_of(other) is not engine
    assert engine_of(model) is engine


class Failing(Calls):
    def put(self, value):
        super().put(value)
        if len(self.calls) == 3:
            raise KeyboardInterrupt


def test_an_interrupted_call_leaves_nothing_behind(models):
    pair = models()
    inputs = {"input_ids": prompts(1)["input_ids"]}
    with pytest.raises(KeyboardInterrupt):
        pair[1].generate(**inputs, max_new_tokens=9, do_sample=False, streamer=Failing())
    engine = engine_of(pair[1])
    assert not engine.has_work and engine.stats()["pages_used"] == 0
    agree(pair, inputs)
    assert engine_of(pair[1]) is engine


def test_a_failing_engine_is_never_covered_up(models, monkeypatch):
    pair = models()
    agree(pair, prompts())
    engine = engine_of(pair[1])
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair[1].generate(**prompts(), max_new_tokens=3)
    agree(pair, prompts())
    assert engine_of(pair[1]) is engine

    def fault(step):
        raise torch.AcceleratorError("illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", fault)
        with pytest.raises(EngineError, match="illegal address"):
            pair[1].generate(**prompts(), max_new_tokens=3)
    assert engine_of(pair[1]) is None
    agree(pair, prompts())
    assert engine_of(pair[1]) is not engine


def test_a_pool_that_does_not_fit_is_refused(monkeypatch):
    long = {"max_position_embeddings": 512}
    pair = fresh(**long), tlk.optimize(fresh(**long))
    with monkeypatch.context() as patch:
        room = 2 * PAGE * 512
        patch.setattr(generate_module.Runtime, "_room", lambda self: room)
        tokens = 2 * PAGE + 9
        message = rf"{tokens} tokens, {tokens * 512} bytes .* room for {room}"
        with pytest.raises(CapacityError, match=message):
            pair[1].generate(**prompts(1, tokens - 30, paddings=()), max_new_tokens=30)
        agree(pair, prompts(3, paddings=()), max_new_tokens=20)  # one after the other


def test_two_calls_at_once(models):
    """While the runtime generates, another call runs on transformers' loop, and both are right."""
    original, model = models()
    inputs = {"input_ids": prompts(1)["input_ids"]}
    want = original.generate(**inputs, max_new_tokens=5, do_sample=False)
    inner = []

    class Nested(Calls):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 3:
                inner.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))

    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=Nested())
    assert torch.equal(out, want) and torch.equal(inner[0], want)
    assert model._execution.generates == {RUNTIME: 1, LOOP: 1}
    assert list(model._execution.loops) == ["another generate of this model is running"]
