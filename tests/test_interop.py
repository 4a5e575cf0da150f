"""What must stay true of optimus.interop and `optimus export`. Derived in notebooks/13_interop.ipynb."""
import contextlib
import http.server
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from fork_server import TEXTS
from torch import nn
from transformers import (AutoConfig, AutoTokenizer, DeepseekV2Config,
                          DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM)

from optimus import LanguageModel, ModelConfig, cli, from_transformers, generate, load_tokenizer
from optimus.checkpoint import CheckpointError, save_checkpoint
from optimus.corpus import check_hub
from optimus.interop import export_checkpoint, measured_gap, their_tokenizer, to_transformers
from optimus.model_card import recorded_training
from optimus.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GQA = dict(attention="gqa")
MLA_SIZES = [  # V, C, L, H and what differs: nothing round, every option once
    (53, 24, 1, 2, {}), (61, 40, 2, 5, dict(compression_ratio=0.35)), (67, 36, 3, 3, dict(rope_theta=37.0)),
    (71, 56, 2, 7, dict(tie_embeddings=False)), (73, 44, 2, 11, dict(mlp_ratio=7, rope_seq_len=41)),
    (79, 12, 5, 1, dict(norm_eps=0.01)), (83, 52, 2, 13, dict(intermediate_size=101, checkpointing=False)),
    (89, 68, 1, 17, dict(compression_ratio=1, tie_embeddings=False, rope_theta=500000)),
    (97, 20, 2, 1, dict(compression_ratio=0.1, dropout=0.4))]
GQA_SIZES = [
    (53, 24, 1, 2, dict(num_kv_heads=1)), (61, 30, 2, 5, dict(num_kv_heads=5)),
    (67, 42, 3, 3, dict(num_kv_heads=1, rope_theta=37.0)),
    (71, 56, 2, 7, dict(num_kv_heads=7, tie_embeddings=False)),
    (73, 44, 2, 22, dict(num_kv_heads=11)), (79, 14, 5, 1, dict(num_kv_heads=1, norm_eps=0.01)),
    (83, 60, 2, 6, dict(intermediate_size=101)),
    (89, 66, 1, 33, dict(num_kv_heads=3, tie_embeddings=False, rope_theta=500000)),
    (97, 70, 2, 5, dict(num_kv_heads=1, dropout=0.4, rope_seq_len=41))]
ALL = MLA_SIZES + [(*sizes[:4], sizes[4] | GQA) for sizes in GQA_SIZES]
MLA, LLAMA = ALL[1], ALL[11]
# what a foreign configuration starts from
SMALL = dict(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
RANKS = dict(kv_lora_rank=10, q_lora_rank=10, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=12,
             num_key_value_heads=2, first_k_dense_replace=2)


def randomize(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():  # gains of one would hide a swapped or forgotten norm
        with torch.no_grad(): nn.init.normal_(p, std=0.3) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def random_model(V, C, L, H, options):
    return randomize(LanguageModel(ModelConfig(V, C, L, H, **{"rope_seq_len": 59} | options)))


def tokens_for(model, B=2, T=37):
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def gap(model, theirs):
    tokens = tokens_for(model)
    return (model(tokens) - theirs(tokens).logits).abs().max().item()


def storages(model): return {x.untyped_storage().data_ptr() for x in model.state_dict().values()}


@pytest.mark.parametrize("sizes", ALL, ids=str)
def test_there_and_back_with_equal_logits_and_the_same_weights(sizes):
    model = random_model(*sizes).train()  # dropout on: what goes out must be in eval mode
    theirs = to_transformers(model)
    assert type(theirs) is (LlamaForCausalLM if model.config.attention == "gqa" else DeepseekV2ForCausalLM)
    assert not theirs.training and gap(model.eval(), theirs) < 1e-4
    back = from_transformers(theirs)
    assert gap(back, theirs) < 1e-4
    state, again = model.state_dict(), back.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in state.items())
    lost = {"dropout": 0.0, "checkpointing": True}  # training settings: they do not travel
    derived = ("ffn_dim", "q_lora_rank", "kv_lora_rank") if model.config.attention == "mla" else ("ffn_dim",)
    for name in derived: assert getattr(back.config, name) == getattr(model.config, name)
    again = from_transformers(to_transformers(back))
    assert again.config == back.config  # nothing more is lost the second time
    written_otherwise = {"compression_ratio", "mlp_ratio", "intermediate_size"}
    if model.config.attention == "mla": written_otherwise |= {"num_kv_heads"}
    def plain(config): return {k: v for k, v in config.to_dict().items() if k not in written_otherwise}
    assert plain(back.config) == plain(model.config) | lost


def test_the_default_configuration_comes_back_as_it_was():
    plain = ModelConfig(vocab_size=53, embedding_dim=48, num_layers=1, num_attention_heads=4, dropout=0.0)
    for config in (plain, ModelConfig(**plain.to_dict() | GQA)):
        assert from_transformers(to_transformers(LanguageModel(config))).config == config


@pytest.mark.parametrize("sizes", [MLA, LLAMA], ids=["mla", "gqa"])
def test_greedy_text_is_equal_over_50_tokens(sizes):
    model = random_model(*sizes)
    prompt = tokens_for(model, B=2, T=7)
    mask = torch.ones_like(prompt)
    theirs = to_transformers(model).generate(prompt, attention_mask=mask, max_new_tokens=50)
    ours = generate(model, prompt, 50, temperature=0)
    assert torch.equal(ours, theirs) and theirs.shape == (2, 57)
    assert ours[0, 7:].unique().numel() > 5  # no loop of one token, which would prove little


def test_no_end_of_text_is_assumed_and_a_given_one_stops():
    model = random_model(*LLAMA)
    prompt = tokens_for(model, B=1, T=7)
    free = to_transformers(model)
    assert free.generation_config.eos_token_id is None and free.config.eos_token_id is None
    ids = generate(model, prompt, 50, temperature=0)[0, 7:].tolist()
    end = next(i for i in ids[3:] if i not in ids[:3])
    stopping = to_transformers(model, eos_token_id=end)
    out = stopping.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50)[0, 7:].tolist()
    assert out == ids[: ids.index(end) + 1]
    assert stopping.model.embed_tokens.padding_idx is None  # its gradient would be zero for ever


