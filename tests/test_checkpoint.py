"""What must stay true of optimus.checkpoint. Derived in notebooks/11_checkpoints.ipynb."""
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optimus import LanguageModel, ModelConfig, checkpoint, files
from optimus.checkpoint import (CheckpointError, find_damage, latest_checkpoint, load_checkpoint, prune,
                                remove_leftovers, save_checkpoint, sha256_of, step_folders)
from optimus.data import train_tokenizer

CONFIG = ModelConfig(vocab_size=300, embedding_dim=32, num_layers=2, num_attention_heads=2, rope_seq_len=64,
                     dropout=0.2)
FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "train_state.pt",
         "trainer_state.json"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(CONFIG)


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(["some words to learn from, some words more"], 270)


def save(run, model, step, tokenizer=None, **options):
    mean = torch.full((3,), float(step))
    state = {"optimizer": {"state": {0: {"mean": mean}}}, "list": [1, 2.5, None, "text"]}
    return save_checkpoint(run, model, step, tokenizer=tokenizer, trainer_state={"seed": 7},
                           train_state=state, **options)


@pytest.fixture
def run(tmp_path, model, tokenizer):
    """A run folder with checkpoints at steps 1, 2 and 3."""
    for step in (1, 2, 3): save(tmp_path / "run", model, step, tokenizer)
    return tmp_path / "run"


def test_what_was_saved_comes_back(run, model, tokenizer):
    assert sorted(os.listdir(run / "step-00000003")) == FILES
    c = load_checkpoint(run / "step-00000003")
    assert (c.step, c.trainer_state["seed"], c.model.config) == (3, 7, CONFIG)
    assert c.train_state["list"] == [1, 2.5, None, "text"]
    assert c.train_state["optimizer"]["state"][0]["mean"].tolist() == [3.0] * 3
    assert c.tokenizer.encode("words") == tokenizer.encode("words")
    mine, theirs = model.state_dict(), c.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert c.model.head.weight.data_ptr() == c.model.embedding.weight.data_ptr()


def test_the_newest_is_found_in_a_run_and_below_a_folder_of_runs(run, model):
    assert latest_checkpoint(run) == run / "step-00000003"
    assert latest_checkpoint(run.parent) == run / "step-00000003"
    other = save(run.parent / "other", model, 1)
    os.utime(other, (2e9, 2e9))
    assert latest_checkpoint(run.parent) == other
    assert latest_checkpoint(run.parent / "nowhere") is None


@pytest.mark.parametrize("name", [f for f in FILES if f != "manifest.json"])
@pytest.mark.parametrize("fault", ["bit", "truncated", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(run, name, fault):
    path = run / "step-00000003" / name
    data = bytearray(path.read_bytes())
    if fault == "bit": data[len(data) // 2] ^= 1
    if fault == "truncated": data = data[:-1]
    path.unlink() if fault == "missing" else path.write_bytes(data)
    with pytest.warns(UserWarning, match=f"step-00000003: {name}"):
        assert latest_checkpoint(run) == run / "step-00000002"
    with pytest.raises(CheckpointError, match=name): load_checkpoint(run / "step-00000003")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"model.safetensors": 1, "config.json": 2}',
                                  "escape", "link"])
def test_a_bad_manifest_disqualifies(run, text, tmp_path, monkeypatch):
    folder = run / "step-00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    secret = tmp_path / "secret"
    secret.write_text("outside")
    if text == "escape": text = json.dumps({**manifest, "../../secret": {"bytes": 7, "sha256": "0"}})
    if text == "link":
        (folder / "trainer_state.json").unlink()
        (folder / "trainer_state.json").symlink_to(secret)
        text = json.dumps(manifest)
    (folder / "manifest.json").unlink() if text is None else (folder / "manifest.json").write_text(text)
    read = []
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: read.append(path.resolve()) or sha256_of(path))
    with pytest.warns(UserWarning, match="step-00000003"):
        assert latest_checkpoint(run) == run / "step-00000002"
    assert find_damage(folder) is not None
    assert read and secret not in read, "a file outside the checkpoint was read"


def test_when_all_are_damaged_nothing_starts_over(run):
    for folder in step_folders(run): (folder / "config.json").write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 3 checkpoints"):
        latest_checkpoint(run)


def test_the_last_k_and_the_best_stay(tmp_path, model):
    for step in range(1, 8): save(tmp_path, model, step, keep_last=2, best_step=3)
    assert [p.name[-1] for p in step_folders(tmp_path)] == ["3", "6", "7"]


