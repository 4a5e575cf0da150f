"""What must stay true of optimus.run_log: one curve, whatever happens. Derived in notebook 11c."""
import json
import math
import shutil
import sys

import pytest
from trained import STRICT, curve, losses, next_second, poison

from optimus import run_log, training
from optimus.checkpoint import CheckpointError, step_folders

pytest_plugins = ["trained"]


def test_tensorboard_shows_one_curve_after_a_resume(go, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go("run", stop=25)
    place = tmp_path / "checkpoints" / "run"
    for folder in step_folders(place)[2:]: shutil.rmtree(folder)  # as if it had been killed after step 20
    resumed_at = int(step_folders(place)[-1].name[5:])
    assert resumed_at < 25
    next_second()
    result = go("run", resume=True)
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 41))
    for event, row in zip(events.Scalars("loss"), result.history):
        assert event.value == pytest.approx(row["loss"], rel=1e-6)
    names = ["learning_rate", "gradient_norm", "loss_scale", "tokens_per_second", "validation_loss"]
    if sys.platform == "linux": names.append("peak_memory_bytes")
    for name in [*names, "bits_per_byte"]: assert events.Scalars(name)


def test_history_is_one_json_object_a_line(go):
    result = go(stop=5)
    lines = (result.checkpoint.parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_damaged_small_files_do_not_stop_a_resume(go):
    folder = go("run", stop=6).checkpoint.parent
    lines = (folder / "history.jsonl").read_bytes().splitlines(True)
    (folder / "history.jsonl").write_bytes(b"".join([lines[0], b"{\xff\n", b"7\n", *lines[2:], b'{"st']))
    (folder / "micro_batch_size").write_text("")
    result = go("run", resume=True)
    assert [row["step"] for row in result.history] == [1, *range(3, len(result.history) + 2)]
    assert losses(result)[2:] == losses(go("whole"))[3:]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["add_scalar", "add_text", "close"])
def test_a_tensorboard_that_cannot_write_does_not_end_the_run(go, monkeypatch, what):
    from torch.utils.tensorboard import SummaryWriter
    def refuse(self, *arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(SummaryWriter, what, refuse)
    with pytest.warns(UserWarning, match="TensorBoard shows no more of this run.*No space left") as told:
        result = go("run", sample_interval=5)
    assert len([w for w in told if "TensorBoard" in str(w.message)]) == 1
    monkeypatch.undo()
    assert [json.loads(line)["step"] for line in open(result.checkpoint.parent / "history.jsonl")] == [
        row["step"] for row in result.history]
    assert result.history[-1]["step"] == result.history[0]["step"] + len(result.history) - 1 > 5


def test_a_history_that_cannot_be_written_names_the_file(go, monkeypatch):
    class Full:
        def seek(self, *where): return 0
        def write(self, text): raise OSError(28, "No space left on device")
        def close(self): raise OSError(28, "No space left on device")
    begin = run_log.History.__init__

    def on_a_full_disk(self, *arguments):
        begin(self, *arguments)
        self.file = Full()

    monkeypatch.setattr(run_log.History, "__init__", on_a_full_disk)
    words = "could not write .*run/history.jsonl: No space left.*bytes free"
    with pytest.raises(CheckpointError, match=words): go("run")


def test_two_runs_in_one_tensorboard_folder_show_one_curve(go, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for place in ("x", "y"):
        next_second()
        go("run", stop=4, checkpoint_dir=str(tmp_path / place))
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]


def test_the_history_of_a_run_with_bad_numbers_is_json_and_is_read_again(go, monkeypatch):
    poison(monkeypatch, lambda call: call in (3, 5))
    monkeypatch.setattr(training, "evaluate", lambda *a: math.nan)
    folder = go("run", stop=8).checkpoint.parent
    rows = [STRICT(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 5]
    assert rows[6]["validation_loss"] is None
    state = STRICT((step_folders(folder)[-1] / "trainer_state.json").read_text())
    assert state["run"]["best_loss"] is None and state["run"]["best_step"] is None
    again = go("run", resume=True, stop=10)
    assert math.isnan(again.history[2]["loss"]) and len(again.history) == 10


def test_runs_of_one_name_have_boards_of_their_own_and_keep_them(go, tmp_path):
    places = {place: dict(checkpoint_dir=str(tmp_path / place)) for place in "xyz"}
    for steps, place in ((4, "x"), (3, "y"), (2, "z")): go("run", stop=steps, **places[place])
    boards = [tmp_path / "runs" / name for name in ("run", "run-2", "run-3")]
    assert [curve(board) for board in boards] == [[1, 2, 3, 4], [1, 2, 3], [1, 2]]
    next_second()
    go("run", resume=True, stop=5, **places["y"])
    (tmp_path / "z").rename(tmp_path / "moved")
    go("run", resume=True, stop=6, checkpoint_dir=str(tmp_path / "moved"))
    assert [curve(board) for board in boards] == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run", "run-2", "run-3"]


def test_a_run_of_an_older_version_goes_on_in_its_old_board(go, tmp_path):
    go("run", stop=3)
    (tmp_path / "runs" / "run" / ".run").unlink()
    next_second()
    go("run", resume=True, stop=5)
    assert curve(tmp_path / "runs" / "run") == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]


def test_a_board_that_cannot_be_made_does_not_end_the_run(go, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="TensorBoard shows no more of this run"):
        assert len(go("run", stop=2, tensorboard_dir=str(tmp_path / "file" / "runs")).history) == 2
