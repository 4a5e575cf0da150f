"""Bring notebooks into the one form we commit: outputs kept, cells counted 1..n, nothing machine-specific.

    python tests/clean_notebooks.py [--check | --execute] [NOTEBOOK ...]

--check writes nothing and exits 1 if a notebook is not clean. --execute runs each notebook first.
"""
import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without its kernel
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(nb):
    """Run a notebook. nbclient answers a widget on the socket where it awaits the reply of the cell; ZeroMQ
    may take that for reading, and the signal that the reply has come is lost. So look again every second."""
    from queue import Empty

    from jupyter_client.asynchronous import AsyncKernelClient
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Channel(AsyncZMQSocketChannel):
        async def get_msg(self, timeout=None):
            while timeout is None or timeout > 1:
                try: return await super().get_msg(1)
                except Empty: timeout = timeout and timeout - 1
            return await super().get_msg(timeout)

    class Client(AsyncKernelClient): shell_channel_class = Channel
    class Manager(AsyncKernelManager): client_factory = Client

    NotebookClient(nb, timeout=600, kernel_name="python3", skip_cells_with_tag="nbval-skip",
                   kernel_manager_class=Manager,
                   resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()


def join_streams(outputs):
    """Consecutive writes to one stream become one output: where they were cut depends on timing."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def clean(nb):
    """Return the text of the notebook in its committed form; `nb` is changed in place."""
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    count = 0
    for cell in nb.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code": continue
        if "nbval-skip" in (tags or []): cell.outputs, cell.execution_count = [], None
        cell.outputs = [o for o in join_streams(cell.outputs) if WIDGET not in o.get("data", {})]
        ran = cell.execution_count is not None or cell.outputs
        count += bool(ran)
        cell.execution_count = count if ran else None
        for output in cell.outputs:
            if "execution_count" in output: output.execution_count = count
            if "metadata" in output: output.metadata = nbformat.from_dict({})
            if output.output_type == "stream":  # a progress bar rewrites its line: keep what stayed
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    nbformat.validate(nb)
    return nbformat.writes(nb, version=nbformat.NO_CONVERT) + "\n"


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--execute", action="store_true")
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    parser.add_argument("notebooks", nargs="*", type=Path, default=every)
    args = parser.parse_args()
    dirty = []
    for path in args.notebooks:
        before = path.read_text(encoding="utf-8")
        nb = nbformat.reads(before, as_version=nbformat.NO_CONVERT)
        if args.execute: execute(nb)
        after = clean(nb)
        if after != before:
            dirty.append(path)
            if not args.check: path.write_text(after, encoding="utf-8")
    for path in dirty: print(f"{'not clean' if args.check else 'cleaned'}: {path}")
    return 1 if args.check and dirty else 0


if __name__ == "__main__":
    sys.exit(main())
