"""The optimized object against the same model before it was optimized."""

import copy
import gc
import io
import pickle
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import tlk
from tests.models.zoo import tiny
from tlk.hf import execution
from tlk.hf.cache import PagedCache
from tlk.kernels import tuning
from tlk.kernels._op import count_ops, kernels_on_cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "nemotron"]
FIELDS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "nemotron": {"partial_rotary_factor": 0.5},
}


def fresh(family="llama", **fields):
    model = tiny(family, **(FIELDS[family] | fields)).to(DEVICE)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def pair(family="llama", **fields):
    """The model as transformers wrote it, and optimized."""
    return fresh(family, **fields), tlk.optimize(fresh(family, **fields))


def prompts(rows=2, count=11):
    ids = torch.randint(1, 99, (rows, count), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


def close(actual, expected, mask=None):
    error = (actual - expected).abs()
    if mask is not None:
        error = error * mask[..., None]
    assert error.max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def ran():
    """Fails the test unless tlk ran every forward of the models given to it."""
    models = []
    yield models.append
    for model in models:
        report = tlk.report(model)
        assert report.forwards.get("tlk", 0) + report.forwards.get("runtime", 0) > 0
        assert report.forwards.get("original", 0) == 0 and report.reasons == {}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(family, ran):
    original, model = pair(family)
    ran(model)
    ids, mask = prompts()
    close(model(ids).logits, original(ids).logits)
    close(model(ids, attention_mask=mask).logits, original(ids, attention_mask=mask).logits, mask)
    right = mask.flip(1)
    close(
        model(ids, attention_mask=right).logits, original(ids, attention_mask=right).logits, right
    )
    close(model(inputs_embeds=original.model.embed_tokens(ids)).logits, original(ids).logits)
    positions = torch.arange(11, device=DEVICE)[None] + 5
    close(model(ids, position_ids=positions).logits, original(ids, position_ids=positions).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family, ran):
    original, model = pair(family, max_position_embeddings=128)
    ran(model)
    ids, mask = prompts()
    for kwargs in ({"attention_mask": mask}, {}):
        kwargs |= {"max_new_tokens": 64, "do_sample": False}
        assert torch.equal(model.generate(ids, **kwargs), original.generate(ids, **kwargs))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bf16_is_as_close_to_float32_as_transformers(family, ran):
    exact = fresh(family)
    original = copy.deepcopy(exact).bfloat16()
    exact = copy.deepcopy(original).float()
    model = tlk.optimize(copy.deepcopy(original))
    ran(model)
    ids, _ = prompts(4, 17)
    truth = exact(ids).logits
    theirs = (original(ids).logits.float() - truth).square().mean().sqrt()
    ours = (model(ids).logits.float() - truth).square().mean().sqrt()
    assert ours <= 2 * theirs


def test_it_is_the_same_object_under_the_same_name():
    original = fresh()
    model = tlk.optimize(original)
    assert model is original and type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, type(fresh())) and tlk.optimize(model) is model


def test_no_second_copy_of_the_weights():
    model = fresh("qwen3")
    size = sum(p.numel() for p in model.parameters())
    tlk.optimize(model)
    decoder = model._execution.binding.decoder
    ours = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()
    }
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert set(ours) == theirs and sum(ours.values()) == 4 * size


def test_it_runs_no_module_of_transformers(monkeypatch):
    model = tlk.optimize(fresh("qwen3"))
    calls = []
    for module in model.modules():
        if module is not model:
            kind, name = type(module), type(module).__name__
            monkeypatch.setattr(kind, "forward", lambda *a, _n=name, **k: calls.append(_n))
    ids, mask = prompts()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert calls == []


# per layer: qkv and gate_up with their norm, output and down; one more for the logits
LINEARS = {
    "llama": {"norm_linear": 3, "matmul_add_": 4, "gated_linear": 2},
    "mistral": {"norm_linear": 3, "matmul_add_": 4, "gated_linear": 2},
    "qwen2": {"norm_linear": 3, "matmul_add_": 4, "gated_linear": 2},
    "qwen3": {"norm_linear": 3, "matmul_add_": 4, "gated_linear": 2},
    "nemotron": {"layer_norm": 5, "matmul": 5, "matmul_add_": 4},
}


