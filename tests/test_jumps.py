"""The run that is tested twice is trained as it would be, and its second test is what it says."""

import json

import pytest

import train_utils
from benchmarks import jumps
from experiments import run
from experiments.controls import reestimate_statistics
from experiments.runs import get
from tiny_runs import files_in, redefine

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def compare(pretrained, monkeypatch, tmp_path):
    """jumps.compare of a run of two epochs, on 64 images, trained into tmp_path / "again"."""
    redefine("quantized", start_from="pretrain", recipe={"epochs": 2})
    monkeypatch.setattr(jumps, "RUN", "quantized")
    monkeypatch.setattr(jumps, "INTO", tmp_path / "again")
    return lambda: jumps.compare("quantized", 64)


def test_to_test_twice_does_not_disturb_the_training(compare):
    found = compare()
    history = run.train_run("quantized")["history"]
    assert found["running"] == [entry["test_accuracy"] for entry in history]
    assert len(found["anew"]) == 2 and found["anew"] != found["running"]


def test_the_second_test_is_that_of_the_net_with_statistics_anew(compare):
    found, data = compare(), train_utils.get_data("cpu")
    net = run.load_or_train("pretrain", run.build("quantized"))[0]
    train_utils.fit(net, get("quantized").recipe, data)
    anew = reestimate_statistics(net, data.train_images[:64])
    assert found["anew"][-1] == train_utils.evaluate(anew, data)[1]


def test_the_command_goes_on_where_it_was_interrupted(compare, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    expected = compare()
    evaluate, tests = train_utils.evaluate, iter([False, False, True])

    def stopped(*arguments):  # while the second epoch is tested
        if next(tests):
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train_utils, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        jumps.main(["--images", "64", "--out", str(out)])
    monkeypatch.setattr(train_utils, "evaluate", evaluate)
    assert jumps.main(["--images", "64", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"run": "quantized", "images": 64} | expected
    assert files_in(tmp_path / "again") == {"quantized.pt", "quantized.json"}


def test_a_state_is_not_gone_on_from_with_other_images(compare, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_weights", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare()
    with pytest.raises(ValueError, match="another config"):
        jumps.compare("quantized", 63)


@pytest.mark.parametrize("images", [0, 50_001])
def test_images_that_are_not_there_are_refused(images, capsys):
    with pytest.raises(SystemExit):
        jumps.main(["--images", str(images)])
    assert f"--images must be from 1 to 50000, got {images}" in capsys.readouterr().err
