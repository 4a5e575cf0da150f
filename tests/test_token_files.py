"""What must stay true of optimus.token_files. Derived in notebooks/09e_token_files.ipynb."""
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import WIKIPEDIA_ROWS, small_corpus, small_tokenizer, tokenizer_ending_with, write

from optimus import corpus as corpora, files, token_files
from optimus.corpus import load_corpus
from optimus.text_files import END_OF_TEXT
from optimus.token_files import exact_parts, prepare, split_documents
from optimus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(): return small_tokenizer()


@pytest.fixture
def corpus(): return small_corpus()


TOKENIZERS = [train_tokenizer(["a small text"], 260), load_tokenizer("gpt2")]


PIECES = st.sampled_from([
    "a", "b", "ab", "aa", "the", " the", "ACGT", "é", "e\u0301", "ǅ", "猫", "東京。", "1", "12", "٣", "²",
    " ", "  ", "\n", "\r\n", "\t", "\u3000", "\u200b", "\x1c", "\x85",
    "'", "'s", "'re", "'ve", "don't", "!", "...", "_", "-", "🎉", END_OF_TEXT])


LONGER = st.one_of(PIECES, st.tuples(PIECES, st.integers(2, 40)).map(lambda pair: pair[0] * pair[1]))


@settings(max_examples=400, deadline=None)
@given(st.lists(LONGER, max_size=40).map("".join), st.integers(1, 30), st.data())
def test_parts_of_a_text_have_the_ids_of_the_whole(text, size, data_):
    for tokenizer in TOKENIZERS:
        cuts = [0, *map(len, itertools.accumulate(exact_parts(tokenizer, text, size)))]
        start = data_.draw(st.sampled_from(cuts))
        parts = list(exact_parts(tokenizer, text, size, start))
        assert "".join(parts) == text[start:]
        before = tokenizer.encode(text[:start])
        assert sum(tokenizer.encode_batch(parts), before) == tokenizer.encode(text)


@pytest.mark.parametrize("text", [
    "ACGT" * 2000, "".join(random.Random(1).choices("acgt", k=9000)), "a" * 9000, "猫" * 3000, "12" * 4000,
    "吾輩は猫である。名前はまだ無い。" * 300, " " * 9000, "\n" * 9000 + "a", "the cat " * 1500, "!?" * 4000,
    "x'" * 3000])
def test_long_texts_of_any_kind_are_cut_into_short_parts(text):
    for tokenizer in TOKENIZERS:
        parts = list(exact_parts(tokenizer, text, 1000))
        assert max(map(len, parts)) <= 1000 and "".join(parts) == text
        assert sum(tokenizer.encode_batch(parts), []) == tokenizer.encode(text)


def test_a_tokenizer_of_another_kind_gets_a_text_whole():
    from tokenizers import AddedToken, pre_tokenizers

    text = "one two " * 100
    for change in (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
                   lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace()),
                   lambda b: b.add_tokens([AddedToken("two one", special=False)])):
        other = train_tokenizer(["one two"], 270)
        assert len(list(exact_parts(other, text, 50))) > 1
        change(other.backend)
        assert list(exact_parts(other, text, 50)) == [text]


def test_two_ends_of_text_are_two_preparations(tmp_path, corpus):
    for name, end in (("a", "</s>"), ("b", "<stop>")):
        (tmp_path / name).mkdir()
        tokenizer_ending_with(tmp_path / name, ["</s>", "<stop>"], tokenizer_config={"eos_token": end})
    a, b = (prepare(corpus, load_tokenizer(tmp_path / name)) for name in ("a", "b"))
    assert a.fingerprint != b.fingerprint and a.tokens("train")[-1] == 0 and b.tokens("train")[-1] == 1


class FullDisk:
    """Stands for `open`: all writes from the n-th on find the disk full."""
    def __init__(self, n): self.left = n

    def __call__(self, path, mode="r"): return open(path, mode) if "r" in mode else Limited(path, mode, self)


