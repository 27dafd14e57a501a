"""Execute notebooks from top to bottom, several at once, with a bar over the cells of each."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from files import atomic_write
from report.cells import ReportError, clean


def execute(paths, out=None, jobs=None):
    """Execute notebooks, each in its folder, and write them with their outputs to the folder `out`.

    out: None, in place. jobs: how many at once; None, as many as this process may use cores. The
    cores are shared out, unless OMP_NUM_THREADS is set. Uses the kernel of the running Python,
    whatever kernel a notebook names. At the first notebook that fails the others are stopped:
    raises ReportError with the notebook, the cell and its error; what was not finished is
    untouched.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count()
    jobs = min(jobs or cores, len(paths))
    env = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}

    async def all_of_them():
        free = asyncio.Semaphore(jobs)

        async def one(path):
            async with free:
                await _execute(path, path if out is None else Path(out) / path.name, env)

        await asyncio.gather(*(one(Path(path)) for path in paths))

    asyncio.run(all_of_them())


async def _execute(path, out, env):
    try:
        notebook = nbformat.read(path, as_version=4)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        with tqdm(total=cells, desc=path.name, unit="cell") as bar:
            client = NotebookClient(
                notebook, timeout=None, kernel_name="python3", record_timing=False,
                resources={"metadata": {"path": str(path.resolve().parent)}},
                extra_arguments=["--IPKernelApp.log_level=40"],
                on_cell_executed=lambda **_: bar.update())
            await client.async_execute(env=env)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        with atomic_write(out) as file:
            file.write((nbformat.writes(notebook) + "\n").encode())
    except CellExecutionError as error:
        raise ReportError(f"{path}: {clean(str(error))}") from error
    except (RuntimeError, OSError, ValueError) as error:  # a kernel that is dead, or never answered
        raise ReportError(f"{path} cannot be executed: {error}") from error


def main(arguments=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m report.execute", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where the executed notebooks go (default: in place)")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="how many at once (default: as many as there are cores)")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        execute(options.notebooks, options.out, options.jobs)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
