"""The command line of experiments/: list, run, and what it says when something is wrong."""

import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from experiments import __main__ as commands
from experiments import pool, records
from tiny_runs import TINY, files_in, redefine

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def trained(pretrained, monkeypatch):
    """The names of what is trained, which no longer takes time; only the pretraining really is."""
    names, record = [], records.read_record("pretrain")

    def train_run(name, folder, as_recorded):
        names.append(name + " as recorded" * as_recorded)
        return record

    monkeypatch.setattr(pool, "train_run", train_run)
    return names


# ---------------------------------------------------------------- list


def test_list_names_every_run_with_its_result(pretrained, capsys):
    assert commands.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = records.read_record("pretrain")["test_accuracy"]
    assert [line.split()[0] for line in lines] == list(TINY)
    assert f"{100 * accuracy:.2f} %" in lines[0] and "not trained" in lines[1]


def test_list_reports_a_record_that_does_not_fit(pretrained, capsys):
    """And lists the others."""
    redefine("pretrain", recipe={"lr": 0.5})
    assert commands.main(["list"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "another config" in err
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["pretrain", "damaged"], ["iterative", "not"], ["quantized", "not"]]


def test_a_reader_that_closes_the_list_is_no_error():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "experiments", "list"],
        cwd=REPOSITORY,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert process.stderr == b"" and process.returncode == 0


# ---------------------------------------------------------------- run


def test_force_takes_one_run(trained, capsys):
    for names in (["pretrain", "iterative"], ["all"], ["pretrain", "--seeds", "2"]):
        assert commands.main(["run", *names, "--force"]) == 1
        assert "error: --force takes one run, got" in capsys.readouterr().err
    assert trained == []


def test_run_trains_what_is_not_trained_and_force_trains_it_again(trained, capsys):
    assert commands.main(["run", "all", "--jobs", "1"]) == 0
    assert trained == ["iterative", "quantized"]
    assert "pretrain: trained already" in capsys.readouterr().out
    assert commands.main(["run", "pretrain"]) == 0 and trained[2:] == []
    assert commands.main(["run", "pretrain", "--force"]) == 0 and trained[2:] == ["pretrain"]


def test_run_all_with_seeds_trains_each_chain_in_order(trained, capsys):
    assert commands.main(["run", "all", "--seeds", "2", "--jobs", "1"]) == 0
    assert trained == ["iterative", "quantized", "pretrain@1", "iterative@1", "quantized@1"]
    assert capsys.readouterr().out.count("at most about") == 1


def test_a_child_of_several_runs_does_not_announce_its_own_again(trained, capsys, monkeypatch):
    monkeypatch.setenv(pool.CHILD, "1")
    assert commands.main(["run", "iterative", "--jobs", "1"]) == 0
    assert trained == ["iterative"] and "at most about" not in capsys.readouterr().out


def test_a_run_named_twice_is_trained_once(trained):
    assert commands.main(["run", "iterative", "iterative", "--jobs", "1"]) == 0
    assert trained == ["iterative"]


def test_run_as_recorded_says_so_to_each(trained):
    assert commands.main(["run", "iterative", "--as-recorded"]) == 0
    assert trained == ["iterative as recorded"]


def test_what_a_run_reached_is_printed(trained, capsys):
    record = records.read_record("pretrain")
    commands.main(["run", "iterative"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"best {100 * record['best']['test_accuracy']:.2f} % in epoch 1" in last
    assert f"last {100 * record['last']['test_accuracy']:.2f} %" in last


def test_run_into_another_folder_trains_from_nothing_and_goes_on_there(
    pretrained, tmp_path, capsys
):
    shipped = files_in(tmp_path)
    into = ["--jobs", "1", "--into", str(tmp_path / "again")]
    assert (
        commands.main(["run", "pretrain", *into]) == 0
        and commands.main(["run", "pretrain", "iterative", *into]) == 0
    )
    assert "pretrain: trained already" in capsys.readouterr().out
    expected = {
        f"again/{name}.{end}" for name in ("pretrain", "iterative") for end in ("pt", "json")
    }
    assert files_in(tmp_path) - shipped == expected
    again = records.read_record("iterative", tmp_path / "again")
    assert (
        again["start_from_sha256"]
        == records.read_record("pretrain", tmp_path / "again")["weights_sha256"]
    )


def test_seeds_of_what_is_shipped_leave_its_records_as_they_are(trained):
    """The ablation has one seed: its weights are not shipped, and its parents' would be needed."""
    redefine("iterative", held_out=28)
    redefine("quantized", start_from="iterative", held_out=28)
    assert commands.main(["run", "all", "--seeds", "2", "--jobs", "1"]) == 0
    assert trained == ["iterative", "quantized", "pretrain@1"]


def test_into_the_shipped_folder_is_into_it_however_it_is_written(tiny_runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["run", "pretrain", "--into", "checkpoints"]) == 0
    assert files_in(tmp_path) == {"pretrained_model.pt", "checkpoints/pretrain.json"}


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "names, complaint",
    [
        (
            ["lab2f"],
            "error: name must be one of pretrain, iterative, quantized (or NAME@SEED, seed >= 1), "
            "got 'lab2f'",
        ),
        (
            ["quantized"],
            "error: quantized needs iterative, which is not trained yet: "
            "python -m experiments run iterative",
        ),
        (
            ["pretrain@1", "--seeds", "2"],
            "error: --seeds must be 1 where a name has a seed, got 2",
        ),
        (
            ["pretrain", "--as-recorded"],
            "error: pretrain has no record to run as: it is not trained yet: "
            "python -m experiments run pretrain",
        ),
    ],
)
def test_run_reports_an_error_in_one_line(tiny_runs, capsys, names, complaint):
    assert commands.main(["run", *names]) == 1
    assert capsys.readouterr().err.splitlines() == [complaint]


def test_ctrl_c_says_how_to_go_on(tiny_runs, monkeypatch, capsys):
    def interrupted(name, folder, as_recorded):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "train_run", interrupted)
    assert commands.main(["run", "pretrain"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "two"])
def test_counts_out_of_range_are_refused_before_any_training(trained, capsys, option, number):
    with pytest.raises(SystemExit):
        commands.main(["run", "all", option, number])
    assert f"{option}: must be an integer >= 1, got '{number}'" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk"]])
def test_bad_usage_is_refused(tiny_runs, arguments):
    with pytest.raises(SystemExit) as caught:
        commands.main(arguments)
    assert caught.value.code == 2