def by_op(counts):
    """The counts without what ran the ops: "matmul[triton]" and "matmul[cublas]" as "matmul"."""
    totals = Counter()
    for name, n in counts.items():
        totals[name.partition("[")[0]] += n
    return totals


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_ops_of_a_forward_are_counted(family):
    model = tlk.optimize(fresh(family))
    ids, _ = prompts()
    with count_ops() as counts:
        cache = model(ids).past_key_values
    expected = LINEARS[family] | {"rope_and_write_kv_": 2, "paged_attention": 2}
    assert by_op(counts) == expected
    if DEVICE == "cpu":
        assert set(counts) == {f"{name}[reference]" for name in expected}
    with count_ops() as decode:
        model(ids[:, :1], past_key_values=cache)
    assert by_op(decode) == by_op(counts)
    assert tlk.report(model).ops == {"prefill": counts, "decode": decode}


@torch.no_grad()
def test_report_counts_what_it_can_before_anything_ran():
    report = tlk.report(tlk.optimize(fresh()))
    assert by_op(report.ops["prefill"])["paged_attention"] == 2
    assert report.forwards == {} and "paged_attention[" in str(report)
    assert report.to_dict()["family"] == "llama"


class Twice(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * torch.linspace(0.1, 2, scores.shape[-1], device=scores.device)


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= 17, device=input_ids.device)


class Collect:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


GENERATE = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"logits_processor": LogitsProcessorList([Twice()]), "do_sample": False},
    "stopping": {"stopping_criteria": StoppingCriteriaList([After()]), "do_sample": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
}


DRAWN = ("sampling", "several returned")  # by tlk's runtime


@pytest.mark.parametrize("kind", GENERATE)
def test_generate_keeps_working(kind, ran):
    original, model = pair("mistral")
    ran(model)
    ids, mask = prompts(1 if kind == "prompt lookup" else 2)
    if kind == "prompt lookup":
        mask[:] = 1
    outs = []
    for m in (original, model):
        torch.manual_seed(4)
        outs.append(m.generate(ids, attention_mask=mask, max_new_tokens=20, **GENERATE[kind]))
    if kind in DRAWN:  # from the same distribution, but not with the same noise
        assert outs[0].shape == outs[1].shape and torch.equal(outs[0][:, :11], outs[1][:, :11])
        assert tlk.report(model).generates == {"tlk's runtime": 1}
    else:
        assert torch.equal(*outs)


def test_generate_returns_scores_and_its_cache(ran):
    original, model = pair()
    ran(model)
    ids, mask = prompts()
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = original.generate(ids, **kwargs), model.generate(ids, **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert isinstance(ours.past_key_values, PagedCache)
    # and the conversation goes on from that cache
    more = torch.cat([ours.sequences, ids[:, :3]], 1)
    wide = torch.cat([mask, mask[:, -1:].expand(-1, 8)], 1)
    kwargs["attention_mask"] = wide
    a = model.generate(more, past_key_values=ours.past_key_values, **kwargs)
    assert torch.equal(a.sequences, original.generate(more, **kwargs).sequences)


def test_generate_streams(ran):
    original, model = pair()
    ran(model)
    ids, _ = prompts(1)
    tokens = []
    for m in (original, model):
        streamer = Collect()
        m.generate(ids, max_new_tokens=9, do_sample=False, streamer=streamer)
        assert streamer.ended
        tokens.append(streamer.tokens)
    assert tokens[0] == tokens[1] and len(tokens[0]) == 20


def test_generate_with_an_assistant():
    original, model = pair()
    assistant = fresh("llama", num_hidden_layers=1)
    ids, _ = prompts(1)
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    want = original.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **kwargs), want)


