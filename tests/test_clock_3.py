"""A quarter of the notebooks that measure anything, under a slow clock; see clock.py."""
import pytest
from clock import TIMED, changed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", TIMED[3::4], ids=lambda path: path.stem)
def test_what_it_shows_does_not_depend_on_the_speed(path, monkeypatch):
    assert changed(path, monkeypatch) == set()
