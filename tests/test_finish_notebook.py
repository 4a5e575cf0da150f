"""The command that brings a changed notebook home names every step, and stops where one fails."""
import subprocess
from pathlib import Path

import finish_notebook
import pytest
from finish_notebook import ROOT, main, steps

MLA = ROOT / "notebooks" / "05_mla.ipynb"
BOOK = ROOT / "notebooks" / "exercises" / "05_mla.ipynb"


def test_the_steps_export_run_read_and_test():
    export, execute, lint, test = steps([MLA, BOOK])
    assert Path(export[0]).name == "nbdev-export"
    assert execute[1:] == ["tests/clean_notebooks.py", "--execute", str(MLA), str(BOOK)]
    assert lint[2:4] == ["ruff", "check"]
    assert {"tests/test_mla.py", "tests/test_exercises.py", "tests/test_notebooks.py"} < set(test)
    for path in test:
        if path.startswith("tests/"): assert (ROOT / path).is_file()


def test_it_stops_at_the_first_step_that_fails(monkeypatch, capsys):
    ran = []
    def run(command, cwd):
        ran.append(command)
        return subprocess.CompletedProcess(command, 3 * (len(ran) == 2))
    monkeypatch.setattr(finish_notebook.subprocess, "run", run)
    assert main([str(MLA)]) == 3 and len(ran) == 2
    assert "all well" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["notebooks/none.ipynb"], ["README.md"]])
def test_what_is_no_notebook_is_refused(names):
    with pytest.raises(SystemExit, match="expected notebooks"): main(names)
