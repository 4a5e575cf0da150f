"""What must stay true of optimus.config. Derived in notebooks/07_config.ipynb."""
import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optimus.attention import GroupedQueryAttention
from optimus.config import (PRESETS, ModelConfig, TrainingConfig, activations_per_token, attention_matrices,
                            cache_bytes_per_token, count_parameters, flops_per_token, inside, training_memory)
from optimus.mla import MultiHeadLatentAttention

# Sizes are distinct primes times what divisibility needs; the shared fields differ from their defaults.
SIZES = dict(vocab_size=61, embedding_dim=60, num_layers=3, num_attention_heads=5, num_kv_heads=5,
             dropout=0.0,
             intermediate_size=31)
NOT_WHOLE = [0, -1, 1.5, 2.0, True, "3", None, math.nan, math.inf, [1]]
NOT_TRUTH = [1, 0, "True", None]
NOT_TEXT = ["", "  ", 3, None, True]
BAD_MODEL = {
    **{name: NOT_WHOLE for name in ("vocab_size", "embedding_dim", "num_layers", "num_attention_heads",
                                    "num_kv_heads", "rope_seq_len")},
    "checkpointing": NOT_TRUTH,
    "tie_embeddings": NOT_TRUTH,
    "compression_ratio": [0, -0.5, 1.01, math.nan, math.inf, "a", True, None],
    "mlp_ratio": [0, -4, 1001, 1e308, math.nan, math.inf, "a", True, None],
    "dropout": [1, -0.1, 1.5, math.nan, "a", False, None],
    "attention": ["mha", "MLA", "", None, 3, ["mla"]],
    "rope_theta": [0, -1.0, 1e-320, math.nan, math.inf, "a", None],
    "norm_eps": [0, -1e-6, 1, math.nan, "a", None],
    "intermediate_size": [0, -1, 1.5, True, "a", math.nan],
}
BAD_TRAINING = {
    **dict.fromkeys(("batch_size", "max_length", "num_epochs", "dataset_size", "eval_interval",
                     "save_interval", "keep_last"), NOT_WHOLE),
    **dict.fromkeys(("learning_rate", "gradient_clip_val"), [0, -1.0, math.nan, math.inf, "a", True, None]),
    "weight_decay": [-1e-9, math.nan, math.inf, "a", True, None],
    "min_learning_rate": [-1e-9, math.nan, math.inf, "a", True, 0.9],  # 0.9 is above the peak
    **dict.fromkeys(("warmup", "beta1", "beta2"), [-0.1, 1, math.nan, "a", True, None]),
    **dict.fromkeys(("num_workers", "eval_batches", "sample_interval"), [-1, 1.5, True, "a", None, math.nan]),
    **dict.fromkeys(("max_steps", "micro_batch_size"), [0, -1, 1.5, True, "a", math.nan]),
    **dict.fromkeys(("dataset_name", "checkpoint_dir", "tensorboard_dir"), NOT_TEXT),
    "train_val_split": [0, 1, -0.1, math.nan, "a", True, None],
    "seed": [-1, 2**32, 1.5, True, "a", None],
    "optimizer": ["sgd", "", None], "parallel": ["zero", "", None],
    "amp": ["on", True, None],
    "compile": NOT_TRUTH,
    "tokenizer": ["", 3, True],
    "start_from": ["", 3, True],
    "dataset_config": ["", 3, True],
    "run_name": ["", 3, "..", "a/b", "a\\b"],
}
CASES = [(cls, name, value) for cls, bad in ((ModelConfig, BAD_MODEL), (TrainingConfig, BAD_TRAINING))
         for name, values in bad.items() for value in values]


def test_every_field_has_bad_values_here():
    for cls, bad in ((ModelConfig, BAD_MODEL), (TrainingConfig, BAD_TRAINING)):
        assert {field.name for field in dataclasses.fields(cls)} == bad.keys()


