"""The run that is tested twice is trained as it would be, and its second test is what it says."""

import json

import pytest

import train_utils
from benchmarks import jumps
from experiments import run
from experiments.controls import reestimate_statistics
from experiments.runs import get
from tiny_runs import redefine

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def two_epochs(pretrained, monkeypatch):
    redefine("quantized", start_from="pretrain", recipe={"epochs": 2})
    monkeypatch.setattr(jumps, "RUN", "quantized")


def test_to_test_twice_does_not_disturb_the_training(two_epochs):
    found = jumps.compare("quantized", 64)
    history = run.train_run("quantized")["history"]
    assert found["running"] == [entry["test_accuracy"] for entry in history]
    assert len(found["anew"]) == 2 and found["anew"] != found["running"]


def test_the_second_test_is_that_of_the_net_with_statistics_anew(two_epochs):
    found, data = jumps.compare("quantized", 64), train_utils.get_data("cpu")
    net = run.load_or_train("pretrain", run.build("quantized"))[0]
    train_utils.fit(net, get("quantized").recipe, data)
    anew = reestimate_statistics(net, data.train_images[:64])
    assert found["anew"][-1] == train_utils.evaluate(anew, data)[1]


def test_the_command_goes_on_where_it_was_interrupted(two_epochs, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    expected = jumps.compare("quantized", 64)
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
    assert [path.name for path in tmp_path.glob("found*")] == ["found.json"]
