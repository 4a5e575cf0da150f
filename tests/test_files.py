"""What must stay true of optimus.files. Derived in notebooks/00c_files.ipynb."""
import os
import threading
import types
from pathlib import Path

import pytest

from optimus import files
from optimus.files import atomic_file, atomic_path, cache_folder, package_folder, read_json, write_atomically


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_and_its_folder_are_on_the_disk_before_and_after_it_has_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(files, "sync", lambda path: calls.append(path))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("renamed") or replace(*names))
    write_atomically(tmp_path / "a" / "note", "text\n")
    assert calls[1:] == ["renamed", tmp_path / "a"] and calls[0].parent == tmp_path / "a"
    assert (tmp_path / "a" / "note").read_bytes() == b"text\n" and names(tmp_path / "a") == ["note"]


def test_every_file_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(files, "sync", lambda path: calls.append(path.name))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("renamed") or replace(*names))
    (tmp_path / "out").mkdir()
    with atomic_path(tmp_path / "out", tmp_path / ".half") as folder:
        (folder / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"): (folder / name).write_text(name)
    assert {*calls[:-3]} == {"a", "inner", "b"} and calls[-3:] == [".half", "renamed", tmp_path.name]
    assert names(tmp_path) == ["out", "out/a", "out/inner", "out/inner/b"]


@pytest.mark.parametrize("error", [OSError(28, "No space"), KeyboardInterrupt(), ValueError("wrong")])
def test_after_an_error_all_is_as_before(tmp_path, error):
    write_atomically(tmp_path / "note", "old")
    for open_it in (atomic_file, atomic_path):
        with pytest.raises(type(error)) as raised, open_it(tmp_path / "note") as half:
            if open_it is atomic_file: half.write(b"new")
            else: half.mkdir()
            raise error
        assert (tmp_path / "note").read_text() == "old" and names(tmp_path) == ["note"]
    if isinstance(error, OSError): assert raised.value.filename == str(tmp_path / "note")


def test_a_full_folder_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OSError), atomic_path(tmp_path / "out") as folder: folder.mkdir()
    assert names(tmp_path) == ["out", "out/mine"]


def test_what_a_killed_writer_left_under_a_fixed_name_is_cleared_away(tmp_path):
    (tmp_path / ".half").mkdir()
    (tmp_path / ".half" / "old").write_text("old")
    with atomic_path(tmp_path / "out", tmp_path / ".half") as folder: folder.mkdir()
    assert names(tmp_path) == ["out"]


def test_writers_side_by_side_leave_one_of_their_texts(tmp_path):
    texts = [str(i) * 10_000 for i in range(8)]
    writers = [threading.Thread(target=write_atomically, args=(tmp_path / "note", text)) for text in texts]
    for writer in writers: writer.start()
    for writer in writers: writer.join()
    assert (tmp_path / "note").read_text() in texts and names(tmp_path) == ["note"]


def test_on_windows_a_folder_is_passed_over_and_a_file_opened_for_writing(tmp_path, monkeypatch):
    opened = []
    windows = types.SimpleNamespace(**vars(os) | dict(
        name="nt", open=lambda path, flags: opened.append(flags) or os.open(path, flags)))
    monkeypatch.setattr(files, "os", windows)
    (tmp_path / "a").touch()
    files.sync(tmp_path / "a")
    files.sync(tmp_path)
    assert opened == [os.O_RDWR]


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "3"])
def test_a_damaged_json_file_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="a.json is damaged"): read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "b.json") == {}


def test_a_package_that_is_missing_is_named():
    assert package_folder("optimus") == Path(files.__file__).parent
    with pytest.raises(ValueError, match="'no_such' is not installed; try `pip install no_such`"):
        package_folder("no_such")


def test_without_a_home_folder_the_variable_is_named(monkeypatch, tmp_path):
    def homeless(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("OPTIMUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ValueError, match="no home folder.* OPTIMUS_CACHE"): cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "optimus"