@pytest.mark.parametrize("cls, name, value", CASES)
def test_a_bad_value_is_refused_by_name_with_the_value(cls, name, value):
    with pytest.raises(ValueError) as error: cls(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be ") and message.endswith(f"got {value!r}")
    assert "\n" not in message


def kinds_of(config): return {type(value) for value in config.to_dict().values()}


def test_numbers_of_numpy_are_numbers_and_become_pythons():
    model = ModelConfig(vocab_size=np.uint16(61), embedding_dim=np.int8(60), num_attention_heads=np.int64(5),
                        compression_ratio=np.float16(0.5), dropout=Fraction(1, 4), rope_theta=np.int32(37),
                        norm_eps=np.float64(0.01), tie_embeddings=np.False_, intermediate_size=np.uint8(31),
                        attention=np.str_("mla"), rope_seq_len=np.longlong(17))
    same = ModelConfig(61, 60, num_attention_heads=5, dropout=0.25, rope_theta=37, norm_eps=0.01,
                       tie_embeddings=False, intermediate_size=31, rope_seq_len=17)
    assert model == same and kinds_of(model) <= {int, float, str, bool, type(None)}
    training = TrainingConfig(seed=np.uint32(2**32 - 1), learning_rate=np.float64(0.25), compile=np.True_,
                              max_steps=np.int16(3), micro_batch_size=np.int64(2),
                              dataset_name=np.str_("sotu"))
    assert kinds_of(training) <= {int, float, str, bool, type(None)}
    for config in (model, training): assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize("cls, name, value", [
    (ModelConfig, "num_layers", np.True_), (ModelConfig, "num_layers", np.float64(2)),
    (ModelConfig, "num_layers", np.int64(0)), (ModelConfig, "dropout", np.float32(1)),
    (ModelConfig, "dropout", np.float64("nan")), (ModelConfig, "dropout", np.False_),
    (ModelConfig, "checkpointing", np.int64(1)), (ModelConfig, "attention", np.str_("MLA")),
    (ModelConfig, "num_layers", torch.tensor(3)), (ModelConfig, "dropout", torch.tensor(0.5)),
    (ModelConfig, "num_layers", np.array(3)), (ModelConfig, "num_layers", np.array([3])),
    (TrainingConfig, "seed", np.int64(-1)), (TrainingConfig, "batch_size", Decimal(3)),
    (TrainingConfig, "learning_rate", np.float16("inf")), (TrainingConfig, "learning_rate", 1j)])
def test_what_numpy_has_beside_numbers_and_what_is_out_of_range_is_refused(cls, name, value):
    with pytest.raises(ValueError) as error: cls(**{name: value})
    assert str(error.value).startswith(f"{name} must be ") and str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("name, allowed", [("dropout", "[0, 1)"), ("compression_ratio", "(0, 1]"),
                                           ("num_layers", "[1, inf)"),
                                           ("attention", "'mla', 'gqa'"), ("intermediate_size", "or None")])
def test_the_message_names_what_is_allowed(name, allowed):
    with pytest.raises(ValueError) as error: ModelConfig(**{name: -1})
    assert allowed in str(error.value)


def test_the_names_and_defaults_that_others_rely_on():
    model, training = ModelConfig(), TrainingConfig()
    assert list(model.to_dict().values()) == [50257, 768, 8, 12, 2, True, 0.5, 2048, 4, 0.15, "mla", 10000.0,
                                              1e-6, True, None]
    assert list(training.to_dict().values())[:12] == [64, 64, 1e-3, 0.01, 3, 0.9, 1.0, "wikimedia/wikipedia",
                                                      200000, 4, "checkpoints", "runs"]
    assert count_parameters(model)["total"] == 94_256_640
    assert PRESETS["base"] == (model, training) and "tiny" in PRESETS


def test_edges_of_the_ranges_are_allowed():
    ModelConfig(dropout=0, compression_ratio=1, mlp_ratio=2, rope_theta=1, intermediate_size=1)
    TrainingConfig(weight_decay=0, warmup=0, eval_batches=0, sample_interval=0, seed=2**32 - 1, num_workers=0,
                   max_steps=1)


@pytest.mark.parametrize("changes, words", [
    (dict(embedding_dim=100), "num_attention_heads must divide embedding_dim = 100, got 12"),
    (dict(embedding_dim=72, num_attention_heads=12), "multiple of 4.*72 / 12 = 6"),
    (dict(embedding_dim=36, num_attention_heads=12, attention="gqa"), "multiple of 2.*36 / 12 = 3"),
    (dict(num_kv_heads=5, attention="gqa"), "num_kv_heads must divide num_attention_heads = 12, got 5"),
    (dict(compression_ratio=0.001), "compression_ratio.*even.*got 0.001, which makes 1"),
    (dict(compression_ratio=385 / 768), "compression_ratio.*even.*385"),
    (dict(compression_ratio=1e-9), "compression_ratio.*at least 2.*0"),
])
def test_sizes_that_do_not_fit_each_other(changes, words):
    with pytest.raises(ValueError, match=words): ModelConfig(**changes)


def test_each_attention_is_judged_by_its_own_rules_only():
    ModelConfig(num_kv_heads=5)  # MLA has no key/value heads
    ModelConfig(attention="gqa", compression_ratio=0.001)  # GQA has no latents
    ModelConfig(attention="gqa", embedding_dim=72, num_attention_heads=12)


@pytest.mark.parametrize("C, ratio, expected", [(768, 4, 2048), (128, 4, 384), (60, 4, 192), (96, 3, 192),
                                                (97, 1, 128)])
def test_the_hidden_width_is_two_thirds_rounded_up_to_64(C, ratio, expected):
    config = ModelConfig(embedding_dim=4 * C, num_attention_heads=1, mlp_ratio=ratio / 4)
    assert config.ffn_dim == expected and config.ffn_dim % 64 == 0
    assert ModelConfig(intermediate_size=7).ffn_dim == 7


def test_derived_sizes_and_that_nothing_can_be_set():
    config = ModelConfig(embedding_dim=60, num_attention_heads=5, compression_ratio=0.5)
    derived = {"head_dim": 12, "qk_nope_head_dim": 12, "v_head_dim": 12, "qk_rope_head_dim": 6,
               "q_lora_rank": 30,
               "kv_lora_rank": 30}
    assert {name: getattr(config, name) for name in derived} == derived
    for name in ("head_dim", "vocab_size"):
        with pytest.raises(AttributeError): setattr(config, name, 3)


@pytest.mark.parametrize("config", [ModelConfig(**SIZES), TrainingConfig(max_steps=3, run_name="a")])
def test_through_json_and_back(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert type(config).from_dict({}) == type(config)()


@pytest.mark.parametrize("cls", [ModelConfig, TrainingConfig])
def test_unknown_keys_are_named(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} has no field num_layer; its fields are .*"):
        cls.from_dict({"num_layer": 3})
    for wrong in (None, [], "a"):
        with pytest.raises(ValueError, match="dict"): cls.from_dict(wrong)


def test_a_path_becomes_text():
    assert TrainingConfig(checkpoint_dir=Path("a") / "b").checkpoint_dir == str(Path("a") / "b")


@pytest.mark.parametrize("value, interval, expected", [
    (0, "[0, 1)", True), (1, "[0, 1)", False), (0, "(0, 1]", False), (1, "(0, 1]", True),
    (math.nan, "[0, inf)", False), (math.inf, "[0, inf)", False), (10**30, "[1, inf)", True),
])
def test_intervals(value, interval, expected):
    assert inside(value, interval) is expected


def attention_layer(c):
    if c.attention == "gqa":
        return GroupedQueryAttention(c.embedding_dim, c.num_attention_heads, c.num_kv_heads)
    return MultiHeadLatentAttention(c.embedding_dim, c.num_attention_heads, q_lora_rank=c.q_lora_rank,
                                    kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim,
                                    qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim)


@pytest.mark.parametrize("changes", [dict(), dict(compression_ratio=0.3), dict(attention="gqa"),
                                     dict(attention="gqa", num_kv_heads=1)])
def test_the_listed_matrices_are_those_of_the_module(changes):
    config = ModelConfig(**SIZES | changes)
    weights = {name.removesuffix(".weight"): tuple(p.shape) for name,
               p in attention_layer(config).named_parameters()
               if p.ndim == 2}
    assert weights == attention_matrices(config)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_flops_are_counted_as_pytorch_counts_them(attention):
    config, B, T = ModelConfig(**SIZES | {"attention": attention}), 2, 13
    layer, x = attention_layer(config), torch.randn(B, T, 60)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): layer(x, torch.arange(T))
    other = 2 * (count_parameters(config)["feedforward"] + 61 * 60)
    padding = T * 5 * 2 * 6 if attention == "mla" else 0  # values padded to the width of keys
    assert counter.get_total_flops() == B * T * ((flops_per_token(config, T) - other) / 3 + padding)


def test_flops_grow_linearly_with_the_context():
    config = ModelConfig(**SIZES)
    per_position = 3 * 5 * 2 * (12 + 6 + 12)  # layers, heads, 2 FLOPs for each number of a key and of a value
    assert flops_per_token(config, 7) - flops_per_token(config) == 7 * per_position


@pytest.mark.parametrize("changes, numbers", [(dict(), 30 + 6), (dict(attention="gqa"), 2 * 5 * 12),
                                              (dict(attention="gqa", num_kv_heads=1), 2 * 12)])
def test_cache_bytes(changes, numbers):
    config = ModelConfig(**SIZES | changes)
    assert cache_bytes_per_token(config) == 3 * numbers * 4
    assert cache_bytes_per_token(config, 2) == 3 * numbers * 2


def test_checkpointing_keeps_all_inputs_and_one_block():
    configs = [ModelConfig(**SIZES, checkpointing=flag) for flag in (False, True)]
    kept, dropped = (training_memory(config, 2, 7) for config in configs)
    block, weights = activations_per_token(configs[0]), count_parameters(configs[0])["total"]
    assert kept["activations"] == 4 * 2 * 7 * 3 * block
    assert dropped["activations"] == 4 * 2 * 7 * (3 * 60 + block)
    assert kept["weights"] == kept["gradients"] == kept["optimizer"] / 2 == 4 * weights
    assert kept["total"] == sum(kept[part] for part in ("weights", "gradients", "optimizer", "activations"))
