"""The examples in the docstrings of the modules run, and show what they say."""
import ast
import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "optimus"


def docstring(path: Path) -> str: return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


WITH_EXAMPLES = [path.stem for path in sorted(PACKAGE.glob("*.py")) if ">>>" in docstring(path)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_of_a_module_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path))
    module = importlib.import_module(f"optimus.{name}")
    [example] = doctest.DocTestFinder(recurse=False).find(module)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted and not result.failed


def test_an_example_that_is_wrong_is_seen():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(example, out=lambda text: None).failed == 1