def test_a_delete_that_fails_is_only_a_warning(run, monkeypatch):
    def refuse(*args, **kwargs): raise OSError("busy")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="could not delete.*busy"): prune(run, 1)
    assert [p.name for p in step_folders(run)] == ["step-00000003"]


@pytest.mark.parametrize("keep_last", [0, -2])
def test_keeping_none_is_refused(run, keep_last):
    with pytest.raises(ValueError, match=f"keep_last is {keep_last}; it must be at least 1"):
        prune(run, keep_last)
    assert len(step_folders(run)) == 3


def test_steps_are_ordered_as_numbers(tmp_path, model):
    for step in (99_999_999, 100_000_000): path = save(tmp_path, model, step, keep_last=2)
    assert latest_checkpoint(tmp_path) == path == tmp_path / "step-100000000"
    save(tmp_path, model, 100_000_001, keep_last=2)
    assert [p.name for p in step_folders(tmp_path)] == ["step-100000000", "step-100000001"]


def test_all_is_on_the_disk_before_the_name_appears(tmp_path, model, tokenizer, monkeypatch):
    # A kill cannot show a forgotten fsync, so the order of the calls is noted.
    calls, waited, sync, fsync, replace = [], [], checkpoint.sync, os.fsync, os.replace

    def synced(path):
        waited.clear()
        sync(path)
        if waited: calls.append(("sync", path.name))

    def renamed(old, new):
        calls.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", lambda handle: waited.append(fsync(handle)))
    monkeypatch.setattr(checkpoint, "sync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save(tmp_path / "run", model, 1, tokenizer)
    named = calls.index(("rename", "step-00000001"))
    before, sealed = [name for _, name in calls[:named]], calls.index(("sync", "manifest.json"))
    assert set(FILES) <= set(before) and before[-1] == ".half-step-00000001"
    assert all(calls.index(("sync", name)) < sealed for name in FILES if name != "manifest.json")
    assert ("sync", "run") in calls[named + 1:]


def test_weights_that_are_not_finite_are_refused(run, tokenizer):
    model = LanguageModel(CONFIG)
    model.norm.weight.data[3] = float("nan")
    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match="refusing to save step 4: norm.weight holds NaN"):
        save(run, model, 4, tokenizer)
    assert sorted(os.listdir(run)) == before


def test_saving_a_step_again_replaces_it(run, model):
    path = save_checkpoint(run, model, 3, trainer_state={"seed": 8})
    assert load_checkpoint(path).trainer_state["seed"] == 8
    assert [p.name for p in sorted(run.iterdir())] == ["step-00000001", "step-00000002", "step-00000003"]


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_go(run):
    shutil.copytree(run / "step-00000003", run / ".half-step-00000004")
    shutil.copytree(run / "step-00000003", run / ".old-step-00000001")
    (run / ".keep").mkdir()
    assert latest_checkpoint(run).name == "step-00000003"
    assert sorted(remove_leftovers(run)) == [".half-step-00000004", ".old-step-00000001"]
    assert (run / ".keep").is_dir() and not (run / ".half-step-00000004").exists()


def test_a_kill_between_the_two_renames_of_a_save_brings_the_new_copy_back(run, model):
    """Whatever other steps there are; and the old one, when the new one is damaged."""
    path = save_checkpoint(run, model, 3, trainer_state={"seed": 8})
    old, half = run / f".old-{path.name}", run / f".half-{path.name}"
    shutil.copytree(run / "step-00000002", old)
    path.rename(half)
    assert latest_checkpoint(run).name == "step-00000002"
    assert remove_leftovers(run) == [half.name, old.name]
    assert latest_checkpoint(run) == path and load_checkpoint(path).trainer_state["seed"] == 8
    assert not half.exists() and not old.exists()
    path.rename(old)
    shutil.copytree(run / "step-00000002", half)
    (half / "config.json").write_text("{}")
    remove_leftovers(run)
    assert latest_checkpoint(run) == path and not half.exists() and not old.exists()


def test_a_save_again_that_cannot_be_renamed_leaves_the_old_one_in_place(run, model, monkeypatch):
    replace, before = os.replace, sorted(os.listdir(run))
    def refuse(old, new):
        if Path(old).name.startswith(".half-"): raise OSError(errno.EIO, "the disk said no")
        replace(old, new)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="the disk said no"):
        save_checkpoint(run, model, 3, trainer_state={"seed": 8})
    assert sorted(os.listdir(run)) == before and find_damage(run / "step-00000003") is None


