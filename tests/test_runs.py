"""What must stay true of optimus.runs: which run it is, and what may go on. Derived in notebook 11b."""
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from fork_server import TEXTS
from trained import SMALL, STRICT, losses, poison, rewrite_state

from optimus import LanguageModel, TrainingConfig, checkpoint, ranks, runs, training
from optimus.checkpoint import (CheckpointError, latest_checkpoint, load_checkpoint, sha256_of,
                                step_folders, write_manifest)
from optimus.data import train_tokenizer
from optimus.training import train

pytest_plugins = ["trained"]


def test_an_existing_run_is_never_overwritten(go, tmp_path):
    go("run", stop=3)
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run")
    assert [go(None, stop=1).checkpoint.parent.name for _ in range(2)] == ["run-001", "run-002"]
    assert go(None, resume=True, stop=2).checkpoint.parent.name == "run-002"


def test_resume_without_any_checkpoint_starts_at_the_beginning(go):
    assert go("new", resume=True, stop=2).history[0]["step"] == 1


@pytest.mark.parametrize("change, words", [
    (dict(learning_rate=1e-4), r"training_config.learning_rate was 0.005 .* is 0.0001 now"),
    (dict(seed=5), "training_config.seed was 0 .* is 5 now"),
    (dict(batch_size=2), "training_config.batch_size was 4 .* is 2 now"),
    (dict(model=replace(SMALL, num_layers=3)), "model_config.num_layers was 2 .* is 3 now"),
])
def test_another_run_cannot_be_resumed_by_mistake(go, change, words, monkeypatch):
    go("run", stop=3)
    monkeypatch.setattr(ranks, "load_checkpoint", None)  # refused before any tensor is read
    with pytest.raises(ValueError, match=f"cannot resume: {words}"): go("run", resume=True, **change)


OTHERS = [["edited", *TEXTS[1:]], TEXTS[1:], [*TEXTS, "more"], TEXTS[::-1]]


@pytest.mark.parametrize("texts", OTHERS, ids=["edited", "shorter", "longer", "another order"])
def test_another_text_is_refused_in_words(go, texts, monkeypatch):
    go("run", stop=3, dataset_name="my.txt")
    monkeypatch.setattr(ranks, "load_checkpoint", None)
    words = "run: the text of the corpus my.txt has changed since step 3; bring the old text back, or begin"
    with pytest.raises(ValueError, match=words) as error:
        go("run", resume=True, texts=texts, dataset_name="my.txt")
    assert not re.search("[0-9a-f]{16}", str(error.value))
    with pytest.raises(ValueError, match="corpus other.txt is another text than my.txt, .* to step 3; bring"):
        go("run", resume=True, texts=texts, dataset_name="other.txt")


def test_the_same_text_under_another_name_is_the_same_corpus(go):
    go("run", stop=3, dataset_name="old.txt")
    moved = go("run", resume=True, dataset_name="/elsewhere/new.jsonl", dataset_config="edition")
    assert losses(moved) == losses(go("whole"))


def test_another_tokenizer_of_the_same_size_is_refused(go, tmp_path):
    result = go("run", stop=3)
    other = train_tokenizer([t[::-1] for t in TEXTS], len(result.tokenizer))
    assert len(other) == len(result.tokenizer)
    config = TrainingConfig(**load_checkpoint(result.checkpoint).trainer_state["training_config"])
    with pytest.raises(ValueError, match="tokenizer is not the one that the run was trained with; leave"):
        train(SMALL, config, resume=True, corpus={"text": TEXTS}, tokenizer=other, progress=False)


def test_settings_that_change_no_number_may_change(go):
    go("run", stop=3)
    changed = dict(num_workers=1, save_interval=20, keep_last=1, micro_batch_size=4)
    assert len(go("run", resume=True, **changed).history) == 40


def test_ten_bad_steps_in_a_row_stop_with_everything_worth_knowing(go, monkeypatch, tmp_path):
    original = LanguageModel.loss
    calls = []

    def loss(self, x, y):
        if self.training: calls.append(1)
        return original(self, x, y) * (math.nan if len(calls) > 12 and self.training else 1)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    words = "step 22: 10 steps in a row.*learning rate.*norm nan.*last good checkpoint is .*step-00000010;"
    with pytest.raises(FloatingPointError, match=words): go(save_interval=5, keep_last=9)
    state = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).model.state_dict()
    assert all(x.isfinite().all() for x in state.values())
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000010"


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(go, tmp_path):
    (tmp_path / "file").write_text("")
    rows = []
    with pytest.raises(CheckpointError, match="cannot write checkpoints in .*file"):
        go(checkpoint_dir=str(tmp_path / "file"), on_step=rows.append)
    assert rows == []


