"""bfloat16 against float32: README says what was measured, and trainings differ in that alone."""

import json

import pytest

from benchmarks import precision
from cifar10 import CIFAR10
from conftest import REPOSITORY


def test_the_readme_shows_what_was_measured():
    results = json.loads(precision.RESULTS.read_text())
    assert precision.sentence(results) in (REPOSITORY / "README.md").read_text()
    mean, error = precision.difference(results)
    assert mean > -2 * error and len(results["float32"]) == len(results["bfloat16"]) >= 3


def test_it_is_written_as_one_sentence(monkeypatch, tmp_path, capsys):
    """The gaps differ by a standard deviation of one point; by the root of three that is 0.58."""
    found = {"float32": [0.80, 0.80, 0.80], "bfloat16": [0.78, 0.80, 0.79]}
    monkeypatch.setattr(precision, "compare", lambda *arguments: found)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_is_right", lambda net: True)
    readme = tmp_path / "README.md"
    readme.write_text("a\n" + "\n".join(precision.SECTION) + "\nb\n")
    precision.main(["--out", str(tmp_path / "p.json"), "--write", str(readme)])
    printed = capsys.readouterr().out
    assert readme.read_text().count(precision.sentence(json.loads(
        (tmp_path / "p.json").read_text()))) == 1
    assert "78.00, 80.00, 79.00 % on 5,000 held-out images" in printed
    assert "-1.00 points, with a standard error of 0.58" in printed
    assert json.loads((tmp_path / "p.json").read_text()) == found | {"epochs": 3, "held_out": 5000}


def test_both_precisions_are_trained_alike_with_each_seed(monkeypatch, small_cifar):
    data, seen = CIFAR10(*(tensor[:96] for tensor in small_cifar)), []
    fit = precision.train_utils.fit

    def noted(net, recipe, data, seed, execution, journal):
        seen.append((seed, execution.bf16, net.head_conv[0].weight.detach().clone()))
        return fit(net, recipe, data, seed=seed, execution=execution, journal=journal)

    monkeypatch.setattr(precision.train_utils, "get_data", lambda device: data)
    monkeypatch.setattr(precision.train_utils, "fit", noted)
    monkeypatch.setattr(precision, "EPOCHS", 1)
    monkeypatch.setattr(precision, "HELD_OUT", 32)
    found = precision.compare(2)
    assert [len(found[name]) for name in ("float32", "bfloat16")] == [2, 2]
    assert [(seed, bf16) for seed, bf16, _ in seen] == [(0, False), (0, True), (1, False),
                                                        (1, True)]
    weights = [weight for *_, weight in seen]
    assert (weights[0] == weights[1]).all() and (weights[2] == weights[3]).all()
    assert (weights[0] != weights[2]).any()


def test_a_machine_without_bfloat16_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    precision.main(["--out", str(tmp_path / "p.json")])
    assert "does not multiply bfloat16" in capsys.readouterr().out
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("seeds", [0, 1])
def test_too_few_seeds_for_a_standard_error_are_refused(seeds, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--seeds", str(seeds)])
    assert f"--seeds must be at least 2, got {seeds}" in capsys.readouterr().err
