"""The package is what the notebooks export: nothing edited by hand, nothing forgotten."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HAND_WRITTEN = {"__init__.py", "cli.py", "exercises/__init__.py"}


def generated(root: Path) -> dict[str, str]:
    """The name and text of every generated file below `root`."""
    files = {p.relative_to(root / "optimus").as_posix(): p for p in (root / "optimus").rglob("*.py")}
    return {name: p.read_text(encoding="utf-8") for name, p in files.items() if name not in HAND_WRITTEN}


def export(root: Path) -> dict[str, str]:
    """Export the notebooks below `root` and return the text of every generated file."""
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # if set, nbdev exports nothing
    command = Path(sys.executable).with_name("nbdev-export")
    subprocess.run([command], cwd=root, env=environment, check=True, capture_output=True)
    return generated(root)


def fresh_tree(folder: Path) -> Path:
    """A copy of the project without any generated module."""
    ignore = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=ignore)
    (folder / "optimus" / "exercises").mkdir(parents=True)
    for name in HAND_WRITTEN: shutil.copy(ROOT / "optimus" / name, folder / "optimus" / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "README.md", folder)
    return folder


def test_package_equals_the_export_of_the_notebooks(tmp_path):
    exported, here = export(fresh_tree(tmp_path)), generated(ROOT)
    assert exported.keys() == here.keys()
    differing = [name for name in exported if exported[name] != here[name]]
    assert differing == [], f"run nbdev-export: {differing} differ from their notebooks"


def test_a_changed_notebook_changes_the_export(tmp_path):
    tree = fresh_tree(tmp_path)
    notebook = next((tree / "notebooks").glob("02_*.ipynb"))
    text = notebook.read_text(encoding="utf-8")
    assert "class RMSNorm" in text
    notebook.write_text(text.replace("class RMSNorm", "class RMSNorm2"), encoding="utf-8")
    assert "class RMSNorm2" in export(tree)["norm.py"]


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "optimus", "tests", "notebooks"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
