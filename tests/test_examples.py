"""The examples in the docstrings of modules are what Python prints."""
import doctest
import importlib
from pathlib import Path

import pytest

import optimus

FILES = sorted(Path(optimus.__file__).parent.glob("[a-z]*.py"))
EXAMPLES = [path.stem for path in FILES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_an_example_shows_is_true(name):
    found = doctest.testmod(importlib.import_module(f"optimus.{name}"))
    assert found.attempted and not found.failed