@pytest.mark.parametrize("sizes", [MLA, LLAMA, ALL[3], ALL[12]], ids=lambda s: str(s[4]))
def test_no_memory_is_shared(sizes):
    model = random_model(*sizes)
    theirs = to_transformers(model)
    back = from_transformers(theirs)
    assert not storages(model) & storages(theirs) and not storages(theirs) & storages(back)
    before = [x.clone() for x in model.state_dict().values()]
    for p in (*theirs.parameters(), *back.parameters()): p.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("sizes", [ALL[0], ALL[3], ALL[9], ALL[12]], ids=lambda s: str(s[4]))
def test_a_tied_head_stays_one_parameter_and_an_untied_one_two(sizes):
    model = random_model(*sizes)
    theirs = to_transformers(model)
    back = from_transformers(theirs)
    tied = model.config.tie_embeddings
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    assert (back.head.weight is back.embedding.weight) == tied == back.config.tie_embeddings
    assert back.num_parameters() == model.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert all(p.requires_grad for p in (*theirs.parameters(), *back.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sizes", [MLA, LLAMA], ids=["mla", "gqa"])
def test_the_dtype_stays(sizes, dtype, tmp_path):
    model = random_model(*sizes).to(dtype)
    theirs = to_transformers(model)
    assert {p.dtype for p in theirs.parameters()} == {dtype} and theirs.config.dtype == dtype
    theirs.save_pretrained(tmp_path)
    back = from_transformers(tmp_path)
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())


def test_the_random_state_of_the_caller_is_left_alone():
    model = random_model(*MLA)
    before = torch.get_rng_state()
    from_transformers(to_transformers(model))
    assert torch.equal(before, torch.get_rng_state())


def test_the_right_logits_need_the_permutation_and_nothing_else_raises():
    """The comparison of this file sees the fault it is for: names and shapes right, rows in our order."""
    model = random_model(*LLAMA)
    theirs = to_transformers(model)
    for layer, block in zip(theirs.model.layers, model.blocks, strict=True):
        layer.self_attn.q_proj.weight.data = block.attention.q_proj.weight.detach().clone()
        layer.self_attn.k_proj.weight.data = block.attention.k_proj.weight.detach().clone()
    assert gap(model, theirs) > 0.1


def foreign(kind, config, **changes):
    theirs = randomize(kind(config))
    for name, value in changes.items(): setattr(theirs.config, name, value)
    return theirs


@pytest.mark.parametrize("options", [  # the shapes of SmolLM2, TinyLlama, Llama 2 and others, made small
    dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
         rope_parameters={"rope_type": "default", "rope_theta": 1e5}, rms_norm_eps=1e-5),
    dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=1, intermediate_size=88),
    dict(head_dim=12, num_key_value_heads=2, attention_dropout=0.1, hidden_act="swish", pad_token_id=0),
])
def test_foreign_llamas_open(options):
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL | options))
    model = from_transformers(theirs)
    assert gap(model, theirs) < 1e-4 and not model.training and model.config.attention == "gqa"
    assert model.config.ffn_dim == theirs.config.intermediate_size
    assert model.config.norm_eps == theirs.config.rms_norm_eps


