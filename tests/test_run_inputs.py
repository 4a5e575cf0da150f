"""What must stay true of optimus.run_inputs. Derived in notebooks/12g_run_inputs.ipynb."""
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from fork_server import CONFIG, TEXTS
from trained import SMALL, losses

from optimus import TrainingConfig, run_inputs
from optimus.training import choose_tokenizer, train

pytest_plugins = ["trained"]


def test_a_vocabulary_larger_than_the_model_is_refused_with_both_numbers(go, tokenizer):
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer has {size} entries, so .* it is {size - 1}"):
        go(model=replace(SMALL, vocab_size=size - 1))


def test_a_run_starts_with_the_weights_it_is_told_to(go, given):
    model, folder = given
    steps = dict(max_steps=2, warmup=0.0, learning_rate=1e-12, weight_decay=0.0, optimizer="adamw")
    result, fresh = go("a", start_from=folder, **steps), go("b", **steps)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], weight, rtol=0, atol=1e-9)
        if weight.ndim > 1: assert (fresh.model.state_dict()[name] - weight).abs().max() > 0.01, name
    saved = json.loads((result.checkpoint / "trainer_state.json").read_text())
    assert saved["training_config"]["start_from"] == folder


def test_a_run_with_a_start_continues_bit_for_bit_without_it(go, given, tokenizer):
    whole = go("whole", start_from=given[1])
    go("cut", start_from=given[1], stop=7)
    shutil.rmtree(given[1])
    assert losses(go("cut", resume=True, start_from=given[1], tokenizer=None)) == losses(whole)


@pytest.mark.parametrize("field, value, shown", [("num_layers", 3, "2; model.num_layers is 3"),
                                                 ("attention", "gqa", "'mla'; model.attention is 'gqa'")])
def test_a_start_of_other_sizes_is_refused(go, given, field, value, shown):
    with pytest.raises(ValueError, match=f"given', a model with {field} = {shown}"):
        go(start_from=given[1], model=replace(SMALL, **{field: value}))
    assert go(start_from=given[1], model=replace(SMALL, dropout=0.3), max_steps=1).history


def test_the_tokenizer_of_the_start_is_the_runs(given, tokenizer):
    config, corpus = TrainingConfig(start_from=given[1]), {"text": TEXTS[:1]}
    assert choose_tokenizer(SMALL, config, corpus).backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(ValueError, match="no tokenizer 'nowhere'"):
        choose_tokenizer(SMALL, replace(config, start_from="nowhere"), corpus)


@pytest.mark.parametrize("settings, saved, wanted", [
    (dict(dataset_name="sotu"), None, None), (dict(dataset_name="."), None, None),
    (dict(dataset_name=".", dataset_size=5), None, 5), (dict(dataset_name="sotu", dataset_size=5), None, 5),
    (dict(), None, 200_000), (dict(dataset_size=7), None, 7),
    (dict(dataset_name="."), {"training_config": {}, "corpus": {}}, 200_000),  # an older version always cut
    (dict(dataset_name="."), {"corpus": {"documents": None}}, None),
    (dict(dataset_name=".", dataset_size=9), {"corpus": {"documents": None}}, 9)])
def test_a_size_cuts_what_is_on_the_hub_and_other_corpora_only_when_given(settings, saved, wanted):
    assert run_inputs.document_limit(TrainingConfig(**settings), saved) == wanted


def test_a_corpus_of_ones_own_is_cut_where_that_is_asked_for(go, tmp_path, tokenizer):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for size, documents in ((200_000, len(TEXTS)), (5, 5)):
        config = TrainingConfig(**CONFIG | dict(
            dataset_name=str(path), dataset_size=size, max_steps=1, checkpoint_dir=str(tmp_path / f"c{size}"),
            tensorboard_dir=str(tmp_path / "r")))
        corpus = train(SMALL, config, tokenizer=tokenizer, progress=False).corpus
        assert corpus.train_documents + corpus.validation_documents == documents


@pytest.mark.parametrize("field, value", [("num_kv_heads", 2), ("intermediate_size", 128), ("dropout", 0.4)])
def test_a_start_may_differ_in_what_changes_no_size(go, given, field, value):
    assert SMALL.ffn_dim == 128 and getattr(SMALL, field) != value or field == "num_kv_heads"
    model = replace(SMALL, num_kv_heads=1) if field == "num_kv_heads" else replace(SMALL, **{field: value})
    assert go(start_from=given[1], model=model, max_steps=1).history


@pytest.mark.parametrize("change, shown", [
    (dict(num_attention_heads=1), "num_attention_heads = 2; model.num_attention_heads is 1"),
    (dict(rope_theta=500.0), "rope_theta = 10000.0; model.rope_theta is 500.0"),
    (dict(compression_ratio=0.25), "kv_lora_rank = 16; model.kv_lora_rank is 8"),
    (dict(intermediate_size=64), "ffn_dim = 128; model.ffn_dim is 64")])
def test_a_start_of_other_sizes_in_force_is_refused(go, given, change, shown):
    with pytest.raises(ValueError, match=re.escape(shown)):
        go(start_from=given[1], model=replace(SMALL, **change))
