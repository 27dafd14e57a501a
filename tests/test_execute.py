"""Notebooks are executed by the environment's own kernel, and a failing cell is named."""

import os
import time

import nbformat
import pytest

from report.execute import execute, main


def write(folder, *sources, kernel="python3", name="a.ipynb"):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, folder / name)
    return folder / name


def test_it_executes_in_the_notebooks_folder_whatever_kernel_it_names(tmp_path):
    path = write(tmp_path, "import os, sys; print(os.getcwd())", "x = 1", kernel="ece661")
    (tmp_path / "out").mkdir()
    execute([path], tmp_path / "out")
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


def test_a_kernel_that_never_answers_is_an_error_of_ours(tmp_path, monkeypatch, capsys):
    async def never(client, env):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr("report.execute.NotebookClient.async_execute", never)
    assert main([str(write(tmp_path, "1"))]) == 1
    error = capsys.readouterr().err
    assert "cannot be executed: Kernel didn't respond" in error and "Traceback" not in error


def outputs(path):
    return [cell.outputs[0].text.strip() for cell in nbformat.read(path, as_version=4).cells]


MEETING = """
import os, time
open('here {me}', 'w').close()
deadline = time.monotonic() + 60
while not os.path.exists('here {other}') and time.monotonic() < deadline: time.sleep(0.05)
print(os.path.exists('here {other}'), os.environ['OMP_NUM_THREADS'])
"""


def test_several_are_executed_at_once(tmp_path, monkeypatch):
    paths = [write(tmp_path, MEETING.format(me=me, other=other), name=f"{me}.ipynb")
             for me, other in ("ab", "ba")]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    execute(paths, jobs=2)
    assert [outputs(path) for path in paths] == [["True 3"]] * 2


@pytest.mark.parametrize("cores, set_to, threads", [(2, None, "1"), (9, None, "4"), (9, "3", "3")])
def test_those_at_once_share_the_cores(tmp_path, monkeypatch, cores, set_to, threads):
    seen = []

    async def noted(client, env):
        seen.append(env["OMP_NUM_THREADS"])

    monkeypatch.setattr("report.execute.NotebookClient.async_execute", noted)
    monkeypatch.setattr("report.execute.os.sched_getaffinity", lambda pid: range(cores),
                        raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_to:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    execute([write(tmp_path, "1", name=f"{name}.ipynb") for name in "ab"])
    assert seen == [threads] * 2


def test_one_after_the_other_if_so_told(tmp_path):
    show = """
import os, time
print(os.path.exists('a is done'))
time.sleep(1)
open('{} is done', 'w').close()
"""
    paths = [write(tmp_path, show.format(name), name=f"{name}.ipynb") for name in "ab"]
    assert main([*map(str, paths), "--jobs", "1"]) == 0
    assert [outputs(path) for path in paths] == [["False"], ["True"]]


def test_the_first_that_fails_stops_the_others(tmp_path, capsys):
    wait = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(300)"
    fail = "import os, time\nwhile not os.path.exists('pid'): time.sleep(0.05)\n1 / 0"
    paths = [write(tmp_path, wait), write(tmp_path, fail, name="b.ipynb")]
    before = [path.read_bytes() for path in paths]
    start = time.monotonic()
    assert main([*map(str, paths), "--jobs", "2"]) == 1
    assert time.monotonic() - start < 60
    assert f"error: {paths[1]}: " in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_jobs_is_at_least_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(write(tmp_path)), "--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