def test_a_damaged_newest_checkpoint_does_not_cost_the_new_ones(go):
    rarely = dict(save_interval=4, eval_interval=100)
    folder = go("run", stop=8, **rarely).checkpoint.parent
    (folder / "step-00000008" / "config.json").write_text("damaged")
    with pytest.warns(UserWarning, match="step-00000008"):
        result = go("run", resume=True, stop=6, keep_last=1, **rarely)
    assert result.checkpoint.name == "step-00000006" and result.checkpoint.is_dir()
    assert [p.name for p in step_folders(folder)] == ["step-00000006"]
    assert (folder / ".damaged-step-00000008").is_dir()
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_resuming_a_finished_run_changes_nothing(go):
    done = go("run")
    before = (done.checkpoint / "manifest.json").stat().st_mtime_ns
    again = go("run", resume=True)
    assert (again.checkpoint / "manifest.json").stat().st_mtime_ns == before
    assert losses(again) == losses(done) and not again.model.training


@pytest.mark.parametrize("hidden", [(".old-",), (".old-", ".half-")])
def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(go, hidden):
    path = go("run", stop=3).checkpoint
    for prefix in hidden: shutil.copytree(path, path.with_name(prefix + path.name))
    shutil.rmtree(path)
    taken = []
    result = go("run", resume=True, on_step=lambda row: taken.append(row["step"]))
    assert taken[0] == 4 and not list(path.parent.glob(".*-step-*"))
    assert losses(result) == losses(go("whole"))


def test_a_checkpoint_that_is_damaged_again_is_set_aside_again(go):
    folder = go("run", stop=6, save_interval=3).checkpoint.parent
    for _ in range(2):
        (folder / "step-00000006" / "config.json").write_text("damaged")
        with pytest.warns(UserWarning, match="step-00000006"): go("run", resume=True, stop=6, save_interval=3)
    assert latest_checkpoint(folder).name == "step-00000006"
    assert len(list(folder.glob(".damaged-step-00000006*"))) == 2