def test_foreign_deepseek_and_mistral_open():
    theirs = foreign(DeepseekV2ForCausalLM, DeepseekV2Config(**SMALL | RANKS))
    model = from_transformers(theirs)
    assert gap(model, theirs) < 1e-4 and (model.config.kv_lora_rank, model.config.ffn_dim) == (10, 40)
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=1, head_dim=12, sliding_window=None)
    theirs = foreign(transformers.MistralForCausalLM, config)
    assert gap(from_transformers(theirs), theirs) < 1e-4


def test_every_even_rank_comes_back_exactly():
    for C in (4, 12, 52, 576, 2048, 7168):
        for rank in range(2, C + 1, 2):
            config = ModelConfig(64, C, 1, 1, compression_ratio=rank / C)
            assert config.kv_lora_rank == rank


def test_a_resized_vocabulary_is_read_from_the_weights():
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=1))
    theirs.resize_token_embeddings(64)
    model = from_transformers(theirs)
    assert model.config.vocab_size == 64 and gap(model, theirs) < 1e-4


def rope(kind, **more): return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=1024)
REFUSED = [
    (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True), "attention_bias"),
    (LlamaForCausalLM, LlamaConfig, dict(mlp_bias=True), "mlp_bias"),
    (LlamaForCausalLM, LlamaConfig, dict(head_dim=16), "head_dim=16"),
    (LlamaForCausalLM, LlamaConfig, dict(hidden_act="gelu"), "gelu"),
    (LlamaForCausalLM, LlamaConfig, rope("linear", factor=2.0), "linear"),
    (LlamaForCausalLM, LlamaConfig, rope("yarn", factor=4.0), "yarn"),
    (LlamaForCausalLM, LlamaConfig, rope("dynamic", factor=2.0), "dynamic"),
    (LlamaForCausalLM, LlamaConfig, LLAMA3, "llama3"),
    (LlamaForCausalLM, LlamaConfig, rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (transformers.MistralForCausalLM, transformers.MistralConfig, dict(head_dim=12, num_key_value_heads=2),
     "sliding_window=4096"),
    (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, dict(num_key_value_heads=2), "bias"),
    (transformers.MixtralForCausalLM, transformers.MixtralConfig,
     dict(num_key_value_heads=2, num_local_experts=2, head_dim=12), "mixture-of-experts"),
    (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, dict(head_dim=12, num_key_value_heads=2),
     "sliding_window|gemma2"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(first_k_dense_replace=1, n_routed_experts=2),
     "mixture-of-experts"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(q_lora_rank=8), "q_lora_rank=8, kv_lora_rank=10"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(q_lora_rank=None), "q_lora_rank=None"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(q_lora_rank=26, kv_lora_rank=26), "_rank=26"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(q_lora_rank=9, kv_lora_rank=9), "kv_lora_rank=9"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(qk_nope_head_dim=16), "qk_nope_head_dim=16"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(qk_rope_head_dim=8), "qk_rope_head_dim=8"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(v_head_dim=16), "v_head_dim=16"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(num_key_value_heads=1), "num_key_value_heads=1"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | dict(attention_bias=True), "attention_bias"),
    (DeepseekV2ForCausalLM, DeepseekV2Config, RANKS | rope("yarn", factor=4.0), "yarn"),
    (transformers.LlamaForSequenceClassification, LlamaConfig, {}, "no language-model head"),
    (transformers.LlamaModel, LlamaConfig, {}, "no language-model head"),
]


@pytest.mark.parametrize("kind, config, options, words", REFUSED, ids=[str(row[3]) for row in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(kind, config, options, words):
    theirs = kind(config(**SMALL | options))
    with pytest.raises(ValueError, match=words) as caught: from_transformers(theirs)
    assert "\n" not in str(caught.value) and kind.__name__ in str(caught.value)


def test_gpt2_is_refused_by_its_architecture():
    config = transformers.GPT2Config(vocab_size=53, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="architecture 'gpt2'.*and biases"): from_transformers(theirs)


@pytest.mark.parametrize("what", [None, 3, nn.Linear(2, 2), LanguageModel(ModelConfig(53, 24, 1, 2))])
def test_what_is_no_model_is_refused(what):
    with pytest.raises(ValueError, match=type(what).__name__): from_transformers(what)
    if not isinstance(what, LanguageModel):
        with pytest.raises(ValueError, match=type(what).__name__): to_transformers(what)


def test_tensors_that_do_not_fit_are_refused():
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL))
    theirs.model.layers[1].self_attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="layers.1.self_attn.extra"): from_transformers(theirs)
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL), num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(24, 24\), here \(12, 24\)"):
        from_transformers(theirs)
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL))
    theirs.lm_head.bias = nn.Parameter(torch.zeros(53))
    with pytest.raises(ValueError, match="biases .lm_head.bias"): from_transformers(theirs)
    with torch.device("meta"): theirs = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="not in memory"): from_transformers(theirs)


