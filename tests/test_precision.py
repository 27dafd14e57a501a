"""bfloat16 against float32: what README says is what was measured, and the comparison can fail."""

import json

import pytest

from benchmarks import precision
from cifar10 import CIFAR10
from conftest import REPOSITORY


def test_the_readme_shows_what_was_measured():
    results = json.loads(precision.RESULTS.read_text())
    assert precision.sentence(results) in (REPOSITORY / "README.md").read_text()
    a, b = (results[name]["accuracy"] for name in ("float32", "bfloat16"))
    assert b > a - 2 * results["standard_error"]


@pytest.mark.parametrize("accuracy, status", [(0.80, 0), (0.79, 0), (0.70, 1)])
def test_an_accuracy_lower_beyond_two_standard_errors_is_a_failure(monkeypatch, tmp_path, capsys,
                                                                   accuracy, status):
    found = {"float32": {"loss": 0.5, "accuracy": 0.8}, "bfloat16": {"loss": 0.5,
                                                                     "accuracy": accuracy}}
    monkeypatch.setattr(precision, "compare", lambda *arguments: found)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_is_right", lambda net: True)
    assert precision.main(["--out", str(tmp_path / "p.json")]) == status
    assert f"{100 * accuracy:.2f} % on 5,000 held-out images" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())
    expected = ((0.8 * 0.2 + accuracy * (1 - accuracy)) / 5000) ** 0.5
    assert written["standard_error"] == pytest.approx(expected)


def test_both_precisions_are_trained_on_the_same_images(monkeypatch, small_cifar):
    data = CIFAR10(*(tensor[:96] for tensor in small_cifar))
    monkeypatch.setattr(precision.train_utils, "get_data", lambda device: data)
    found = precision.compare(1, 32)
    assert found.keys() == {"float32", "bfloat16"}
    assert found["float32"]["loss"] == pytest.approx(found["bfloat16"]["loss"], abs=0.2)
    assert found["float32"]["loss"] != found["bfloat16"]["loss"]


def test_a_machine_without_bfloat16_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert precision.main(["--out", str(tmp_path / "p.json")]) == 0
    assert "does not multiply bfloat16" in capsys.readouterr().out
    assert not (tmp_path / "p.json").exists()