class Limited(io.BufferedWriter):
    def __init__(self, path, mode, disk):
        self.disk = disk
        super().__init__(io.FileIO(path, mode.replace("b", "")))

    def write(self, content):
        self.disk.left -= 1
        if self.disk.left < 0: raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_a_disk_that_is_full_at_any_write_is_named_and_loses_nothing(tmp_path, monkeypatch, tokenizer):
    write(tmp_path, {f"t/{i}.txt": "the cat sat " * 300 for i in range(3)})
    def whole_way():
        save_tokenizer(tokenizer, tmp_path / "cache" / "saved")
        again = load_tokenizer(tmp_path / "cache" / "saved")
        return prepare(load_corpus(tmp_path / "t"), again, save_every=1)
    def opening(by):
        for module in (files, token_files): monkeypatch.setattr(module, "open", by, raising=False)
    expected, failures = rows_of(whole_way()), 0
    for module in (corpora, token_files):
        monkeypatch.setattr(module, "groups", lambda items, *how: ([item] for item in items))
    for n in itertools.count():
        cache = tmp_path / f"cache-{n}"
        monkeypatch.setenv("OPTIMUS_CACHE", str(cache))
        for name in ("saved", "texts"): shutil.rmtree(tmp_path / "cache" / name, ignore_errors=True)
        opening(FullDisk(n))
        try: found = whole_way()
        except OSError as error:
            failures += 1
            assert error.errno == errno.ENOSPC and str(tmp_path / "cache") in str(error.filename), (n, error)
            opening(open)
            assert not [p.name for p in tmp_path.glob("cache*/**/.*") if p.is_file()]  # nothing half-written
            found = whole_way()
        assert rows_of(found) == expected
        if files.open is not open: break
    assert failures > 12


def test_a_preparation_whose_last_file_is_damaged_is_made_again(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path))
    corpus = {"text": WIKIPEDIA_ROWS["text"]}
    first = prepare(corpus, tokenizer)
    for content in ("", "[]", '{"train_tokens": 3}'):
        (Path(first.folder) / "done.json").write_text(content)
        assert prepare(corpus, tokenizer) == first


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_what_is_held_does_not_grow_with_the_corpus(tmp_path, kind, tokenizer):
    import pyarrow as pa
    from pyarrow import parquet

    text, n = ("the cat sat on the mat " * 40 + "\n") * 100, 250  # 23 MB
    if kind == "txt": write(tmp_path, {f"{i}.txt": text for i in range(n)})
    elif kind == "jsonl": write(tmp_path, {"a.jsonl": (json.dumps({"text": text}) + "\n") * n})
    else: parquet.write_table(pa.table({"text": [text] * n}), tmp_path / "a.parquet", row_group_size=50)
    tracemalloc.start()
    corpus = load_corpus(tmp_path)
    token_files._fingerprint(corpus["text"], tokenizer, 0.5, lambda size: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus) == n and corpus[n - 1]["text"] == text.strip("\n" if kind == "txt" else "")
    assert peak < 14e6


def test_whole_documents_are_held_out_with_end_of_text_between(corpus, tokenizer):
    p = prepare(corpus, tokenizer, 0.9)
    train, held = (p.tokens(s) for s in ("train", "validation"))
    assert (len(train), len(held)) == (p.train_tokens, p.validation_tokens)
    assert ((train == 0).sum(), (held == 0).sum()) == (p.train_documents, p.validation_documents) == (21, 2)
    documents = [tokenizer.decode(part) for row in (train, held)
                 for part in np.split(row, np.flatnonzero(row == 0))]
    assert sorted(filter(None, documents)) == sorted(corpus["text"][:])
    assert p.validation_bytes == sum(len(d.encode()) for d in documents[-3:])


def test_bits_per_byte_of_a_uniform_guess(corpus, tokenizer):
    p = prepare(corpus, tokenizer, 0.5)
    expected = np.log2(270) * p.validation_tokens / p.validation_bytes
    assert p.bits_per_byte(np.log(270)) == pytest.approx(expected, rel=1e-12)


