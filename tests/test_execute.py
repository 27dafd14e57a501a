"""Notebooks are executed by the environment's own kernel, and a failing cell is named."""

import nbformat
import pytest

from report.execute import execute, main


def write(folder, *sources, kernel="python3"):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, folder / "a.ipynb")
    return folder / "a.ipynb"


def test_it_executes_in_the_notebooks_folder_whatever_kernel_it_names(tmp_path):
    path = write(tmp_path, "import os, sys; print(os.getcwd())", "x = 1", kernel="ece661")
    (tmp_path / "out").mkdir()
    execute(path, tmp_path / "out" / "a.ipynb")
    done = nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4)
    assert done.cells[0].outputs[0].text.strip() == str(tmp_path)
    assert [cell.execution_count for cell in done.cells] == [1, 2]
    assert all("execution" not in cell.metadata for cell in done.cells)


@pytest.mark.parametrize("sources, complaint", [(["x = 1", "1 / 0"], "ZeroDivisionError"),
                                                (["raise SystemError('so')"], "SystemError: so")])
def test_a_failing_cell_is_shown_with_its_error_and_nothing_is_written(tmp_path, capsys, sources,
                                                                       complaint):
    path = write(tmp_path, *sources)
    before = path.read_bytes()
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert sources[-1] in error and complaint in error and str(path) in error
    assert path.read_bytes() == before


def test_a_missing_notebook_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "absent.ipynb")]) == 1
    assert "absent.ipynb cannot be executed" in capsys.readouterr().err