def test_generate_from_embeddings(ran):
    original, model = pair()
    ran(model)
    embeds = original.model.embed_tokens(prompts()[0]).detach()
    kwargs = {"inputs_embeds": embeds, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**kwargs), original.generate(**kwargs))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # of torch's compiler, on a GPU
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_named_cache_goes_to_the_original(kind):
    original, model = pair()
    ids, _ = prompts()
    kwargs = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
    with pytest.warns(tlk.FallbackWarning, match="cache_implementation"):
        out = model.generate(ids, **kwargs)
    assert torch.equal(out, original.generate(ids, **kwargs))
    assert f"cache_implementation='{kind}'" in str(tlk.report(model))
    assert tlk.report(model).generates == {"original": 1}


def test_attentions_and_hidden_states_come_from_the_original():
    original, model = pair()
    ids, _ = prompts()
    with pytest.warns(tlk.FallbackWarning, match="output_"), torch.no_grad():
        ours = model(ids, output_attentions=True, output_hidden_states=True)
        theirs = original(ids, output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))
    assert tlk.report(model).forwards == {"original": 1}
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        model(ids, output_attentions=True)


@torch.no_grad()
def test_the_original_can_go_on_with_tlks_cache():
    original, model = pair("mistral")
    ids, mask = prompts()
    theirs = original(ids, attention_mask=mask, use_cache=True).past_key_values
    ours = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for i in range(2):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        kwargs = {"attention_mask": mask, "output_attentions": i == 0}
        a = model(ids[:, i : i + 1], past_key_values=ours, **kwargs) if i else None
        if a is None:
            with pytest.warns(tlk.FallbackWarning):
                a = model(ids[:, i : i + 1], past_key_values=ours, **kwargs)
        close(a.logits, original(ids[:, i : i + 1], past_key_values=theirs, **kwargs).logits)


def test_another_cache_stays_with_the_original():
    original, model = pair()
    ids, _ = prompts()
    with torch.no_grad():
        cache = original(ids, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        with pytest.warns(tlk.FallbackWarning, match="DynamicCache"):
            ours = model(ids[:, :2], past_key_values=cache).logits
        close(ours, original(ids[:, :2], past_key_values=again).logits)


def test_masks_of_another_kind_go_to_the_original():
    original, model = pair()
    ids, _ = prompts()
    mask = torch.ones(2, 1, 11, 11, device=DEVICE).tril().bool()
    mask[:, :, 5:, :2] = False
    with pytest.warns(tlk.FallbackWarning, match="4-D attention_mask"), torch.no_grad():
        close(model(ids, attention_mask=mask).logits, original(ids, attention_mask=mask).logits)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]], device=DEVICE)
    with pytest.warns(tlk.FallbackWarning, match="packed"), torch.no_grad():
        kwargs = {"position_ids": packed, "use_cache": False}
        close(model(ids[:1], **kwargs).logits, original(ids[:1], **kwargs).logits)


def test_pipeline(ran):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    letters = Tokenizer(models.BPE({chr(32 + i): i for i in range(95)}, []))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=" ")
    texts = []
    for model in pair():
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device=DEVICE)
        out = pipe(["def f", "import os, sys"], do_sample=False, max_new_tokens=8, batch_size=2)
        texts.append([row[0]["generated_text"] for row in out])
    ran(model)
    assert texts[0] == texts[1]


def test_labels_give_the_loss_of_transformers(ran):
    original, model = pair()
    ran(model)
    ids, mask = prompts()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # what padding predicts, the first token, is nobody's business
    ours = model(ids, attention_mask=mask, labels=labels)
    theirs = original(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)


