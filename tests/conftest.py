"""How every test starts: one thread a process, notebooks slow, and in notebooks a clock that runs wrong.

Tests run side by side (see `addopts` in pyproject.toml), and with more than one thread small tensors on
shared cores only wait for each other. The kernels of notebooks get a clock that runs five times as fast as
the real one, as if the machine were five times as slow: nothing that a notebook prints may show it.
`--shuffle SEED` runs the files, and the tests of each, in another order.
"""
import os
import random
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when imported, here and in child processes

CLOCK = """
def _clock():
    import os, sys, time, timeit, tqdm.std
    begin, sys.modules["tqdm.notebook"] = tqdm.std.tqdm.__init__, None
    def without_bar(bar, *args, **kwargs): begin(bar, *args, **{**kwargs, "disable": True})
    tqdm.std.tqdm.__init__ = without_bar  # whether a bar appears depends on the speed
    scale, real = float(os.environ.get("OPTIMUS_CLOCK", 1)), time.perf_counter
    time.perf_counter = timeit.default_timer = lambda: scale * real()
_clock()
"""


def pytest_addoption(parser):
    parser.addoption("--shuffle", metavar="SEED", help="run the tests in an order drawn from SEED")


def pytest_configure(config):
    config.kernels = tempfile.TemporaryDirectory()  # IPython runs what lies in `startup` first
    startup = Path(config.kernels.name) / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-clock.py").write_text(CLOCK)
    os.environ["IPYTHONDIR"] = config.kernels.name
    os.environ.setdefault("OPTIMUS_CLOCK", "5")


def pytest_unconfigure(config): config.kernels.cleanup()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Prepared data of a test goes to its own folder."""
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))


def is_cell(item) -> bool: return item.path.suffix == ".ipynb"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    for item in filter(is_cell, items): item.add_marker("slow")
    if not config.option.shuffle: return
    order = random.Random(config.option.shuffle)
    files = {}
    for item in items: files.setdefault(item.path, []).append(item)
    for tests in files.values():
        if not is_cell(tests[0]): order.shuffle(tests)
    files = list(files.values())
    order.shuffle(files)
    items[:] = [item for tests in files for item in tests]
