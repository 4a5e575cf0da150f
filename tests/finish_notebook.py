"""Bring a changed notebook home: python tests/finish_notebook.py notebooks/05_mla.ipynb [...]

Exports the package, runs and cleans the notebooks, lets ruff read everything, and runs the tests of the
modules that they export and of the notebooks' form. Stops at the first step that fails.
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORM = ["tests/test_notebooks.py", "tests/test_imports.py", "tests/test_export.py", "tests/test_examples.py"]


def module_of(notebook: Path) -> str | None:
    """The module named in the notebook's `#| default_exp` line."""
    found = re.search(r'#\| default_exp ([\w.]+)', notebook.read_text(encoding="utf-8"))
    return found and found[1]


def steps(notebooks: list[Path]) -> list[list[str]]:
    """The commands, in order."""
    modules = [module_of(path) for path in notebooks]
    tests = [f"tests/test_{module}.py" for module in modules if module]
    if any("exercises." in (module or "") for module in modules): tests.append("tests/test_exercises.py")
    own = [path for path in dict.fromkeys(tests) if (ROOT / path).exists()]
    return [[str(Path(sys.executable).with_name("nbdev-export"))],
            [sys.executable, "tests/clean_notebooks.py", "--execute", *map(str, notebooks)],
            [sys.executable, "-m", "ruff", "check", "optimus", "tests", "notebooks"],
            [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *own, *FORM]]


def main(names: list[str]) -> int:
    notebooks = [Path(name).resolve() for name in names]
    missing = [str(path) for path in notebooks if path.suffix != ".ipynb" or not path.is_file()]
    if missing or not names: sys.exit(f"expected notebooks, got {', '.join(missing) or 'none'}\n\n{__doc__}")
    for command in steps(notebooks):
        print("$", " ".join(command), flush=True)
        if code := subprocess.run(command, cwd=ROOT).returncode: return code
    print("all well: commit the notebooks and what changed in optimus/ together")
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
