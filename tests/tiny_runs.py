"""Runs of a few steps in a folder of their own: what the tests of experiments/ train.

A test file gets the fixtures by `pytest_plugins = ["tiny_runs"]`. There is no assert here, so
PYTEST_DONT_REWRITE.
"""

import shutil
import sys
from dataclasses import replace

import pytest

import train_utils
from cifar10 import CIFAR10
from experiments import records, run, runs
from resnet20 import ResNetCIFAR
from training.recipe import Pruning, Recipe

FAST = Recipe(epochs=1, batch_size=32, lr=0.01)
TINY = {tiny.name: tiny for tiny in (
    runs.Run("pretrain", "the start", start_from=None, keep="last", recipe=FAST),
    runs.Run("iterative", "pruned in two steps", pruning=Pruning("global", 70.0, epochs=2),
             recipe=replace(FAST, epochs=3)),
    runs.Run("quantized", "3 bits", start_from="iterative", Nbits=3, recipe=FAST),
)}


def install(data, folder, set_attribute=setattr):
    """Have experiments/ train TINY, with the smallest ResNet, on `data`; `folder` is its ROOT.

    All but pool.ROOT, where a process of its own finds our modules.
    """
    moved = {records.ROOT: folder, records.SHIPPED: folder / "checkpoints",
             records.RETRAINED: folder / "build" / "retrained"}
    tiny = {"RUNS": dict(TINY)} | {name: moved[getattr(records, name)]
                                   for name in ("ROOT", "SHIPPED", "RETRAINED")}
    for name, module in list(sys.modules.items()):
        if name.startswith("experiments.") and name != "experiments.pool":
            for attribute in tiny.keys() & vars(module).keys():
                set_attribute(module, attribute, tiny[attribute])
    defaults = [moved.get(value, value) for value in run.train_run.__defaults__]
    set_attribute(run.train_run, "__defaults__", tuple(defaults))
    set_attribute(run.build, "__defaults__", ("cpu",))  # where `data` is
    set_attribute(run, "ResNetCIFAR", lambda num_layers, *fixed: ResNetCIFAR(8, *fixed))
    set_attribute(run, "seconds_needed", lambda names: 60.0)
    set_attribute(train_utils, "get_data", lambda device: data)


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path, small_cifar):
    """experiments/ has the runs TINY, and `tmp_path` in place of the repository."""
    monkeypatch.delenv("RETRAIN", raising=False)
    data = CIFAR10(*(tensor[:n] for tensor, n in zip(small_cifar, (64, 64, 50, 50))))
    install(data, tmp_path, monkeypatch.setattr)


@pytest.fixture(scope="session")
def trained_files(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def pretrained(tiny_runs, trained_files):
    """The tiny pretraining, trained for the first test that wants it and copied for the others."""
    if not list(trained_files.iterdir()):
        run.train_run("pretrain", trained_files)
    shutil.copy(trained_files / "pretrain.pt", records.weights_path("pretrain"))
    records.SHIPPED.mkdir()
    shutil.copy(trained_files / "pretrain.json", records.SHIPPED)


def redefine(name, recipe=(), pruning=(), **changes):
    """Replace fields of a run of TINY, and of its recipe and pruning."""
    before = runs.RUNS[name]
    runs.RUNS[name] = replace(before, recipe=replace(before.recipe, **dict(recipe)),
                              pruning=replace(before.pruning, **dict(pruning)), **changes)


def files_in(folder):
    """Return the paths of all files below `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