def test_a_folder_in_many_files_opens(tmp_path):
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=1))
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = from_transformers(str(tmp_path))
    assert gap(model, theirs) < 1e-4


def test_a_folder_that_is_wrong_is_one_sentence(tmp_path):
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "llama"
    theirs = foreign(LlamaForCausalLM, LlamaConfig(**SMALL))
    theirs.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, text = load_file(weights), config.read_text()

    def refused(words):
        with pytest.raises(ValueError, match=words) as caught: from_transformers(folder)
        assert "\n" not in str(caught.value)
    name = "model.layers.1.self_attn.q_proj"
    save_file({k: v for k, v in state.items() if k != f"{name}.weight"}, weights, {"format": "pt"})
    refused("missing tensor model.layers.1.self_attn.q_proj.weight")  # transformers would draw it at random
    save_file(state | {f"{name}.bias": torch.zeros(24)}, weights, {"format": "pt"})
    refused("unexpected tensor .*bias.*biases cannot be represented")
    frequencies = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(state | frequencies, weights, {"format": "pt"})
    assert gap(from_transformers(folder), theirs) < 1e-4  # old files hold RoPE's frequencies
    weights.write_bytes(b"no tensors")
    refused("cannot be opened")
    weights.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refused("cannot be opened")  # a pickle is not opened
    config.write_text(json.dumps(json.loads(text) | {"rope_parameters": LLAMA3["rope_parameters"]}))
    refused("llama3")  # before any weight is read
    config.write_text(json.dumps(json.loads(text) | {"model_type": "nonsense"}))
    refused("nonsense")
    config.write_text("{")
    refused("no transformers model")
    config.unlink()
    refused("no transformers model")


def test_our_own_folder_and_no_folder_are_one_sentence(tmp_path):
    random_model(*LLAMA).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="no transformers model"): from_transformers(tmp_path / "ours")
    for name in (tmp_path / "nowhere", "nowhere", "./a/b", "a/b/c", "-/-"):
        with pytest.raises(ValueError, match="neither a folder nor a name"): from_transformers(name)


MISTRAL = dict(sliding_window=None, head_dim=12, num_key_value_heads=2)


def scaled(**rope): return {"rope_parameters": {"rope_theta": 1e4, **rope}}


LONG = dict(original_max_position_embeddings=1024)
BY_ONE = [(LlamaForCausalLM, LlamaConfig, scaled(rope_type="linear", factor=1.0)),
          (LlamaForCausalLM, LlamaConfig, scaled(rope_type="dynamic", factor=1)),
          (LlamaForCausalLM, LlamaConfig, scaled(rope_type="yarn", factor=1.0, **LONG)),
          (LlamaForCausalLM, LlamaConfig, scaled(rope_type="yarn", factor=1.0, attention_factor=1.0, **LONG)),
          (LlamaForCausalLM, LlamaConfig, scaled(rope_type="llama3", factor=1.0, low_freq_factor=1.0,
                                                 high_freq_factor=4.0, **LONG)),
          (LlamaForCausalLM, LlamaConfig, dict(rope_scaling={"type": "linear", "factor": 1.0})),
          (transformers.MistralForCausalLM, transformers.MistralConfig,
           MISTRAL | scaled(rope_type="linear", factor=1.0)),
          (DeepseekV2ForCausalLM, DeepseekV2Config,
           RANKS | scaled(rope_type="yarn", factor=1.0, mscale=0.7, mscale_all_dim=0.7, **LONG))]


@pytest.mark.parametrize("kind, config, options", BY_ONE, ids=str)
def test_rope_scaled_by_one_is_not_scaled(kind, config, options):
    theirs = foreign(kind, config(**SMALL | options))
    assert gap(from_transformers(theirs), theirs) < 1e-4


@pytest.mark.parametrize("options, words", [
    (scaled(rope_type="linear", factor=1.5), "linear.*factor=1.5"),
    (scaled(rope_type="yarn", factor=1.0, attention_factor=1.2, **LONG), "yarn"),
    (scaled(rope_type="longrope", factor=1.0, short_factor=[1.0] * 6, long_factor=[2.0] * 6, **LONG),
     "longrope")])
