"""Real CIFAR-10 for the tests: whole, and a slice small enough to train on in seconds."""

import os
from pathlib import Path

import pytest
import torch

import cifar10
import train_utils
from resnet20 import ResNetCIFAR

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def cifar_root():
    """The data folder, wherever pytest was started."""
    return Path(os.environ.get("CIFAR10_ROOT") or REPOSITORY / "data").resolve()


@pytest.fixture(scope="session")
def cifar(cifar_root):
    """All of CIFAR-10, fetched on first use."""
    return cifar10.load(cifar_root)


@pytest.fixture(scope="session")
def small_cifar(cifar):
    """256 real training and 200 real test images."""
    return cifar10.CIFAR10(*(tensor[:n].clone() for tensor, n in zip(cifar, (256, 256, 200, 200))))


@pytest.fixture
def in_small_world(monkeypatch, tmp_path, small_cifar):
    """The homework's entry points take their data from a slice and write into an empty folder."""
    monkeypatch.setattr(train_utils, "get_data", lambda device: small_cifar)
    monkeypatch.setattr(train_utils, "_tested", {})
    monkeypatch.chdir(tmp_path)


def make_net(**fixed_point):
    """The smallest ResNet, always with the same weights."""
    torch.manual_seed(0)
    return ResNetCIFAR(num_layers=8, **fixed_point)


@pytest.fixture
def net():
    return make_net()


def state_of(net):
    """A copy of the net's state dict."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(state, other):
    """Whether two state dicts are equal bit for bit."""
    return state.keys() == other.keys() and all(
        torch.equal(state[name], other[name]) for name in state
    )


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