def test_backward_raises_and_train_returns_to_the_original():
    original, model = pair()
    ids, _ = prompts()
    with pytest.raises(RuntimeError, match=r"no backward in eval mode.*model\.train"):
        model(ids, labels=ids).loss.backward()
    model.train()
    original.train()
    model(ids, labels=ids).loss.backward()
    original(ids, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.optim.SGD(original.parameters(), 0.1).step()
    with torch.no_grad():  # the step reached the fused weights
        close(model.eval()(ids).logits, original.eval()(ids).logits)
    assert tlk.report(model).reasons == {}


def test_return_dict_and_logits_to_keep(ran):
    original, model = pair()
    ran(model)
    ids, mask = prompts()
    with torch.no_grad():
        assert isinstance(model(ids, return_dict=False), tuple)
        for keep in (1, 3, 50, torch.tensor([2, 9])):
            a = model(ids, attention_mask=mask, logits_to_keep=keep).logits
            b = original(ids, attention_mask=mask, logits_to_keep=keep).logits
            kept = mask[:, keep] if isinstance(keep, torch.Tensor) else mask[:, -keep:]
            close(a, b, kept)
        assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_moving_and_casting(ran):
    model = tlk.optimize(fresh())
    ids, _ = prompts()
    want = model(ids).logits
    model.to(torch.float16)
    assert model(ids).logits.dtype == torch.float16
    model.float()
    assert (model(ids).logits - want).abs().max() < 0.01 * want.abs().max()
    ran(model)


def test_a_dtype_without_kernels_goes_to_the_original():
    model = tlk.optimize(fresh())
    with pytest.warns(tlk.FallbackWarning, match="float64"):
        model.double()
    ids, _ = prompts()
    assert model(ids).logits.dtype == torch.float64
    model.float()
    model(ids)
    assert tlk.report(model).forwards == {"original": 1, "tlk": 1}


@torch.no_grad()
def test_deep_copies_are_independent(ran):
    model = tlk.optimize(fresh())
    ids, _ = prompts()
    want = model(ids).logits
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.zero_()
    assert type(other).__name__ == "LlamaForCausalLM" and torch.equal(other(ids).logits, want)
    assert model(ids).logits.abs().max() == 0
    ran(model)
    ran(other)


@torch.no_grad()
def test_weights_loaded_later_are_used(ran):
    model = tlk.optimize(fresh())
    other = fresh()
    for p in other.parameters():
        p.mul_(0.7)
    ids, _ = prompts()
    model.load_state_dict(other.state_dict())
    close(model(ids).logits, other(ids).logits)
    for p in other.parameters():
        p.mul_(0.9)
    model.load_state_dict(other.state_dict(), assign=True)
    close(model(ids).logits, other(ids).logits)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        other.model.layers[1].mlp.up_proj.weight
    )
    other.model.layers[0].mlp.up_proj.weight = other.model.layers[1].mlp.up_proj.weight
    close(model(ids).logits, other(ids).logits)
    ran(model)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_resizing_the_vocabulary(tied, ran):
    original, model = pair(tie_word_embeddings=tied)
    ran(model)
    for m in (original, model):
        torch.manual_seed(2)
        m.resize_token_embeddings(131, mean_resizing=False)
    ids, _ = prompts()
    assert model(ids).logits.shape[-1] == 131
    close(model(ids).logits, original(ids).logits)


@torch.no_grad()
def test_saving_and_loading(tmp_path, ran):
    original, model = pair("qwen3")
    assert list(model.state_dict()) == list(original.state_dict())
    model.save_pretrained(tmp_path)
    ids, _ = prompts()
    for again in (
        type(original).from_pretrained(tmp_path).to(DEVICE),
        tlk.Qwen3ForCausalLM.from_pretrained(tmp_path).to(DEVICE),
    ):
        assert torch.equal(
            again.model.layers[1].self_attn.k_proj.weight,
            model.model.layers[1].self_attn.k_proj.weight,
        )
        close(again(ids).logits, original(ids).logits)
    ran(again)


@torch.no_grad()
def test_pickles_round_trip(ran):
    model = tlk.optimize(fresh())
    ids, _ = prompts()
    want = model(ids).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, want)
        ran(again)


@torch.no_grad()
def test_restore_leaves_no_trace():
    original, model = pair()
    ids, _ = prompts()
    want = original(ids).logits
    model(ids)
    assert tlk.restore(model) is model and type(model) is type(original)
    assert "_tlk" not in model.__dict__ and torch.equal(model(ids).logits, want)
    sizes = {p.untyped_storage().nbytes() - p.nbytes for p in model.parameters()}
    assert sizes == {0}
    assert tlk.restore(model) is model
    with pytest.raises(ValueError, match=r"must come from tlk\.optimize"):
        tlk.report(model)
    close(tlk.optimize(model)(ids).logits, want)