def test_rope_that_is_scaled_after_all_is_refused(options, words):
    theirs = LlamaForCausalLM(LlamaConfig(**SMALL | options))
    with pytest.raises(ValueError, match=f"rope scaling .*{words}"): from_transformers(theirs)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    foreign(LlamaForCausalLM, LlamaConfig(**SMALL)).save_pretrained(folder, max_shard_size="20KB")
    return folder


def edit(folder, name, change):
    """Change one file of a copied folder: None deletes it, bytes replace it, a function gets its text."""
    path = folder / name
    if change is None: path.unlink()
    elif isinstance(change, bytes): path.write_bytes(change)
    else: path.write_text(change(path.read_text()))


INDEX = "model.safetensors.index.json"
FOREIGN = [
    ("shard", None, "incomplete.*lacks model-0000"), ("shard", LFS, "Git LFS pointer"),
    ("shard", b"\x08\0\0\0\0\0\0\0{}", "cannot be opened"), ("config.json", LFS, "config.json.*LFS pointer"),
    (INDEX, LFS, "index.json is a Git LFS pointer"), (INDEX, b"{}", "weight_map"),
    (INDEX, lambda text: text.replace('"model-00001', '"../model-00001'), "names '../model-00001.*folder"),
    (INDEX, lambda text: text.replace('"model-00001', '"/model-00001'), "names '/model-00001.*of its folder")]