@pytest.mark.parametrize("name", ["train_state.pt", "tokenizer.json", "trainer_state.json"])
def test_a_file_that_the_manifest_does_not_list_is_not_read(run, model, name):
    path = save_checkpoint(run, model, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop(name, None)
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / name).write_text("from elsewhere")
    with pytest.raises(CheckpointError, match=f"manifest.json does not list {name}"): load_checkpoint(path)
    (path / name).unlink()
    (path / "notes.txt").write_text("anybody's own file does no harm")
    assert load_checkpoint(path).train_state is None


DISK_FULL = """
import resource, sys, torch
from optimus import LanguageModel
from optimus.checkpoint import CheckpointError, save_checkpoint
from tests_config import CONFIG
model = LanguageModel(CONFIG)
state = {"optimizer": torch.zeros(200_000)}
save_checkpoint(sys.argv[1], model, 1, train_state=state)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try: save_checkpoint(sys.argv[1], model, 2, train_state=state)
except CheckpointError as error: print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10_000, 500_000])  # in the weights, in the optimizer's state
def test_a_full_disk_keeps_the_old_checkpoint_and_cleans_up(tmp_path, limit):
    (tmp_path / "tests_config.py").write_text(f"from optimus import ModelConfig\nCONFIG = {CONFIG!r}\n")
    run = tmp_path / "run"
    command = [sys.executable, "-c", DISK_FULL, str(run), str(limit)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for words in ("could not write the checkpoint", str(run), "bytes free"): assert words in out.stdout
    assert limit == 10_000 or "step-00000002: File too large (" in out.stdout  # not torch's riddle
    assert os.listdir(run) == ["step-00000001"] and find_damage(run / "step-00000001") is None


@pytest.mark.parametrize("states, words", [
    (dict(train_state={"loss": np.float64(1.5)}), r"tensors and plain Python types only, got numpy\."),
    (dict(train_state={"folder": [Path("x")]}), r"tensors and plain Python types only, got pathlib\."),
    (dict(trainer_state={"loss": torch.zeros(())}), "Tensor is not JSON serializable$"),
])
def test_what_could_not_be_read_again_is_refused_when_saved(run, model, states, words):
    for step in (3, 4):
        with pytest.raises(CheckpointError, match=words): save_checkpoint(run, model, step, **states)
    assert sorted(os.listdir(run)) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert load_checkpoint(run / "step-00000003").train_state["list"] == [1, 2.5, None, "text"]


def test_an_error_without_words_is_named(run, model, monkeypatch):
    def fail(*_): raise MemoryError
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="MemoryError"): save(run, model, 4)


class Bomb:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return (Path.touch, (self.marker,))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(run, tmp_path):
    folder, marker = run / "step-00000003", tmp_path / "ran"
    torch.save({"optimizer": Bomb(marker)}, folder / "train_state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "train_state.pt"
    manifest["train_state.pt"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="train_state.pt holds more than tensors"):
        load_checkpoint(folder)
    assert not marker.exists()


AUDIT = """
import os, sys
from optimus import LanguageModel, load_tokenizer
folder, opened = sys.argv[1], []
LanguageModel.from_pretrained(folder); load_tokenizer(folder)  # once, so that everything is imported
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
LanguageModel.from_pretrained(folder); load_tokenizer(folder)
names = {os.path.basename(str(p)) for p in opened if str(p).startswith(folder)}
print(sorted(names))
"""


@pytest.mark.slow
def test_generation_opens_only_safetensors_and_json(run):
    command = [sys.executable, "-c", AUDIT, str(run / "step-00000003")]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    opened = set(json.loads(out.stdout.replace("'", '"')))
    assert opened <= {"config.json", "model.safetensors", "tokenizer.json"} and "config.json" in opened


# Other systems, and JSON that all can read

class WindowsOs:
    """`os` as Windows has it: a folder cannot be opened, and only what is open for writing can be synced."""
    name = "nt"

    def __init__(self): self.writable, self.synced = {}, set()
    def __getattr__(self, name): return getattr(os, name)

    def open(self, path, flags):
        if Path(path).is_dir(): raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = os.open(path, flags)
        if flags & os.O_RDWR: self.writable[handle] = Path(path).name
        return handle

    def fsync(self, handle):
        if handle not in self.writable: raise OSError(errno.EBADF, "Bad file descriptor")
        os.fsync(handle)
        self.synced.add(self.writable[handle])

    def close(self, handle):
        self.writable.pop(handle, None)
        os.close(handle)


def test_windows_saves_updates_and_syncs_every_file(tmp_path, model, tokenizer, monkeypatch):
    windows = WindowsOs()
    for module in (checkpoint, files): monkeypatch.setattr(module, "os", windows)
    for step in (1, 2): path = save(tmp_path / "run", model, step, tokenizer)
    assert windows.synced >= set(FILES)
    checkpoint.update_trainer_state(path, {"seed": 8})
    checkpoint.write_whole(tmp_path / "note.json", "{}")
    assert load_checkpoint(path).trainer_state == {"step": 2, "seed": 8}
    assert latest_checkpoint(tmp_path / "run") == path


def strict(text):
    """What any JSON reader makes of a text."""
    def refuse(word): raise AssertionError(f"{word} is no JSON")
    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_in_every_json(tmp_path, model):
    nan, inf = float("nan"), float("inf")
    bad = {"loss": nan, "norms": [1.5, -inf, (np.float64("inf"), 2)], "run": {"best": inf}}
    path = save_checkpoint(tmp_path, model, 1, trainer_state=bad)
    state = strict((path / "trainer_state.json").read_text())
    assert state == {"step": 1, "loss": None, "norms": [1.5, None, [None, 2]], "run": {"best": None}}
    assert strict(checkpoint.json_text({"a": [float("nan")], "b": "NaN", "c": True})) == {
        "a": [None], "b": "NaN", "c": True}


# A state that is updated

def test_an_update_changes_the_state_and_links_the_rest(run, model):
    path = run / "step-00000003"
    before = {p.name: p.stat().st_ino for p in path.iterdir()}
    checkpoint.update_trainer_state(path, {"seed": 8, "best": 1.5})
    after = {p.name: p.stat().st_ino for p in path.iterdir()}
    assert {name for name in FILES if before[name] != after[name]} == {"manifest.json", "trainer_state.json"}
    loaded = load_checkpoint(path)
    assert loaded.trainer_state == {"step": 3, "seed": 8, "best": 1.5}
    assert loaded.train_state["list"][3] == "text"
    assert sorted(p.name for p in run.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]


def test_an_update_copies_where_there_are_no_links(run, monkeypatch):
    def refuse(*_): raise OSError(errno.EPERM, "no hard links here")
    monkeypatch.setattr(os, "link", refuse)
    checkpoint.update_trainer_state(run / "step-00000003", {"seed": 8})
    assert load_checkpoint(run / "step-00000003").trainer_state["seed"] == 8


@pytest.mark.parametrize("call", range(1, 9))
def test_an_update_that_fails_anywhere_leaves_the_checkpoint_as_it_was(run, monkeypatch, call):
    calls = []

    def failing(name):
        original = getattr(os, name)
        def f(*a, **k):
            calls.append(name)
            if len(calls) == call: raise OSError(errno.ENOSPC, "No space left on device")
            return original(*a, **k)
        return f
    for name in ("mkdir", "fsync", "replace"): monkeypatch.setattr(os, name, failing(name))
    path = run / "step-00000003"
    try: checkpoint.update_trainer_state(path, {"seed": 8})
    except CheckpointError as error: assert "No space left" in str(error)
    else: assert len(calls) < call
    monkeypatch.undo()
    remove_leftovers(run)
    assert load_checkpoint(path).trainer_state["seed"] in (7, 8)
    assert [p.name for p in step_folders(run)] == [f"step-0000000{n}" for n in (1, 2, 3)]


def test_a_small_file_that_cannot_be_written_keeps_its_text_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    checkpoint.write_whole(path, "old\n")
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, full)
            with pytest.raises(CheckpointError, match="settings.json: No space.*free"):
                checkpoint.write_whole(path, "new\n")
        assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["settings.json"]
    checkpoint.write_whole(path, "new\n")
    assert path.read_bytes() == b"new\n"


def test_a_mistake_of_ours_is_not_told_as_a_full_disk(run, model, monkeypatch):
    def renamed(*_): raise TypeError("save() got an unexpected keyword argument 'path'")
    monkeypatch.setattr(LanguageModel, "save_pretrained", renamed)
    with pytest.raises(TypeError, match="unexpected keyword"): save(run, model, 4)


def test_keeping_all_deletes_nothing(tmp_path, model):
    for step in range(1, 6): save(tmp_path, model, step, keep_last=None)
    assert len(step_folders(tmp_path)) == 5


def test_a_verified_checkpoint_is_not_hashed_again(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "sha256_of", None)
    assert load_checkpoint(run / "step-00000003", verified=True).step == 3
    with pytest.raises(TypeError): load_checkpoint(run / "step-00000003")
