"""The stored notebooks are whole and clean, and nbval goes red when a stored result or a shown
source is altered.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ["true_false.ipynb", "lab1_sparse_linear.ipynb", "hw4.ipynb"]
POINTS = {"true_false.ipynb": 20, "lab1_sparse_linear.ipynb": 30, "hw4.ipynb": 50}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def test_executed_once_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_no_stderr_no_skipped_cell(notebook):
    for cell in code_cells(notebook):
        assert "NBVAL_SKIP" not in cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"


def test_no_absolute_path(notebook):
    """Outside its pictures, a notebook names no place on the machine that executed it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook)
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|var|Users|mnt|opt)/", text)


def test_ignored_output_always_comes_with_an_assert_or_a_figure(notebook):
    """A cell whose output nbval does not compare must check its claim itself."""
    for cell in code_cells(notebook):
        if "NBVAL_IGNORE_OUTPUT" in cell.source:
            checked = (
                "assert " in cell.source
                or "figures.plot" in cell.source
                or cell.source.startswith("Nbits")
            )
            assert checked, cell.source


def test_code_cells_are_short(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 18, cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_points_of_the_questions_add_up_to_the_sections(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    sections = [int(n) for n in re.findall(r"^# .*\((\d+) points\)$", text, flags=re.M)]
    questions = [int(n) for n in re.findall(r"^## .*\((\d+) points\)$", text, flags=re.M)]
    assert sum(sections) == sum(questions) == POINTS[name]


def test_blocks_4_and_5_keep_their_roles():
    sources = [cell.source for cell in code_cells(nbformat.read(ROOT / "hw4.ipynb", as_version=4))]
    block_4 = next(source for source in sources if "Block 4" in source).splitlines()
    assert block_4[0].startswith("Nbits = 4")
    assert block_4[1] == "net = ResNetCIFAR(num_layers=20, Nbits=Nbits)"
    assert any("Block 5" in source for source in sources)


# ---------------------------------------------------------------- nbval can fail


@pytest.fixture(scope="module")
def shipped_part():
    """The first cells of the shipped Lab 1, up to the numbers that plain gradient descent ends
    with.
    """
    notebook = nbformat.read(ROOT / "lab1_sparse_linear.ipynb", as_version=4)
    last = next(
        i
        for i, cell in enumerate(notebook.cells)
        if "$W_{200}$" in cell.source and cell.cell_type == "code"
    )
    notebook.cells = notebook.cells[: last + 1]
    return notebook


def alter_nothing(notebook, folder):
    pass


def alter_one_digit(notebook, folder):
    """The last digit of the last number that the notebook shows."""
    shown = notebook.cells[-1].outputs[-1].data
    shown["text/markdown"] = re.sub(
        r"(\d)(?=\D*$)", lambda digit: str(9 - int(digit[1])), shown["text/markdown"]
    )


def alter_a_helper_in_the_notebook(notebook, folder):
    cell = next(cell for cell in notebook.cells if "def gradient" in cell.source)
    cell.source = cell.source.replace("return 2 * X.T", "return 2.0001 * X.T")


def alter_a_helper_in_a_module(notebook, folder):
    source = (folder / "figures.py").read_text()
    (folder / "figures.py").write_text(source.replace('[":--"] + ["--:"]', '[":-:"] + ["--:"]'))


@pytest.mark.parametrize("alter", [
    alter_nothing, alter_one_digit, alter_a_helper_in_the_notebook, alter_a_helper_in_a_module,
])
def test_nbval_on_a_copy_of_a_shipped_notebook(tmp_path, shipped_part, alter):
    notebook = copy.deepcopy(shipped_part)
    shutil.copy(ROOT / "figures.py", tmp_path)
    alter(notebook, tmp_path)
    changed = (
        notebook != shipped_part
        or (tmp_path / "figures.py").read_bytes() != (ROOT / "figures.py").read_bytes()
    )
    result = run_nbval(tmp_path, notebook)
    assert (result.returncode == 1) == changed == (alter is not alter_nothing), result.stdout
    if alter is alter_one_digit:
        assert f"1 failed, {len(code_cells(notebook)) - 1} passed" in result.stdout, result.stdout


def run_nbval(folder, notebook):
    nbformat.write(notebook, folder / "copy.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        "--nbval-sanitize-with",
        str(ROOT / "tests" / "nbval_sanitize.cfg"),
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
        "copy.ipynb",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def small_notebook():
    """An executed notebook of two cells that show an exact number and a helper's source."""
    sources = [
        "import sys\nsys.path[:0] = [ROOT]\nprint(f'{2 / 3:.6f}')".replace("ROOT", repr(str(ROOT))),
        "from FP_layers import FP_Linear\nfrom figures import show_source\nshow_source(FP_Linear.forward)",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources]
    )
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    from nbclient import NotebookClient

    return NotebookClient(notebook, timeout=120).execute()


def test_nbval_fails_a_copy_whose_shown_source_is_altered(tmp_path, small_notebook):
    shown = small_notebook.cells[1].outputs[0].data
    shown["text/markdown"] = shown["text/markdown"].replace("self.linear.bias", "self.linear.bais")
    result = run_nbval(tmp_path, small_notebook)
    assert result.returncode == 1 and "1 failed, 1 passed" in result.stdout, result.stdout
