import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.models.zoo as zoo
from tests.hf.test_quantized_checkpoint import SIZES, quantized, weights
from tlk import parallel
from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.quantized_checkpoint import save_quantized
from tlk.hf.weights import load_decoder
from tlk.models.decoder import linears
from tlk.models.families import FAMILIES
from tlk.quant.format import DENSE
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import TableFormat

FILE = "model.safetensors"
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
STEPS = [[(0, 3), (2, 5)], [(2, 3), (0, 4)], [(2, 1), (0, 6), (1, 1)], [(0, 4)]]
"""Of at most 8 rows: 8-bit formats round the activations of more, and are compared with 16-bit ones here."""


@pytest.fixture(scope="module")
def original():
    return zoo.tiny("llama", **SIZES).to(torch.bfloat16)


def save(model, folder, format, layout=None):
    save_quantized(quantized(model, format), folder, format=layout)
    return folder


def load(folder, **options):
    return load_decoder(str(folder), progress=False, **options)


def rewrite(folder, change):
    """Let `change` work on the tensors of the file in `folder`."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def configure(folder, change):
    fields = json.loads((folder / "config.json").read_text())
    change(fields["quantization_config"])
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("format", [Int4(32), Fp8("channel"), TableFormat("nf4", 32)], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(model_type, format, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    model = zoo.tiny(model_type, **sizes)
    saved = quantized(model.to(torch.bfloat16), format)
    save_quantized(saved, tmp_path / "out")
    decoder = load(tmp_path / "out", dtype="float32").decoder
    kinds = {type(linear.format) for linear in linears(decoder).values()}
    assert type(format) in kinds and len(kinds) == 2  # the head stays
    dense = zoo.tiny(model_type, **sizes)  # whose rotary tables were never in bfloat16
    dense.load_state_dict(model.state_dict() | weights(saved))
    ids = zoo.random_ids(model)
    logits = zoo.paged_logits(decoder, ids, STEPS)
    assert zoo.relative_error(logits, zoo.transformers_logits(dense, ids)) < 1e-4


def test_what_is_loaded_is_described(original, tmp_path):
    loaded = load(save(original, tmp_path / "out", Int4()))
    assert loaded.quantization["quant_method"] == "compressed-tensors"
    assert loaded.kv_scales == () and loaded.dtype == torch.bfloat16
    parameters = loaded.decoder.parameters()
    assert loaded.bytes == sum(p.numel() * p.element_size() for p in parameters)
    assert loaded.bytes < sum(p.numel() * 2 for p in original.parameters())
    assert not loaded.decoder.training


def test_old_files_say_it_beside_the_config(original, tmp_path):
    out = save(original, tmp_path / "out", Int4(symmetric=False), "awq")
    fields = json.loads((out / "config.json").read_text())
    own = fields.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(fields))
    del own["quant_method"]
    (out / "quant_config.json").write_text(json.dumps(own))
    assert load(out).decoder.layers[0].mlp.down.format == Int4(symmetric=False)
    (out / "quant_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: missing: .*qweight"):
        load(out)


def test_a_layer_that_the_config_ignores_is_not_quantized(original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    configure(out, lambda c: c["ignore"].append("model.layers.1.mlp.down_proj"))
    with pytest.raises(
        CheckpointError, match=r"config says that model\.layers\.1\.mlp\.down_proj stays"
    ):
        load(out)


def test_a_layer_that_the_config_lists_is_quantized(original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    configure(out, lambda c: c.update(ignore=[]))
    with pytest.raises(
        CheckpointError, match=r"config says that lm_head is to be quantized, .* weight"
    ):
        load(out)


def test_a_module_that_the_config_names_is_there(original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    name = "model.layers.7.mlp.down_proj"
    configure(out, lambda c: c["config_groups"]["group_0"]["targets"].insert(0, name))
    with pytest.raises(CheckpointError, match=f"modules that the model does not have: {name}"):
        load(out)


def test_nothing_is_quantized_though_the_config_says_so(original, tmp_path):
    original.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="quantized with gptq, but no layer of it is"):
        load(tmp_path)


def test_scales_beyond_float16(original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    key = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite(out, lambda t: t[key].view(-1)[5:6].fill_(2**17))
    assert load(out).dtype == torch.bfloat16
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj: its scales reach 1\.31e\+05"
    ):
        load(out, dtype="float16")


def test_missing_and_surplus_tensors(original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    rewrite(out, lambda t: t.pop(f"{QKV[0]}.weight_shape"))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.q_proj lacks its tensor weight_shape"
    ):
        load(out)
    rewrite(out, lambda t: t.update({f"{QKV[0]}.weight_shape": torch.tensor([128, 128])}))
    rewrite(out, lambda t: t.update({f"{QKV[0]}.surplus": torch.zeros(1)}))
    with pytest.raises(
        CheckpointError, match=r"q_proj has tensors that are not of its format: surplus"
    ):
        load(out)
    rewrite(out, lambda t: t.update({"model.surplus": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"left over: \['model\.surplus'\]"):
        load(out)


def test_parts_of_one_matmul_are_quantized_alike(original, tmp_path):
    saved = quantized(original, Int4(), {"k_proj": None})
    save_quantized(saved, tmp_path / "half")
    with pytest.raises(
        UnsupportedError, match=r"only model\.layers\.0\.self_attn\.k_proj stay in 16 bit"
    ):
        load(tmp_path / "half")
    saved = quantized(original, Int4(), {"k_proj": Int8Weight()})
    save_quantized(saved, tmp_path / "mixed")
    with pytest.raises(UnsupportedError, match=r"k_proj, .*v_proj are stored as Int4.*Int8Weight"):
        load(tmp_path / "mixed")


def test_blocks_that_would_cross_parts_are_refused(tmp_path):
    model = zoo.tiny("llama", **(SIZES | {"num_key_value_heads": 1})).to(torch.bfloat16)
    save(model, tmp_path / "out", Fp8("block"))
    with pytest.raises(
        UnsupportedError, match=r"q_proj, .*: a layer of 64 outputs, with scales for blocks"
    ):
        load(tmp_path / "out")


def test_scales_per_tensor_stay_each_parts_own(original, tmp_path):
    out = save(original, tmp_path / "out", Fp8("tensor"))
    stored = load_file(out / FILE)
    scale = load(out).decoder.layers[0].attention.qkv.scale
    for i, name in enumerate(QKV):
        assert (scale[128 * i : 128 * (i + 1)] == stored[f"{name}.weight_scale"].float()).all()


def test_the_largest_scale_of_inputs_serves_all_parts(original, tmp_path):
    out = save(original, tmp_path / "out", Int8(static=True))
    rewrite(out, lambda t: t.update({f"{QKV[1]}.input_scale": torch.tensor([2.0]).bfloat16()}))
    assert load(out).decoder.layers[0].attention.qkv.input_scale.item() == 2.0
    rewrite(out, lambda t: t.update({f"{QKV[1]}.input_scale": torch.tensor([0.0]).bfloat16()}))
    with pytest.raises(CheckpointError, match=r"k_proj\.input_scale holds 1 scales"):
        load(out)


def test_act_order_is_one_for_all_parts(original, tmp_path):
    out = save(original, tmp_path / "out", Int4(32), "gptq")
    configure(out, lambda c: c.update(desc_act=True))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    shuffled = (torch.arange(128) // 32)[order].int()

    def shuffle(tensors, names=QKV):
        for name in names:
            tensors[f"{name}.g_idx"] = shuffled.clone()

    rewrite(out, shuffle)
    qkv = load(out).decoder.layers[0].attention.qkv
    assert torch.equal(shuffled[qkv.perm[0].long()], (torch.arange(128) // 32).int())
    rewrite(out, lambda t: t.update({f"{QKV[1]}.g_idx": shuffled.flip(0)}))
    with pytest.raises(UnsupportedError, match="perm varies over inputs only and must be equal"):
        load(out)


NAMES = [
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("k, v", NAMES)
def test_scales_of_the_cache_by_every_name(k, v, quantize, original, tmp_path):
    out = tmp_path / "out"
    if quantize:
        save(original, out, Int4())
    else:
        original.save_pretrained(out)
    scales = {f"model.layers.0.{v}": torch.tensor([0.25]), f"model.layers.0.{k}": torch.tensor(0.5)}
    rewrite(out, lambda t: t.update(scales | {"model.layers.0.self_attn.q_scale": torch.ones(1)}))
    first, second = load(out).kv_scales
    assert second is None
    assert first.k.tolist() == [0.5] * 2 and first.v.tolist() == [0.5 if k == v else 0.25] * 2


def test_only_the_cache_is_quantized(original, tmp_path):
    original.save_pretrained(tmp_path)
    scales = {f"model.layers.0.self_attn.{x}_scale": torch.tensor([0.5]) for x in "kv"}
    rewrite(tmp_path, lambda t: t.update(scales))
    fields = json.loads((tmp_path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    ours = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    theirs = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    for own in (ours, theirs):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": own}))
        loaded = load(tmp_path)
        assert loaded.kv_scales[0].k.tolist() == [0.5, 0.5]
        assert loaded.decoder.layers[0].mlp.down.format == DENSE


@pytest.mark.parametrize(
    "scale, match",
    [
        (torch.zeros(1), "holds scales that are zero"),
        (torch.tensor([float("nan")]), "not finite"),
        (torch.ones(3), r"must have 1 or 2 elements, got \[3\]"),
    ],
)
def test_bad_scales_of_the_cache(scale, match, original, tmp_path):
    out = save(original, tmp_path / "out", Int4())
    names = [f"model.layers.0.self_attn.{x}_scale" for x in "kv"]
    rewrite(out, lambda t: t.update({names[0]: scale, names[1]: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=rf"self_attn\.k_scale .*{match}"):
        load(out)


def test_a_tied_head_is_not_quantized(tmp_path):
    model = zoo.tiny("llama", tie_word_embeddings=True, **SIZES).to(torch.bfloat16)
    saved = quantized(model, Int4())
    save_quantized(saved, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.decoder.lm_head is None
    packed = Int4().quantize(model.lm_head.weight.detach())
    rewrite(
        tmp_path / "out",
        lambda t: t.update({"lm_head.weight_packed": packed["weight"].view(torch.int32)}),
    )
    with pytest.raises(CheckpointError, match=r"left over: .*lm_head\.weight_packed"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    "format", [Int4(32), Fp8("channel"), Int8(static=True), TableFormat("nf4", 32)], ids=str
)
def test_ranks_hold_their_parts(format, original, tmp_path, monkeypatch):
    out = save(original, tmp_path / "out", format)
    whole = linears(load(out).decoder)
    ranks = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        ranks.append(linears(load(out).decoder))
    for name, linear in whole.items():
        own = [r[name].format.dequantize(r[name].packed()) for r in ranks]
        expected = linear.format.dequantize(linear.packed())
        if linear.split == "in":
            assert torch.equal(torch.cat(own, 1), expected), name
        elif name.endswith("qkv"):
            halves = [part.chunk(2) for part in expected.split([128, 128, 128])]
            for rank in (0, 1):
                assert torch.equal(own[rank], torch.cat([half[rank] for half in halves])), name
        elif linear.split == "out":
            halves = [part.chunk(2) for part in expected.chunk(2)]
            for rank in (0, 1):
                assert torch.equal(own[rank], torch.cat([half[rank] for half in halves])), name
