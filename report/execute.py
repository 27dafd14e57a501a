"""Execute notebooks from top to bottom, with a bar over the cells of each."""

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from files import atomic_write
from report.cells import clean

__all__ = ["execute"]


def execute(path, out):
    """Execute the notebook `path`, in its folder, and write it with its outputs to `out`.

    Uses the kernel of the running Python, whatever kernel the notebook names. Raises
    CellExecutionError with the cell and its error; `out` is untouched then.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=cells, desc=Path(path).name, unit="cell") as bar:
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", record_timing=False,
            resources={"metadata": {"path": str(Path(path).resolve().parent)}},
            extra_arguments=["--IPKernelApp.log_level=40"],
            on_cell_executed=lambda **_: bar.update())
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    with atomic_write(out) as file:
        file.write((nbformat.writes(notebook) + "\n").encode())


def main(arguments=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m report.execute", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where the executed notebooks go (default: in place)")
    options = parser.parse_args(arguments)
    for path in options.notebooks:
        try:
            execute(path, path if options.out is None else options.out / path.name)
        except CellExecutionError as error:
            print(f"error: {path}: {clean(str(error))}", file=sys.stderr)
            return 1
        except (DeadKernelError, OSError, ValueError) as error:
            print(f"error: {path} cannot be executed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