@pytest.mark.parametrize("name, change, words", FOREIGN, ids=[f"{row[0]}-{row[2][:12]}" for row in FOREIGN])
def test_files_that_only_look_like_a_model_are_named(tmp_path, llama_folder, name, change, words):
    folder = tmp_path / "theirs"
    shutil.copytree(llama_folder, folder)
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 2
    shutil.copy(folder / shards[0], tmp_path)  # what a wrong index would lead to
    edit(folder, shards[1] if name == "shard" else name, change)
    with pytest.raises(ValueError, match=words) as caught: from_transformers(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_foreign_pickle_is_named_and_not_opened(tmp_path, llama_folder):
    shutil.copy(llama_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(tR.")
    with pytest.raises(ValueError, match="cannot be opened.*pytorch_model.bin only, a pickle.*safetensors"):
        from_transformers(tmp_path)


# ---- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """/api/models/OWNER/NAME answers as the owner's name says, with the headers of the real hub."""
    def do_GET(self):
        kind, gate = self.path.split("/")[3], self.path.endswith("auth-check")
        if kind == "open": return self.answer(200)
        if kind == "gated" and not gate: return self.answer(200, gated="manual")
        code, header = {"gated": (403, "GatedRepo"), "closed": (401, "GatedRepo"), "broken": (500, ""),
                        "nobody": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}[kind]
        self.answer(code, header)

    def answer(self, code, header="", gated=""):
        data = json.dumps({"id": "a/b", "gated": gated or False, "siblings": [], "error": "no"}).encode()
        self.send_response(code)
        if header: self.send_header("X-Error-Code", header)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def hub_address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def at(monkeypatch, address):
    import huggingface_hub as hub
    monkeypatch.setattr(hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("owner, kind, words", [
    ("gated", ValueError, "gated/m is a gated model: ask for access on .*/gated/m, .*login"),
    ("closed", ValueError, "closed/m is a gated"), ("nobody", ValueError, "no open model 'nobody/m'"),
    ("private", ValueError, "no open model 'private/m'.*login"),
    ("broken", ConnectionError, "broken/m is no folder here.*cannot be reached .*500")])
def test_what_the_hub_says_is_said(monkeypatch, hub_address, owner, kind, words):
    at(monkeypatch, hub_address)
    with pytest.raises(kind, match=words) as caught: from_transformers(f"{owner}/m")
    assert "\n" not in str(caught.value)


def test_an_open_model_is_read_from_the_hub(monkeypatch, hub_address):
    at(monkeypatch, hub_address)
    asked = []
    def read(name): return asked.append(name) or random_model(*LLAMA)
    monkeypatch.setattr("optimus.interop._load_theirs", read)
    with pytest.raises(ValueError, match="got LanguageModel"): from_transformers("open/m")
    assert asked == ["open/m"]


def test_a_silent_hub_is_given_up(monkeypatch):
    """That the call returns shows it: the socket never says a word, and is open until the end."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(check_hub, "__defaults__", ("dataset", 0.05))
        with pytest.raises(ConnectionError, match="nobody/nothing is no folder here.*cannot be reached"):
            from_transformers("nobody/nothing")
    monkeypatch.undo()
    assert check_hub.__defaults__ == ("dataset", 3.0)


def test_offline_nobody_is_asked(monkeypatch, hub_address):
    at(monkeypatch, hub_address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="open/m is no folder here"): from_transformers("open/m")


# ---- export


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(TEXTS, 300)


def checkpoint_of(folder, tokenizer, attention="mla", **options):
    sizes = dict(attention=attention, num_kv_heads=1, rope_theta=37.0, rope_seq_len=97)
    model = random_model(307, 40, 2, 5, sizes | options)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model


ODD_TEXTS = ["the public debt", "  two  spaces , a comma !", "naïve 公債 🙂\n\ttab", "", " n't 's", "\0\x7f"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.search(r"```python\n(from transformers import .*?)```", README, re.S)[1]
PROGRAM = """
import contextlib, io, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
texts, lines = json.loads(sys.stdin.read())
answers, shown = [], io.StringIO()
for folder in sys.argv[1:]:
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    back = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    tokens = tokenizer(texts[0], return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=50)[0].tolist()
    both = tokenizer([texts[0], texts[1]], return_tensors="pt", padding=True)["input_ids"].tolist()
    numbers = [model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id,
               tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length]
    answers.append([type(model).__name__, ids, back, written, both, numbers])
with contextlib.redirect_stdout(shown): exec(lines, {})
print(json.dumps([answers, shown.getvalue(), "optimus" in sys.modules]))
"""


@pytest.mark.slow
def test_the_folder_opens_in_a_process_without_optimus(tmp_path, tokenizer, command):
    """Both kinds, and what `optimus export` writes, by the lines of the README."""
    names, models = ("mla", "gqa"), {}
    for name in names:
        models[name] = checkpoint_of(tmp_path / f"checkpoint-{name}", tokenizer, name)
        assert export_checkpoint(tmp_path / f"checkpoint-{name}", tmp_path / name) < 1e-5
    run = tmp_path / "checkpoints" / "run-001"
    save_checkpoint(run, random_model(307, 40, 2, 5, {}), 1, tokenizer=tokenizer)
    model = random_model(307, 40, 2, 5, dict(rope_theta=37.0, rope_seq_len=97))
    save_checkpoint(run, model, 2, tokenizer=tokenizer)
    result = command(*re.search(r"^optimus (export checkpoints/run-001 my-model)$", README, re.M)[1].split())
    assert result.returncode == 0, result.stderr
    assert "step-00000002" in result.stdout
    assert re.search("opened again .*float32 weights.* in float32: .* differ by at most", result.stdout)
    assert re.search(r"```python\n(.*?)```", card(tmp_path / "my-model"), re.S)[1] == LINES
    assert len(LINES.splitlines()) == 4
    child = subprocess.run([sys.executable, "-c", PROGRAM, *names], cwd=tmp_path, text=True,
                           capture_output=True, input=json.dumps([ODD_TEXTS, LINES]))
    assert child.returncode == 0, child.stderr
    answers, shown, imported = json.loads(child.stdout)
    assert not imported
    end = tokenizer.eos_token_id
    for name, (kind, ids, back, written, both, numbers) in zip(names, answers, strict=True):
        assert kind == {"mla": "DeepseekV2ForCausalLM", "gqa": "LlamaForCausalLM"}[name]
        assert ids == [tokenizer.encode(text) for text in ODD_TEXTS]
        assert back == ODD_TEXTS
        ours = generate(models[name], tokenizer.encode(ODD_TEXTS[0]), 50, temperature=0, eos_token_id=end)
        assert written == ours and len(set(written)) > 8
        assert both[0][:5] == [end] * 5 and both[0][-3:] == ids[0][-3:]  # padded on the left
        assert numbers == [end] * 5 + [97]
    ids = generate(model, tokenizer.encode("The public debt"), 50, temperature=0, eos_token_id=end)
    assert shown == tokenizer.decode(ids, skip_special_tokens=False) + "\n"


def test_the_folder_holds_what_every_reader_looks_for(tmp_path, tokenizer):
    for name, theta in (("mla", 37.0), ("gqa", 500000.0)):
        checkpoint_of(tmp_path / "checkpoint", tokenizer, name, rope_theta=theta)
        out = tmp_path / name
        export_checkpoint(tmp_path / "checkpoint", out)
        assert sorted(p.name for p in out.iterdir()) == [
            "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"]
        written = json.loads((out / "config.json").read_text())
        assert written["rope_theta"] == theta == written["rope_parameters"]["rope_theta"]
        assert AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == theta
        assert written["pad_token_id"] is None
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["clean_up_tokenization_spaces"] is False
        back = from_transformers(out)  # and it comes home
        model = LanguageModel.from_pretrained(tmp_path / "checkpoint")
        assert all(torch.equal(x, back.state_dict()[n]) for n, x in model.state_dict().items())
        assert "optimus" not in json.dumps(written)


@pytest.mark.slow
def test_gpt2s_tokenizer_survives_under_both_kinds(tmp_path):
    tokenizer = load_tokenizer("gpt2")
    for name in ("mla", "gqa"):
        config = ModelConfig(50257, 8, 1, 2, num_kv_heads=1, attention=name, rope_seq_len=31)
        randomize(LanguageModel(config)).save_pretrained(tmp_path / f"checkpoint-{name}")
        save_tokenizer(tokenizer, tmp_path / f"checkpoint-{name}")
        export_checkpoint(tmp_path / f"checkpoint-{name}", tmp_path / name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in ODD_TEXTS:
            ids = tokenizer.encode(text)
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text == tokenizer.decode(ids)
        assert theirs.eos_token_id == 50256 and len(theirs) == 50257


def test_an_exported_folder_says_how_to_open_it(tmp_path, tokenizer):
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds a model of transformers; .*from_transformers\('.*out'\)"):
        LanguageModel.from_pretrained(tmp_path / "out")


def test_our_tokenizer_is_not_changed_by_the_export(tmp_path, tokenizer):
    before = tokenizer.encode("a<|endoftext|>b")
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    theirs = their_tokenizer(tokenizer, 59)
    assert len(theirs("a<|endoftext|>b")["input_ids"]) == 3  # the documented difference
    assert theirs("a<|endoftext|>b", split_special_tokens=True)["input_ids"] == before
    assert tokenizer.encode("a<|endoftext|>b") == before and len(before) > 3


def card(folder): return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_was_recorded_and_nothing_else(tmp_path, tokenizer):
    model = random_model(307, 40, 2, 5, {})
    state = {"tokens": 12345, "corpus": {"name": "sotu", "fingerprint": "ab12"},
             "training_config": {"train_val_split": 0.9, "dataset_config": None},
             "run": {"best_loss": 2.5, "best_step": 10}}
    folder = save_checkpoint(tmp_path / "run", model, 20, tokenizer=tokenizer, trainer_state=state)
    record = recorded_training(folder)
    assert record["held-out loss"] == "2.500 nats per token (the best of the run, at step 10)"
    rows = [{"step": 10, "loss": 9.0, "validation_loss": 2.5, "bits_per_byte": 1.75},
            {"step": 15, "loss": 9.0, "validation_loss": 2.625, "bits_per_byte": 1.875},
            {"step": 25, "loss": 9.0, "validation_loss": 1.0, "bits_per_byte": 1.0}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "run" / "history.jsonl").write_text("\n".join([*lines, '{"step": 26, "validat']))
    record = recorded_training(folder)
    assert record["held-out loss"] == "2.625 nats per token, 1.875 bits per byte (measured at step 15)"
    assert record["steps"] == "20" and record["training tokens"] == "12,345"
    assert "`sotu`" in record["training data"] and "90%" in record["training data"]
    export_checkpoint(folder, tmp_path / "my-model")
    text = card(tmp_path / "my-model")
    size = f"{model.num_parameters():,} parameters"
    for words in (*record.values(), size, "# my-model", "rank 20", "not tried"): assert words in text
    assert "not recorded" not in text


def test_the_card_admits_what_it_does_not_know_and_hides_private_paths(tmp_path, tokenizer):
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    (tmp_path / "history.jsonl").write_text('{"step": 1, "validation_loss": 0.5}\n')  # of something else
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert card(tmp_path / "out").count("not recorded") == 4 and str(tmp_path) not in card(tmp_path / "out")


def test_nothing_is_destroyed_and_nothing_half_written_stays(tmp_path, tokenizer, monkeypatch):
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    full, place = tmp_path / "full", tmp_path / "a-file"
    full.mkdir()
    (full / "thesis.tex").write_text("the only copy")
    place.write_text("x")
    for out in (full, place, tmp_path / "checkpoint"):
        with pytest.raises(ValueError, match="new or empty"): export_checkpoint(tmp_path / "checkpoint", out)
    assert (full / "thesis.tex").read_text() == "the only copy" and place.read_text() == "x"
    before = sorted(p.name for p in tmp_path.iterdir())

    def disk_full(*_, **__): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", disk_full)
        with pytest.raises(CheckpointError, match="No space left on device.*bytes free"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "empty")  # an empty folder is welcome
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "empty"])


def test_an_export_with_other_logits_is_refused(tmp_path, tokenizer, monkeypatch):
    checkpoint_of(tmp_path / "checkpoint", tokenizer, "gqa")
    monkeypatch.setattr("optimus.interop.permute_rope", lambda weight, *_, **__: weight.clone())  # the fault
    with pytest.raises(CheckpointError, match="logits differ by"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    model = checkpoint_of(tmp_path / "checkpoint", tokenizer)
    model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="differ by nan"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")


def test_a_checkpoint_that_is_damaged_or_incomplete_is_refused(tmp_path, tokenizer):
    folder = save_checkpoint(tmp_path, random_model(307, 40, 1, 5, {}), 1, tokenizer=tokenizer)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 0x40
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        export_checkpoint(folder, tmp_path / "out")
    (folder / "manifest.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"): export_checkpoint(folder, tmp_path / "out")
    save_tokenizer(train_tokenizer(TEXTS, 400), folder)
    with pytest.raises(ValueError, match="400 entries, the model only 307"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_belong_together_are_named_with_both_numbers(tmp_path, tokenizer):
    checkpoint_of(tmp_path, train_tokenizer(TEXTS, 311))
    with pytest.raises(ValueError, match=r"tokenizer.json has 311 entries, the model only 307 .*config.json"):
        export_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ValueError, match="tokenizer.json is a Git LFS pointer"):
        export_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place, error", [
    ("optimus.interop.their_config", TypeError("__init__() got an unexpected keyword argument 'rope'")),
    ("optimus.interop.their_tokenizer", AttributeError("no attribute 'x'")),
    ("optimus.interop.model_card", KeyError("name")),
    ("optimus.interop.reloaded_logit_gap", RuntimeError("size mismatch")),
    ("optimus.interop.recorded_training", ValueError("a mistake of ours"))])
def test_a_mistake_of_ours_is_not_called_a_disk_error(tmp_path, tokenizer, monkeypatch, place, error):
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    def wrong(*_, **__): raise error
    monkeypatch.setattr(place, wrong)
    with pytest.raises(type(error)) as caught: export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert caught.value is error and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def rust_error(text):
    from safetensors import SafetensorError
    return SafetensorError(f"Error while serializing: I/O error: {text}")


@pytest.mark.parametrize("place, error, words", [
    ("transformers.PreTrainedModel.save_pretrained", rust_error("No space (os error 28)"), "os error 28"),
    ("optimus.interop.their_tokenizer", Exception("No space left on device (os error 28)"), "No space left"),
    ("optimus.files.sync", PermissionError(13, "Permission denied"), "Permission denied"),
    ("optimus.files.os.replace", OSError(30, "Read-only file system"), "Read-only file system")])
def test_what_the_system_refuses_is_one_sentence(tmp_path, tokenizer, monkeypatch, place, error, words):
    checkpoint_of(tmp_path / "checkpoint", tokenizer)
    def refuse(*_, **__): raise error
    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        with pytest.raises(CheckpointError, match=f"could not write .*out: .*{words}.*bytes free"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("dtype, claims", [(torch.bfloat16, "In bfloat16 nothing was compared"),
                                           (torch.float16, "In float16 nothing was compared"),
                                           (torch.float32, "Greedy text is that of")])
def test_an_export_claims_what_was_measured_in_its_dtype(tmp_path, tokenizer, dtype, claims):
    model = checkpoint_of(tmp_path / "checkpoint", tokenizer).to(dtype)
    model.save_pretrained(tmp_path / "checkpoint")
    worst = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    text = card(tmp_path / "out")
    assert f"| number format | {name} |" in text and claims in text and 0 < worst < 1e-4
    measured = measured_gap(worst, name)
    assert measured in text and measured.startswith(f"{name} weights, computed in float32")
    assert f"differ by at most {worst:.1e}" in measured
    assert ("nothing was compared" in text) == (dtype != torch.float32)


# ---- the command, and what the README promises


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "shipped_models", dict)

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = cli.main(list(arguments))
            except SystemExit as end: code = end.code
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    return run


@pytest.mark.parametrize("arguments, words", [
    (["export"], "required"), (["export", "x"], "required"),
    (["export", "nowhere", "out"], "no checkpoint 'nowhere'"), (["export", "good", "good"], "new or empty"),
    (["export", "empty", "out"], "config.json"),
])
def test_bad_input_is_one_sentence(tmp_path, tokenizer, command, arguments, words):
    checkpoint_of(tmp_path / "good", tokenizer)
    (tmp_path / "empty").mkdir()
    result = command(*arguments)
    assert result.returncode in (1, 2) and words in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("optimus: ") and not (tmp_path / "out").exists()


def test_the_command_has_help(command):
    result = command("export", "--help")
    assert result.returncode == 0 and "transformers" in result.stdout and "CHECKPOINT OUT" in result.stdout
    assert "export" in command("--help").stdout
