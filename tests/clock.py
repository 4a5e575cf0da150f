"""Notebooks under a clock that runs wrong: what they show must not change.

The tests are in test_clock_*.py, four files, because the tests of one file run in one process.
"""
import configparser
import re
from pathlib import Path

import nbformat
from clean_notebooks import clean, execute

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
READS_A_CLOCK = (r"about\(|best_time|perf_counter|timeit|monotonic|time\.(time|sleep)|_seconds|measure_"
                 r"|tokens_per_second|bench\(")


def rules() -> list[tuple[str, str]]:
    """What nbval replaces before it compares: (regular expression, replacement)."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "tests" / "nbval_sanitize.cfg", encoding="utf-8")
    return [(config[name]["regex"], config[name]["replace"]) for name in config.sections()]


def shown(nb) -> dict[str, list]:
    """Cell id -> its text outputs as nbval compares them, for the cells whose outputs it compares."""
    found = {}
    for cell in nb.cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type != "code" or tags & {"nbval-ignore-output", "nbval-skip"}: continue
        texts = [(o.output_type, o.get("name"), o.get("text") or o.get("data", {}).get("text/plain"))
                 for o in cell.outputs]
        for regex, replacement in rules():
            texts = [(kind, name, re.sub(regex, replacement, text or "")) for kind, name, text in texts]
        found[cell.id] = texts
    return found


def reads_a_clock(path: Path) -> bool:
    """Whether a notebook's cells name anything that measures time; the others can show none of it."""
    cells = nbformat.read(path, as_version=4).cells
    return any(re.search(READS_A_CLOCK, cell.source) for cell in cells if cell.cell_type == "code")


TIMED = [path for path in NOTEBOOKS if reads_a_clock(path)]


def changed(path: Path, monkeypatch) -> set[str]:
    """The cells that show something else with a clock at three tenths; nbval has it at five (conftest.py)."""
    monkeypatch.setenv("OPTIMUS_CLOCK", "0.3")
    nb = nbformat.read(path, as_version=4)
    committed = shown(nb)
    execute(nb)
    clean(nb)
    now = shown(nb)
    return {cell for cell in committed if committed[cell] != now[cell]}