def test_a_lone_document_is_cut_at_a_line():
    held, parts = split_documents(["one\ntwo\nthree\nfour\nfive"], 0.5)
    assert (held.tolist(), parts) == ([False, True], ["one\ntwo\nthree\n", "four\nfive"])
    with pytest.raises(ValueError, match="too short"): split_documents(["a"], 0.9)


@pytest.mark.parametrize("end", ["", "\n", "\nend"])
def test_a_lone_document_without_lines_is_cut_near_the_fraction(end):
    first, rest = split_documents(["a" * 1000 + end], 0.9)[1]
    assert first + rest == "a" * 1000 + end and 90 <= len(rest) <= 110


@pytest.mark.parametrize("fraction", [90, 1.0, 0.0, -1, float("nan")])
def test_a_fraction_that_is_none_is_refused(corpus, tokenizer, fraction):
    with pytest.raises(ValueError, match=rf"train_fraction is {fraction}; it must be in \(0, 1\)"):
        prepare(corpus, tokenizer, fraction)


def test_prepared_once_then_only_read(corpus, tokenizer, monkeypatch):
    first = prepare(corpus, tokenizer)
    monkeypatch.setattr(token_files, "write_tokens", None)
    assert prepare(corpus, tokenizer) == first


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_prepared_tokens_that_were_cut_are_prepared_again(corpus, tokenizer, split, fault):
    first = prepare(corpus, tokenizer)
    path = Path(first.folder) / f"{split}.bin"
    whole = path.read_bytes()
    path.unlink() if fault == "gone" else path.write_bytes(whole[:-2])
    assert prepare(corpus, tokenizer) == first and path.read_bytes() == whole


