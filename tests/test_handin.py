"""The hand-in holds exactly what the assignment asks for, and nothing without a name."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pypdf import PdfReader

from report.handin import main

NAMES = ["hw4.ipynb", "lab1_sparse_linear.ipynb", "report.pdf"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "build"
    folder.mkdir()
    for name in ("true_false", "lab1_sparse_linear", "hw4"):
        cells = [new_markdown_cell(f"# {name} (20 points)"), new_code_cell("1", execution_count=1)]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    monkeypatch.setenv("STUDENT", "Ada Lovelace")
    monkeypatch.setenv("NETID", "al1815")
    return folder


def run(source, out, *options):
    return main(["--from", str(source), "--out", str(out), *options])


def test_three_files_and_a_word_about_zips(source, tmp_path, capsys):
    (tmp_path / "handin").mkdir()
    (tmp_path / "handin" / "report.pdf").write_bytes(b"old")
    assert run(source, tmp_path / "handin") == 0
    assert sorted(path.name for path in (tmp_path / "handin").iterdir()) == NAMES
    assert PdfReader(tmp_path / "handin" / "report.pdf").metadata.author == "Ada Lovelace"
    for name in NAMES[:2]:
        assert (tmp_path / "handin" / name).read_bytes() == (source / name).read_bytes()
    assert "zip costs 20 %" in capsys.readouterr().out


def test_a_hand_in_that_cannot_take_its_place_leaves_the_earlier_one(source, tmp_path, monkeypatch,
                                                                     capsys):
    assert run(source, tmp_path / "handin") == 0
    earlier, rename = (tmp_path / "handin" / "report.pdf").read_bytes(), Path.rename

    def failing(path, target):
        if path.name == "new":
            raise OSError("disk hiccup")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert run(source, tmp_path / "handin") == 1 and "disk hiccup" in capsys.readouterr().err
    assert (tmp_path / "handin" / "report.pdf").read_bytes() == earlier


def test_a_name_is_checked_before_anything_is_executed(source, tmp_path):
    """As `make handin` does it: with a name it goes on, and nothing is written yet."""
    assert run(source, tmp_path / "handin", "--check") == 0
    assert not (tmp_path / "handin").exists()


@pytest.mark.parametrize("variable", ["STUDENT", "NETID"])
@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("options", [[], ["--check"]])
def test_without_a_name_it_refuses(source, tmp_path, monkeypatch, capsys, variable, value, options):
    monkeypatch.setenv(variable, value)
    assert run(source, tmp_path / "handin", *options) == 1
    assert "make handin STUDENT=" in capsys.readouterr().err
    assert not (tmp_path / "handin").exists()


def test_a_folder_of_something_else_is_left_alone(source, tmp_path, capsys):
    """As the repository is, or a desktop."""
    (tmp_path / "desktop" / "letters").mkdir(parents=True)
    (tmp_path / "desktop" / "report.pdf").write_bytes(b"mine")
    assert run(source, tmp_path / "desktop") == 1
    assert "desktop holds letters, which is not of a hand-in" in capsys.readouterr().err
    assert (tmp_path / "desktop" / "letters").is_dir()
    assert (tmp_path / "desktop" / "report.pdf").read_bytes() == b"mine"


def test_what_a_finder_leaves_in_an_earlier_hand_in_is_no_obstacle(source, tmp_path):
    (tmp_path / "handin").mkdir()
    for name in ("report.pdf", ".DS_Store"):
        (tmp_path / "handin" / name).write_bytes(b"")
    assert run(source, tmp_path / "handin") == 0
    assert sorted(path.name for path in (tmp_path / "handin").iterdir()) == NAMES


def test_a_notebook_that_was_not_executed_keeps_the_old_hand_in(source, tmp_path, capsys):
    assert run(source, tmp_path / "handin") == 0
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), source / "hw4.ipynb")
    before = (tmp_path / "handin" / "hw4.ipynb").read_bytes()
    assert run(source, tmp_path / "handin") == 1
    assert "hw4.ipynb, cell 1 was not executed" in capsys.readouterr().err
    assert (tmp_path / "handin" / "hw4.ipynb").read_bytes() == before


def test_ctrl_c_between_the_renames_keeps_the_old_hand_in(source, tmp_path, monkeypatch):
    assert run(source, tmp_path / "handin") == 0
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "handin")
    assert sorted(path.name for path in (tmp_path / "handin").iterdir()) == NAMES
