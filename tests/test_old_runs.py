"""A run that version 0.1 began still opens, resumes and generates: `tests/data/run-of-0.1` was written by it.

It was stopped after step 8 of 16. `run-of-0.1.losses.json` holds the losses of the same run without a stop.
"""
import json
import shutil
from pathlib import Path

import pytest
from fork_server import TEXTS

from optimus import ModelConfig, TrainingConfig, cli, train
from optimus.checkpoint import find_damage, load_checkpoint

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run, as the only one in ./checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(DATA / "run-of-0.1", "checkpoints/run"))


def test_it_opens_undamaged(run):
    checkpoint = load_checkpoint(run / "step-00000008")
    assert find_damage(checkpoint.path) is None and checkpoint.step == 8
    assert checkpoint.train_state["optimizer"]["state"] and len(checkpoint.tokenizer) == 270


def test_it_goes_on_as_if_it_had_never_been_stopped(run):
    settings = json.loads((run / "settings.json").read_text())
    config = TrainingConfig.from_dict(settings["training_config"])
    result = train(ModelConfig.from_dict(settings["model_config"]), config, resume=True, progress=False,
                   corpus={"text": TEXTS})
    wanted = json.loads((DATA / "run-of-0.1.losses.json").read_text())
    assert [row["step"] for row in result.history] == list(range(1, 17))
    assert [row["loss"] for row in result.history] == pytest.approx(wanted, abs=1e-4)


def test_the_command_line_resumes_it_with_its_own_settings_and_generates(run, capsys):
    Path("words.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    assert cli.main(["train", "--resume"]) == 0
    assert capsys.readouterr().out.startswith("continuing checkpoints/run: MLA with 1 layers of width 8")
    assert cli.main(["generate", "the of", "--max-new-tokens", "5", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("the of")
