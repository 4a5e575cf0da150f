"""The script for a GPU, dry: every stage that fits into one process runs here with tiny sizes on the CPU."""
import json
import subprocess

import on_cuda
import pytest
import torch
from on_cuda import MEASURES, STAGES, Report, finished, main, run_stage


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile hands back what it was given: what it makes is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda fn=None, **how: fn)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("resume", "bench")])
def test_a_stage_runs_to_its_end_and_is_not_run_again(name, tmp_path, no_compiler):
    run_stage(tmp_path, name, tiny=True)
    facts = json.loads((tmp_path / f"{name}.json").read_text())
    assert facts["finished"] and finished(tmp_path, name) and len(facts) > 2
    before = (tmp_path / f"{name}.json").stat().st_mtime_ns
    assert main([str(tmp_path), "--stages", name, "--seconds", "1"]) == 0
    assert (tmp_path / f"{name}.json").stat().st_mtime_ns == before


def test_the_command_of_a_training_run_is_one_that_the_command_line_takes(tmp_path, monkeypatch):
    from optimus import cli
    asked = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: asked.append(command) or real(["true"]))
    on_cuda.train_command(tmp_path / "runs", "fp16", 12, "whole", "--resume").wait()
    ran = []
    monkeypatch.setattr(cli, "train", lambda command: ran.append(command) or 0)
    assert cli.main(asked[0][3:]) == 0
    assert (ran[0].training.amp, ran[0].training.run_name, ran[0].training.max_steps) == ("fp16", "whole", 12)
    assert ran[0].resume and ran[0].preset == "tiny"


def test_what_fails_is_written_down_and_tried_again(tmp_path, monkeypatch):
    def broken(report): raise RuntimeError("no such kernel")
    monkeypatch.setitem(STAGES, "smoke", broken)
    with pytest.raises(RuntimeError): run_stage(tmp_path, "smoke", tiny=True)
    facts = json.loads((tmp_path / "smoke.json").read_text())
    assert "no such kernel" in facts["error"] and not finished(tmp_path, "smoke")


def test_stages_that_measure_have_the_gpu_alone(tmp_path):
    report = Report(tmp_path, "decode", tiny=True)
    assert set(MEASURES) < set(STAGES)
    with report.gpu(alone=True), open(tmp_path / "gpu.lock") as other, pytest.raises(BlockingIOError):
        on_cuda.fcntl.flock(other, on_cuda.fcntl.LOCK_SH | on_cuda.fcntl.LOCK_NB)