def test_two_processes_do_not_train_in_one_folder(go, monkeypatch):
    folder = go("run", stop=3).checkpoint.parent
    def tree(): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    before = tree()
    monkeypatch.setattr(runs, "lock_run", partial(runs.lock_run, seconds=0.1))
    hold = ("import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n"
            "    print(flush=True)\n    input()")
    with subprocess.Popen([sys.executable, "-c", hold, str(folder / ".lock")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is training in .*run"): go("run", resume=True)
        assert tree() == before
        other.kill()
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_a_second_process_does_not_write_over_what_the_first_trained_meanwhile(go, monkeypatch, tmp_path):
    lock_run, trees = runs.lock_run, []
    folder = tmp_path / "checkpoints" / "run"
    def tree(): return {p: p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}

    def waits(*arguments):
        monkeypatch.setattr(runs, "lock_run", lock_run)
        go("run", stop=3, seed=5)  # the other process, which has the folder first
        trees.append(tree())
        return lock_run(*arguments)

    monkeypatch.setattr(runs, "lock_run", waits)
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run", seed=6)
    assert [tree()] == trees


def test_a_run_without_a_checkpoint_has_left_its_settings(go, tmp_path):
    def dies(row): raise SystemExit("killed")
    with pytest.raises(SystemExit): go("run", on_step=dies)
    folder = tmp_path / "checkpoints" / "run"
    assert not list(folder.glob("step-*"))
    state = json.loads((go("undisturbed").checkpoint / "trainer_state.json").read_text())
    state["training_config"]["run_name"] = "run"
    told = json.loads((folder / "settings.json").read_text())
    assert told == {name: state[name] for name in ("model_config", "training_config", "corpus")}
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_resume_takes_the_highest_number_or_a_named_run_that_took_a_step_later(go):
    go(None, stop=2)
    assert go("mine", stop=2).checkpoint.parent.name == "mine"
    assert go(None, resume=True, stop=3).checkpoint.parent.name == "mine"
    assert go("run-001", resume=True, stop=3).checkpoint.parent.name == "run-001"
    assert go(None, resume=True, stop=4).checkpoint.parent.name == "run-001"


def test_resume_without_a_run_is_an_error_and_failed_starts_are_not_runs(go, tmp_path):
    with pytest.raises(ValueError, match="no run to resume in"): go(None, resume=True)
    assert go(None, stop=2).checkpoint.parent.name == "run-001"
    (tmp_path / "checkpoints" / "run-002").mkdir()
    (tmp_path / "checkpoints" / "run-001-backup").mkdir()
    assert go(None, resume=True, stop=3).checkpoint.parent.name == "run-001"
    assert go(None, stop=1).checkpoint.parent.name == "run-003"


def test_what_cannot_run_is_refused_before_the_corpus_is_tokenized(go, tmp_path, monkeypatch):
    go("run", stop=1)
    monkeypatch.setattr(training, "prepare_data", None)
    with pytest.raises(ValueError, match="no run to resume in .*resume=True"):
        go(None, resume=True, checkpoint_dir=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["run"]


def test_a_run_may_go_on_longer_with_a_warning(go):
    go("run", max_steps=5)
    with pytest.warns(UserWarning, match="max_steps was 5 and is 8 now"):
        assert len(go("run", resume=True, max_steps=8).history) == 8
    with pytest.raises(ValueError, match="max_steps was 8 .* is 6 now"): go("run", resume=True, max_steps=6)


def test_a_run_that_diverged_goes_on_with_a_smaller_rate(go, monkeypatch, tmp_path):
    wild = dict(save_interval=1, warmup=0.1, eval_interval=100, max_steps=20)
    with pytest.raises(FloatingPointError) as error: go("run", learning_rate=1e38, **wild)
    good = re.search(r"last good checkpoint is (\S+); resume the run with a smaller", str(error.value))[1]
    assert load_checkpoint(good).trainer_state["run"]["bad_steps"] == 0
    for line in (tmp_path / "checkpoints/run/history.jsonl").read_text().splitlines(): STRICT(line)
    with pytest.raises(ValueError, match=r"learning_rate was 1e\+38 .* is 2e\+38 now"):
        go("run", resume=True, learning_rate=2e38, **wild)
    with pytest.warns(UserWarning, match=r"learning_rate was 1e\+38 and is 0.001 now: the run diverged"):
        result = go("run", resume=True, learning_rate=1e-3, **wild)
    assert len(result.history) == 20 and all(math.isfinite(row["loss"]) for row in result.history)
    go("calm", stop=3)
    with pytest.raises(ValueError, match="cannot resume: training_config.learning_rate"):
        go("calm", resume=True, learning_rate=1e-4)


def test_without_a_checkpoint_from_before_a_divergence_a_new_run_is_advised(go, monkeypatch):
    poison(monkeypatch, lambda call: True)
    with pytest.raises(FloatingPointError, match="there is no good checkpoint; begin a new run"): go("run")


@pytest.mark.parametrize("gone", [("training_config", "beta1"), ("training_config", "start_from"),
                                  ("model_config", "rope_theta"), ("model_config", "intermediate_size"),
                                  ("run", "validation_due"), ("run", "fits_on"), ("corpus", "documents")])
def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(go, gone):
    path = go("run", stop=3).checkpoint
    rewrite_state(path, lambda state: state[gone[0]].pop(gone[1]))
    assert len(go("run", resume=True, stop=5).history) == 5


def test_a_missing_setting_that_is_not_the_default_is_still_another_run(go):
    path = go("run", stop=3, beta1=0.8).checkpoint
    rewrite_state(path, lambda state: state["training_config"].pop("beta1"))
    with pytest.raises(ValueError, match="beta1 was 0.9 in the saved run and is 0.8 now"):
        go("run", resume=True, beta1=0.8)


def test_a_checkpoint_from_a_gpu_machine_resumes_on_a_cpu(go):
    path = go("run", stop=3).checkpoint
    state = torch.load(path / "train_state.pt", weights_only=True)
    state["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 3
    torch.save(state, path / "train_state.pt")
    write_manifest(path)
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_the_newest_checkpoint_is_hashed_once_on_resume(go, monkeypatch):
    path = go("run", stop=3).checkpoint
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256_of", lambda p: hashed.append(p) or sha256_of(p))
    monkeypatch.setattr(training, "save_checkpoint", lambda *a, **k: path)
    go("run", resume=True, stop=4)
    mine = [p.name for p in hashed if p.parent == path]
    assert sorted(mine) == sorted(set(mine)) and len(mine) == 5


@pytest.mark.parametrize("note, fits", [
    ({"asked": None, "fits": 2, "device": "cpu"}, 2), ({"asked": None, "fits": 2}, 2),
    ({"asked": 8, "fits": 2, "device": "cpu"}, None), ({"asked": None, "fits": 2, "device": "GPU"}, None),
    ({"asked": None, "fits": "two"}, None), ([], None), ({}, None)])
def test_a_note_about_parts_counts_on_the_device_it_names(tmp_path, note, fits):
    (tmp_path / "micro_batch_size").write_text(json.dumps(note))
    assert runs.micro_batch_hint(tmp_path, None, "cpu") == fits
