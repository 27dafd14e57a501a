"""Real CIFAR-10 for the tests: whole, and a slice small enough to train on in seconds."""

import os
from pathlib import Path

import pytest

import cifar10

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