def test_a_full_disk_is_named_with_the_folder(corpus, tokenizer, monkeypatch):
    def refuse(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(token_files, "write_tokens", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*tokens/\w+\.half'"):
        prepare(corpus, tokenizer)


def test_an_edited_corpus_another_tokenizer_or_another_split_is_prepared_anew(corpus, tokenizer):
    first = prepare(corpus, tokenizer)
    edited = datasets.Dataset.from_dict({"text": ["new", *corpus["text"][1:]]})
    others = [prepare(edited, tokenizer), prepare(corpus, train_tokenizer(["other text"], 300)),
              prepare(corpus, tokenizer, 0.5)]
    assert len({p.fingerprint for p in [first, *others]}) == 4


def test_large_vocabularies_need_four_bytes(corpus, tokenizer, monkeypatch):
    assert prepare(corpus, tokenizer).dtype == "uint16"
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 2**16 + 1)
    assert prepare(corpus, tokenizer, 0.8).dtype == "uint32"


@pytest.mark.slow
def test_a_preparation_killed_half_way_is_done_again(tmp_path):
    code = """
import time, datasets, optimus.token_files as d, optimus.tokenizer as t
slow = d.write_tokens
def write_tokens(*a): slow(*a); print("half", flush=True); time.sleep(60)
d.write_tokens = write_tokens
d.prepare(datasets.Dataset.from_dict({"text": ["a b c"] * 9}), t.train_tokenizer(["a b c"], 260))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "half"
    child.send_signal(signal.SIGKILL)
    child.wait()
    tokens = Path(os.environ["OPTIMUS_CACHE"]) / "tokens"
    assert [p.suffix for p in tokens.iterdir() if p.is_dir()] == [".half"]
    p = prepare(datasets.Dataset.from_dict({"text": ["a b c"] * 9}), train_tokenizer(["a b c"], 260))
    assert len(p.tokens("train")) == p.train_tokens > 0
    assert [f for f in tokens.iterdir() if f.is_dir()] == [Path(p.folder)]


def rows_of(p): return [np.array(p.tokens(split)).tolist() for split in ("train", "validation")]


def long_texts():
    rng, words = np.random.default_rng(5), ["the", "cat", "sat", "on", "1862,", "it's", "猫", "\n\n", "  "]
    return [" ".join(rng.choice(words, n)) for n in (3, 4000, 1, 700, 9000, 2, 5)]


@pytest.mark.parametrize("texts", [long_texts(), [" ".join(long_texts())]], ids=["seven", "lone"])
def test_an_interrupted_preparation_goes_on_where_it_was(texts, tokenizer, monkeypatch, tmp_path):
    """Ctrl-C at each call of the encoder in turn: no part is encoded twice, and the row is the same."""
    monkeypatch.setattr(token_files, "exact_parts", functools.partial(token_files.exact_parts, size=2000))
    monkeypatch.setattr(token_files, "groups", lambda items, most, length: ([item] for item in items))
    whole, encode, seen = prepare({"text": texts}, tokenizer), tokenizer.encode_batch, []
    calls = 0

    def interrupted(parts):
        nonlocal calls
        calls += 1
        if calls % 2: raise KeyboardInterrupt
        seen.extend(parts)
        return encode(parts)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(tokenizer, "encode_batch", interrupted)
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            again = prepare({"text": texts}, tokenizer)
            break
    monkeypatch.undo()
    assert rows_of(again) == rows_of(whole) and again.fingerprint == whole.fingerprint
    assert "".join(seen) == "".join(texts) and len(seen) > len(texts)
    assert again.validation_bytes == whole.validation_bytes
    left = sorted(f.name for f in Path(again.folder).iterdir())
    assert left == ["done.json", "train.bin", "validation.bin"]


def test_what_a_kill_left_beyond_the_record_is_cut(corpus, tokenizer, monkeypatch, tmp_path):
    whole, save, calls = prepare(corpus, tokenizer), token_files._Progress.save, []

    def dies(self, folder, files):
        if calls: raise SystemError("killed")
        calls.append(save(self, folder, files))
    monkeypatch.setattr(token_files._Progress, "save", dies)
    monkeypatch.setattr(token_files, "groups", lambda items, most, length: ([item] for item in items))
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "other"))
    with pytest.raises(SystemError): prepare(corpus, tokenizer, save_every=700)
    half = next((tmp_path / "other" / "tokens").glob("*.half"))
    record = json.loads((half / "progress.json").read_text())
    assert (half / "train.bin").stat().st_size > 2 * record["train_tokens"] > 0
    (half / "train-50000-00000.bin").write_bytes(b"of an earlier version")
    monkeypatch.setattr(token_files._Progress, "save", save)
    said = []
    assert rows_of(prepare(corpus, tokenizer, say=said.append)) == rows_of(whole)
    assert len(said) == 1 and "MB/s" in said[0]
    for damage in ("{", "[]", '{"more": 1}', '{"train_tokens": 99999}'):  # a record that cannot be true
        half.mkdir()
        (half / "progress.json").write_text(damage)
        os.rename(half.with_suffix(""), tmp_path / f"away-{len(damage)}")
        assert rows_of(prepare(corpus, tokenizer)) == rows_of(whole)


def test_the_fingerprint_is_the_one_that_saved_runs_hold(corpus, tokenizer):
    digest = hashlib.sha256(f"0.9\0{tokenizer.backend.to_str()}".encode())
    for text in corpus["text"]: digest.update(hashlib.sha256(text.encode()).digest())
    assert prepare(corpus, tokenizer, 0.9).fingerprint == digest.hexdigest()


@pytest.mark.parametrize("texts, words", [(["a", None], "row 1 of the corpus: only text .* not NoneType"),
                                          (["a", "b\udc00"], "row 1 of the corpus: character 1 is"),
                                          ([], "the corpus holds no document")])
def test_a_corpus_that_cannot_be_prepared_names_the_row(texts, words, tokenizer):
    with pytest.raises(ValueError, match=words): prepare({"text": texts}, tokenizer)


def test_the_texts_are_never_in_memory_together(tokenizer):
    class Column:
        longest = 0
        def __len__(self): return 2500

        def __getitem__(self, i):
            if not isinstance(i, slice): return f"cat {i}"
            numbers = range(*i.indices(2500))
            self.longest = max(self.longest, len(numbers))
            return [f"cat {k}" for k in numbers]
    column = Column()
    lazy, whole = prepare({"text": column}, tokenizer), prepare({"text": column[:]}, tokenizer)
    column.longest = 0
    assert prepare({"text": column}, tokenizer) == lazy == whole
    assert 0 < column.longest <= 1000