def storages():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@torch.no_grad()
def test_memory_returns():
    ids, mask = prompts()
    tlk.optimize(fresh()).generate(ids, attention_mask=mask, max_new_tokens=3)
    before = storages()
    model = tlk.optimize(fresh())
    gc.disable()
    try:
        weights = [torch.utils.weak.WeakTensorKeyDictionary()]
        held = weights[0]
        for p in model._execution.binding.decoder.parameters():
            held[p] = 1
        cache = model(ids).past_key_values
        held[cache.kv.layers[0].k] = 1
        del cache, p
        assert len(held) == len(list(model._execution.binding.decoder.parameters()))
        tlk.restore(model)
        assert len(held) == 0  # without the help of the garbage collector
    finally:
        gc.enable()
    del model, held, weights
    assert storages() <= before


@pytest.mark.skipif(DEVICE == "cpu", reason="counts the bytes of a GPU")
@torch.no_grad()
def test_gpu_memory_returns():
    ids, mask = prompts()
    tlk.optimize(fresh()).generate(ids, attention_mask=mask, max_new_tokens=3)
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = fresh()
    bare = torch.cuda.memory_allocated()
    tlk.optimize(model).generate(ids, attention_mask=mask, max_new_tokens=3)
    gc.collect()
    tlk.restore(model)
    gc.collect()
    assert torch.cuda.memory_allocated() == bare
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_changed_module_sends_the_model_back(ran):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x):
            return self.inner(x) + 1

    model = tlk.optimize(fresh())
    ids, _ = prompts()
    layer = model.model.layers[1].self_attn
    linear, layer.v_proj = layer.v_proj, Wrapped(layer.v_proj)
    original = fresh()
    original.model.layers[1].self_attn.v_proj = Wrapped(original.model.layers[1].self_attn.v_proj)
    with pytest.warns(tlk.FallbackWarning, match=r"layers\.1\.self_attn\.v_proj is a .*Wrapped"):
        assert torch.equal(model(ids).logits, original(ids).logits)
    layer.v_proj = linear
    tlk.optimize(model)
    close(model(ids).logits, fresh()(ids).logits)


def test_hooks_are_called():
    model = tlk.optimize(fresh())
    ids, _ = prompts()
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(1))
    with pytest.warns(tlk.FallbackWarning, match=r"model\.layers\.0 has forward hooks"):
        model(ids)
    hook.remove()
    model(ids)
    assert seen == [1] and tlk.report(model).forwards == {"original": 1, "tlk": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
def test_a_model_under_peft_runs_its_original_forward():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(fresh(), LoraConfig(target_modules=["q_proj"], r=2))
    ids, _ = prompts()
    want = wrapped.eval()(ids).logits
    inner = wrapped.base_model.model
    with pytest.warns(tlk.FallbackWarning, match=r"q_proj is a peft\..*Linear"):
        assert tlk.optimize(inner) is inner
    assert torch.equal(wrapped(ids).logits, want)
    assert "q_proj" in tlk.report(inner).refused
    # and peft put around an optimized model takes it back to the original
    model = tlk.optimize(fresh())
    with pytest.warns(tlk.FallbackWarning, match=r"q_proj is a peft\..*Linear"):
        around = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
        assert torch.equal(around(ids).logits, want)


def test_a_model_with_accelerate_hooks_runs_its_original_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = fresh()
    ids, _ = prompts()
    want = model(ids).logits
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    with pytest.warns(tlk.FallbackWarning, match=r"layers\.0\.mlp has a forward of its own"):
        tlk.optimize(model)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="the process group of this test is for CPU tensors")
