"""Give every notebook a Colab badge and an install cell: python tests/colab.py [OWNER/REPOSITORY]

Without an argument the address is that of `[project.urls] Repository` in pyproject.toml; with one it is
written there first. A notebook that has both is left as it is, or gets the new address. Elsewhere the
install cell does nothing.
"""
import re
import sys
import tomllib
from pathlib import Path

import nbformat
from clean_notebooks import clean

ROOT = Path(__file__).resolve().parent.parent
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{address}/blob/main/notebooks/{name})")
INSTALL = """# Colab only: fetch the course and install it
import sys

if "google.colab" in sys.modules:
    !git clone -q --depth 1 https://github.com/{address} && pip install -q ./{folder}
    %cd {folder}/notebooks"""


def repository(project: Path) -> str | None:
    """OWNER/REPOSITORY on GitHub, from pyproject.toml; None if it names none."""
    urls = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("urls", {})
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", urls.get("Repository", ""))
    return found and found[1]


def write_badges(notebooks: Path, address: str) -> None:
    for path in sorted(notebooks.glob("[0-9][0-9]*_*.ipynb")):
        nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nb.cells = [c for c in nb.cells if not c.id.startswith("colab-")]
        badge = nbformat.v4.new_markdown_cell(BADGE.format(address=address, name=path.name), id="colab-badge")
        install = INSTALL.format(address=address, folder=address.split("/")[1])
        install = nbformat.v4.new_code_cell(install, id="colab-install", metadata={"tags": ["nbval-skip"]})
        nb.cells.insert(1, badge)  # below the title
        code = next(i for i, c in enumerate(nb.cells) if c.cell_type == "code")
        nb.cells.insert(code + nb.cells[code].source.startswith("#| default_exp"), install)
        path.write_text(clean(nb), encoding="utf-8")


def main(words: list[str]) -> None:
    project = ROOT / "pyproject.toml"
    if words:
        [address] = words
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
            sys.exit(f"expected OWNER/REPOSITORY, got {address!r}")
        text = project.read_text(encoding="utf-8")
        text = re.sub(r"\[project\.urls\]\nRepository = .*\n\n", "", text)
        urls = f'[project.urls]\nRepository = "https://github.com/{address}"\n\n'
        text = text.replace("[project.scripts]\n", urls + "[project.scripts]\n")
        project.write_text(text, encoding="utf-8")
    address = repository(project)
    if not address: sys.exit("no repository on GitHub is named in pyproject.toml; give OWNER/REPOSITORY")
    write_badges(ROOT / "notebooks", address)


if __name__ == "__main__": main(sys.argv[1:])
