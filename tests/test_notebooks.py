"""The stored notebooks are whole and clean, and nbval goes red when a stored result is altered."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from experiments.runs import RUNS

ROOT = Path(__file__).resolve().parent.parent
HOMEWORK = ["true_false.ipynb", "lab1_sparse_linear.ipynb", "hw4.ipynb"]
NOTEBOOKS = [*HOMEWORK, "going_further.ipynb"]
POINTS = {"true_false.ipynb": 20, "lab1_sparse_linear.ipynb": 30, "hw4.ipynb": 50}


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return read(request.param)


def test_executed_once_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_no_stderr_no_skipped_cell(notebook):
    for cell in code_cells(notebook):
        assert "nbval-skip" not in tags(cell) and "NBVAL" not in cell.source
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
    """A cell whose output nbval does not compare must check its claim itself.

    Blocks 3 to 5 are the assignment's: what follows them checks. Lab 1's answers are compared in
    test_lab1.
    """
    for cell in code_cells(notebook):
        shown_only = (cell.id in ("block-3", "block-4", "block-5")
                      or cell.source == "answer = open_answer()"
                      or cell.source.endswith(" = figures.open_place()"))
        if "nbval-ignore-output" in tags(cell) and not shown_only:
            checked = "assert " in cell.source or "figures.plot" in cell.source
            assert checked or "measured(" in cell.source or "results." in cell.source, cell.source


def test_text_and_pictures_name_no_run_that_is_not_there(notebook):
    for cell in notebook.cells:
        words = cell.source if cell.cell_type == "markdown" else json.dumps(cell.metadata)
        named = re.findall(r"\blab\d[a-e]_\w+", words)
        assert all(name in RUNS for name in named), named


def test_cells_whose_code_is_shown_are_short(notebook):
    for cell in code_cells(notebook):
        hidden = {"remove-cell", "remove-input"} & set(tags(cell))
        assert len(cell.source.splitlines()) <= (45 if hidden else 28), cell.source


@pytest.mark.parametrize("name", HOMEWORK)
def test_points_of_the_questions_add_up_to_the_sections(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    sections = [int(n) for n in re.findall(r"^# .*\((\d+) points\)$", text, flags=re.M)]
    questions = [int(n) for n in re.findall(r"^## .*\((\d+) points\)$", text, flags=re.M)]
    assert sum(sections) == sum(questions) == POINTS[name]


def test_blocks_1_to_5_keep_their_roles():
    sources = [cell.source for cell in code_cells(read("hw4.ipynb"))]
    at = [next(i for i, source in enumerate(sources) if f"Block {n}" in source)
          for n in range(1, 6)]
    assert at == sorted(at)
    assert "ResNetCIFAR(num_layers=20" in sources[at[1]] and "test(net)" in sources[at[2]]
    block_4 = sources[at[3]].splitlines()
    assert block_4[0].startswith("Nbits = 4")
    assert block_4[1] == "net = ResNetCIFAR(num_layers=20, Nbits=Nbits)"


def test_each_question_of_the_labs_is_answered_in_numbers_before_its_code():
    """The answer's Markdown comes from values, and the code that was asked for comes after it."""
    cells = read("hw4.ipynb").cells
    starts = [i for i, cell in enumerate(cells) if cell.source.startswith("## (")]
    assert len(starts) == 10
    for start, end in zip(starts, [*starts[1:], len(cells)]):
        question = [c for c in cells[start:end] if c.cell_type == "code"]
        shown = [[o.get("data", {}).get("text/markdown", "") for o in c.outputs] for c in question]
        answers = [i for i, texts in enumerate(shown)
                   if texts and texts[0].startswith("**Answer.**")]
        sources = [i for i, c in enumerate(question) if c.source.startswith("show_source(")]
        assert len(answers) == 1, cells[start].source
        [text] = [text for texts in shown for text in texts if text.startswith("**Answer.**")]
        sentences = re.findall(r"[.!](?= |$)", text.replace("**", "").removeprefix("Answer."))
        assert 1 <= len(sentences) <= 2, text
        assert "f\"" in question[answers[0]].source  # made from values
        assert not sources or answers[0] < sources[0], cells[start].source
        shown_code = [i for i, c in enumerate(question)
                      if not {"remove-cell", "remove-input"} & set(tags(c))]
        assert not shown_code or answers[0] < shown_code[0], cells[start].source


def test_verdicts_come_first_with_a_number_each():
    cells = read("true_false.ipynb").cells
    first = next(cell for cell in cells if cell.id == "verdicts")
    rows = first.outputs[0].data["text/markdown"].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [f"1.{n}" for n in range(1, 11)]
    assert [row.split("|")[2].strip() for row in rows] == [
        "True", "False", "False", "False", "False", "False", "True", "True", "False", "True"]
    assert all(re.search(r"\d", row.split("|")[4]) for row in rows)


# ---------------------------------------------------------------- nbval can fail


def shipped_part():
    """The first cells of Lab 1, up to the numbers that plain gradient descent ends with."""
    notebook = read("lab1_sparse_linear.ipynb")
    last = next(i for i, cell in enumerate(notebook.cells)
                if "$W_{200}$" in cell.source and cell.cell_type == "code")
    notebook.cells = notebook.cells[:last + 1]
    return notebook


def alter_one_digit(notebook):
    """The last digit of the last number that the notebook shows."""
    shown = notebook.cells[-1].outputs[-1].data
    shown["text/markdown"] = re.sub(r"(\d)(?=\D*$)", lambda digit: str(9 - int(digit[1])),
                                    shown["text/markdown"])


def alter_a_helper(notebook):
    cell = next(cell for cell in notebook.cells if "def gradient" in cell.source)
    cell.source = cell.source.replace("return 2 * X.T", "return 2.0001 * X.T")


def alter_shown_source(notebook):
    shown = notebook.cells[1].outputs[0].data
    shown["text/markdown"] = shown["text/markdown"].replace("self.linear.bias", "self.linear.bais")


def with_shown_source():
    """An executed notebook whose second cell shows source of ours."""
    sources = {"path": f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nprint(f'{{2 / 3:.6f}}')",
               "shown": "from FP_layers import FP_Linear\nfrom report.figures import show_source\n"
                        "show_source(FP_Linear._compute)"}
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source, id=name) for name, source in sources.items()])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3",
                                       "language": "python"}
    return NotebookClient(notebook, timeout=120).execute()


def run_nbval(folder):
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p",
               "no:cacheprovider", "--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg"),
               "-c", "/dev/null", "--rootdir", str(folder), "-rA", str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_nbval_fails_the_cells_of_a_copy_that_are_altered_and_no_other(tmp_path):
    """All copies in one run."""
    expected = {}
    for make, alter, failing in ((shipped_part, alter_one_digit, {"b-check"}),
                                 (shipped_part, alter_a_helper, {"a-check", "b-check"}),
                                 (with_shown_source, alter_shown_source, {"shown"})):
        notebook = make()
        before = copy.deepcopy(notebook)
        alter(notebook)
        assert notebook != before
        nbformat.write(notebook, tmp_path / f"{alter.__name__}.ipynb")
        expected |= {(alter.__name__, number): "FAILED" if cell.id in failing else "PASSED"
                     for number, cell in enumerate(code_cells(notebook))}
    result = run_nbval(tmp_path)
    found = {(name, int(number)): outcome for outcome, name, number in re.findall(
        r"^(PASSED|FAILED|ERROR) (\w+)\.ipynb::Cell (\d+)", result.stdout, flags=re.M)}
    assert result.returncode == 1 and found == expected, result.stdout
