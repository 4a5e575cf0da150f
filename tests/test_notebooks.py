"""Notebooks are valid, clean, built to one pattern, and their links lead somewhere. (nbval runs them.)"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import zmq
from clean_notebooks import clean, execute
from clock import shown
from colab import BADGE, repository, write_badges
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def is_companion(path) -> bool: return path.stem[2] != "_"  # 00b and so on
def all_cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def cells(path, kind): return [c for c in all_cells(path) if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])
def prose(path): return "\n".join(source(c) for c in cells(path, "markdown"))


@each
def test_valid_and_clean(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert clean(notebook) == text, "run python tests/clean_notebooks.py"
    assert path.stat().st_size <= 500_000


@each
def test_outputs_are_kept_and_hold_no_error(path):
    code = cells(path, "code")
    assert any("image/png" in o.get("data", {}) for c in code for o in c["outputs"]), "no picture"
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    for c in code:
        if "nbval-skip" not in c["metadata"].get("tags", []): assert c["execution_count"], source(c)


PARTS = ["**Question.**", "**You will build**", "**You need**", "## Implement", "## Verify",
         "## What we exported"]
CHAPTER = [*PARTS, "## Derive", "## Picture", "## Measure", "## Break it", "## Your turn", "## What is next",
           "<details>"]


FIRST = ["**Question.**", "**You will build**", "**You need**", "## What is next", "<details>"]


@each
def test_pattern(path):
    text, code = prose(path), cells(path, "code")
    title = source(cells(path, "markdown")[0])
    assert re.match(r"# .+\n\n> .+", title), "a title and a one-sentence answer"
    first = path.stem.startswith("00_")  # the only one that exports nothing
    assert source(code[0]).startswith("#| default_exp ") != first
    for part in FIRST if first else PARTS if is_companion(path) else CHAPTER: assert part in text, part
    assert sum("assert" in source(c) for c in code) >= 3
    for c in code:
        lines = [line for line in source(c).splitlines() if line.strip()]
        if "#| export" not in source(c): assert len(lines) <= 15, source(c)
        assert not source(c).rstrip().endswith(";")
    row = longest = 0
    for cell in all_cells(path):
        row = row + 1 if cell["cell_type"] == "code" else 0
        longest = max(longest, row)
    assert longest <= 3, "more than three code cells in a row"


BOOKS = sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb"))
LONG = {"ModelConfig", "TrainingConfig",  # a field and its meaning in each line
        "LanguageModel", "Sequences", "StopRequest", "PanelView", "GenerationPanel",  # classes of one piece
        "_CARD",  # a text
        "loss_in_parts"}  # an exercise with its wrong answers


def exported(paths) -> dict[str, list[str]]:
    """The lines of every exported cell, under the first name that it defines."""
    found = {}
    for path in paths:
        for cell in cells(path, "code"):
            if not source(cell).startswith("#| export"): continue
            name = re.search(r"(?:^def|^class|^exercise\(.)\s*(\w+)|^(\w+) = ", source(cell), re.M)
            label = name[1] or name[2] if name else f"{path.stem} {cell['id']}"
            found[label] = source(cell).splitlines()
    return found


def test_exported_cells_are_small():
    lines = exported([*NOTEBOOKS, *BOOKS])
    sizes = sorted(sum(bool(line.strip()) for line in text) for text in lines.values())  # blank ones are none
    assert sizes[len(sizes) // 2] <= 12 and sizes[int(0.9 * len(sizes))] <= 25
    assert {name for name, text in lines.items() if len(text) > 40} == LONG


@pytest.mark.parametrize("path", [*NOTEBOOKS, *BOOKS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_sentence_stands_before_every_exported_cell(path):
    row = all_cells(path)
    alone = [source(cell)[:60] for before, cell in zip(row, row[1:])
             if source(cell).startswith("#| export") and cell["cell_type"] == "code"
             and before["cell_type"] == "code" and not source(before).startswith("#| default_exp")]
    assert alone == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, *BOOKS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_markdown_cell_holds_150_words_at_most(path):
    words = {cell["id"]: len(re.sub(r"```.*?```|\|.*", "", source(cell), flags=re.S).split())
             for cell in cells(path, "markdown") if "<details>" not in source(cell)}
    assert {name: count for name, count in words.items() if count > 150} == {}


def anchors(path: Path) -> set[str]:
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links in a markdown text that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if re.match(r"https?:|mailto:|data:|attachment:", link): continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)): broken.append(link)
    return broken


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    assert broken_links(path, text) == []


def test_the_link_checker_sees_broken_links(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n")
    text = "[a](none.md) [b](#no-heading) [c](#a-heading) [d](page.md#a-heading) [e](https://x.org)"
    assert broken_links(page, text) == ["none.md", "#no-heading"]


@pytest.mark.slow
def test_the_cleaner_repairs_and_check_reports(tmp_path):
    dirty = tmp_path / "dirty.ipynb"
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=7, metadata={"trusted": True})
    cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7)]
    nb = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(nb, dirty)
    command = [sys.executable, ROOT / "tests" / "clean_notebooks.py"]
    assert subprocess.run([*command, "--check", dirty], capture_output=True).returncode == 1
    assert subprocess.run([*command, dirty], capture_output=True).returncode == 0
    assert subprocess.run([*command, "--check", dirty], capture_output=True).returncode == 0
    cell = json.loads(dirty.read_text())["cells"][0]
    assert (cell["execution_count"], cell["outputs"][0]["execution_count"], cell["metadata"]) == (1, 1, {})
    assert cell["outputs"][0]["data"] == {"text/plain": ["2"]}


@pytest.mark.slow
def test_executing_waits_a_second_at_most_before_it_looks_again(monkeypatch):
    """The signal that a reply has come can be lost: here every longer wait for one has lost it."""
    from jupyter_client.channels import AsyncZMQSocketChannel
    look, replies = AsyncZMQSocketChannel.get_msg, []
    async def get_msg(channel, timeout=None):
        if channel.socket.type != zmq.DEALER: return await look(channel, timeout)
        if timeout is None or timeout > 1: raise TimeoutError("nothing was heard")
        replies.append(await look(channel, timeout))
        return replies[-1]
    monkeypatch.setattr(AsyncZMQSocketChannel, "get_msg", get_msg)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(2.5); 1 + 1")])
    execute(nb)
    assert nb.cells[0].outputs[0]["data"] == {"text/plain": "2"}
    assert "execute_reply" in [reply["msg_type"] for reply in replies]


@pytest.mark.slow
def test_an_output_that_depends_on_the_speed_is_seen(monkeypatch):
    sources = ["import time, timeit; from optimus.timing import about",
               "start = time.perf_counter(); time.sleep(0.2)",
               "took = time.perf_counter() - start; about(took, 's')",
               "took > 0.6",
               "timeit.default_timer() > 1.5 * time.monotonic()"]
    seen = []
    for scale in ("1", "5"):
        monkeypatch.setenv("OPTIMUS_CLOCK", scale)
        cells = [nbformat.v4.new_code_cell(s, id=f"cell{i}") for i, s in enumerate(sources)]
        nb = nbformat.v4.new_notebook(cells=cells)
        execute(nb)
        seen.append(shown(nb))
    assert [i for i in seen[0] if seen[0][i] != seen[1][i]] == ["cell3", "cell4"]
    assert seen[0]["cell2"] == [("execute_result", None, "'MEASURED'")]


@pytest.mark.slow
def test_a_notebook_run_twice_in_one_kernel_gives_the_same_numbers():
    nb = nbformat.read(ROOT / "notebooks" / "02_rmsnorm.ipynb", as_version=4)
    once = [c for c in nb.cells if c.cell_type == "code" and not c.metadata.get("tags")]
    nb.cells = once + [nbformat.from_dict(dict(c, id=f"{c.id}x")) for c in once]
    execute(nb)
    first, second = nb.cells[:len(once)], nb.cells[len(once):]
    def outputs(cell): return [o.get("data", o.get("text")) for o in cell.outputs]
    for a, b in zip(first, second, strict=True):
        if "about(" not in a.source: assert outputs(a) == outputs(b), a.source


@each
def test_a_badge_opens_it_in_colab_where_the_repository_has_an_address(path):
    address = repository(ROOT / "pyproject.toml")
    wanted = BADGE.format(address=address, name=path.name) if address else None
    assert [source(c) for c in all_cells(path) if c["id"] == "colab-badge"] == ([wanted] if wanted else [])


def test_badges_keep_every_notebook_to_the_pattern_and_installing_does_nothing_here(tmp_path):
    for path in NOTEBOOKS: shutil.copy(path, tmp_path)
    write_badges(tmp_path, "first/name")
    once = None
    for _ in range(2):  # a second time changes nothing
        write_badges(tmp_path, "someone/optimus")
        texts = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.ipynb"))]
        assert once in (None, texts)
        once = texts
    for path, before in zip(sorted(tmp_path.glob("*.ipynb")), NOTEBOOKS, strict=True):
        test_valid_and_clean(path)
        test_pattern(path)
        assert [c for c in all_cells(path) if not c["id"].startswith("colab-")] == all_cells(before)
        text = path.read_text(encoding="utf-8")
        assert f"github/someone/optimus/blob/main/notebooks/{path.name})" in text
        assert "first/name" not in text
        [install] = [source(c) for c in all_cells(path) if c["id"] == "colab-install"]
        plain = TransformerManager().transform_cell(install)
        exec(plain, {})  # noqa: S102  without get_ipython a shell command would fail