def test_a_model_with_sharded_weights_runs_its_original_forward(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fresh()
        layer = model.model.layers[0].mlp.up_proj
        whole = distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        layer.weight = nn.Parameter(whole)
        with pytest.warns(tlk.FallbackWarning, match=r"up_proj\.weight is a DTensor"):
            assert type(tlk.optimize(model)) is type(fresh())
    finally:
        distributed.destroy_process_group()


def test_unknown_families_work_as_before():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99, n_positions=32)
    model = GPT2LMHeadModel(config).eval().to(DEVICE)
    ids, _ = prompts()
    want = model(ids).logits
    with pytest.warns(tlk.FallbackWarning, match=r"GPT2LMHeadModel .* of no family"):
        assert tlk.optimize(model) is model
    assert torch.equal(model(ids).logits, want) and type(model) is GPT2LMHeadModel
    assert "of no family that tlk knows: llama" in str(tlk.report(model))
    with pytest.raises(tlk.UnsupportedError, match="GPT2LMHeadModel"):
        tlk.optimize(tlk.restore(model), strict=True)


def test_other_heads_are_refused():
    model = LlamaForSequenceClassification(fresh().config)
    with pytest.raises(tlk.UnsupportedError, match=r"LlamaForSequenceClassification.*ForCausalLM"):
        tlk.optimize(model, strict=True)


def test_strict_raises_at_the_call_too():
    model = tlk.optimize(fresh(), strict=True)
    with pytest.raises(tlk.UnsupportedError, match="output_attentions"):
        model(prompts()[0], output_attentions=True)


def test_bad_input():
    model = tlk.optimize(fresh())
    ids, _ = prompts()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        tlk.optimize("meta-llama/Llama-3.1-8B")
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    for nothing in (ids[:, :0], ids[:0]):
        for kwargs in ({"inputs": nothing}, {"input_ids": nothing}):
            with pytest.raises(ValueError, match="at least one sequence of at least one token"):
                model.generate(**kwargs)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="cache of another model"):
        other = tlk.optimize(fresh("qwen2", num_hidden_layers=1))
        model(ids, past_key_values=other(ids).past_key_values)
    with pytest.raises(ValueError, match="holds 2 sequences, the input has 1"):
        model(ids[:1, :1], past_key_values=model(ids).past_key_values)


@torch.no_grad()
def test_empty_batches_and_long_prompts(ran):
    original, model = pair(max_position_embeddings=16)
    ran(model)
    assert model(torch.zeros(0, 5, dtype=torch.long, device=DEVICE)).logits.shape == (0, 5, 99)
    ids, _ = prompts(
        1, 40
    )  # beyond max_position_embeddings: transformers computes it, and so do we
    close(model(ids).logits, original(ids).logits)


@torch.no_grad()
def test_an_all_padding_row_does_not_disturb_the_others(ran):
    original, model = pair()
    ran(model)
    ids, mask = prompts(3)
    mask[1] = 0
    ours = model(ids, attention_mask=mask).logits
    assert ours.isfinite().all()
    close(ours[2:], original(ids[2:]).logits)


def test_torch_compile_runs_it(ran):
    original, model = pair()
    ran(model)
    ids, _ = prompts()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        close(compiled(ids).logits, original(ids).logits)


def test_inference_mode_leaves_nothing_behind(ran):
    original, model = pair("qwen3")
    ran(model)
    ids, mask = prompts()
    with torch.inference_mode():
        a = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        cache = model(ids, attention_mask=mask).past_key_values
    b = original.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(a, b)
    with torch.no_grad():  # what was made inside serves outside
        wide = torch.cat([mask, mask[:, -1:]], 1)
        model(ids[:, :1], attention_mask=wide, past_key_values=cache)
        close(model(ids).logits, original(ids).logits)


@torch.no_grad()
def test_the_report_says_where_configurations_came_from(monkeypatch):
    """On a CPU no kernel runs and nothing is configured; here one asks as if it had run."""
    model = tlk.optimize(fresh())
    assert DEVICE == "cuda" or tlk.report(model).configs == {}
    model = tlk.optimize(fresh())
    run = execution._compute

    def compute(*args):
        with kernels_on_cpu():
            for op in ("norm_linear", "matmul"):
                tuning.lookup(op, 0, torch.device("cpu"), torch.bfloat16, (8, 8), 1)
        return run(*args)

    monkeypatch.setattr(execution, "_compute", compute)
    report = tlk.report(model)
    assert report.configs["matmul"] == report.configs["norm_linear"] == ["heuristic"]
    assert "configurations of matmul: heuristic" in str(report)
