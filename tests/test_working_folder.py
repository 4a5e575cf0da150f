"""A notebook runs from whatever folder the server was started in: its files are found through the package."""
import ast
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
OPENS = {"open", "Path", "use", "read_text", "read_bytes", "imread", "load", "from_pretrained"}
ENDINGS = (".mplstyle", ".txt", ".json", ".jsonl", ".png", ".csv", ".py")


def plain_cells(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code" and "#| export" not in c.source]


def relative_files(source: str) -> list[str]:
    """Names with an ending or a slash, no absolute ones, that a cell hands to something that opens files."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call): continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        for value in call.args[:1] if name in OPENS else []:
            text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
            file = "/" in text or text.endswith(ENDINGS)
            if file and not text.startswith("/"): found.append(text)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_opens_a_file_beside_the_notebook(path):
    for source in plain_cells(path):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        assert relative_files("\n".join(lines)) == [], source


def test_the_search_for_relative_files_sees_them():
    cell = 'plt.style.use("x.mplstyle"); Path("images/a").read_text(); open("notes.txt")'
    assert sorted(relative_files(cell)) == ["images/a", "notes.txt", "x.mplstyle"]
    assert relative_files('Path("/proc/net/dev"); Path(folder); plt.style.use("optimus.plots")') == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_style_sheet_is_found_from_another_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uses = [line for source in plain_cells(path) for line in source.splitlines() if "plt.style.use(" in line]
    assert len(uses) == 1
    with plt.style.context("default"):
        exec(uses[0], {"plt": plt})  # noqa: S102
        assert plt.rcParams["figure.figsize"] == [7, 3.2]


@pytest.mark.parametrize("name", ["02_rmsnorm", "03_swiglu"])
def test_the_first_cells_of_a_notebook_run_in_another_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = next(p for p in NOTEBOOKS if p.stem == name)
    cells, names = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"], {}
    last = next(i for i, source in enumerate(cells) if "plt.style.use(" in source)
    with plt.style.context("default"):
        for source in cells[:last + 3]: exec(source, names)  # noqa: S102
    assert last < 5 and "plt" in names and list(tmp_path.iterdir()) == []
