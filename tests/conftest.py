"""What several test files share: real CIFAR-10, whole and in slices, small nets, and faults."""

import errno
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# No torch up here: pytest-xdist's controller loads this file before it starts its workers.

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("ours", deadline=None)  # a busy machine is no fault
settings.load_profile("ours")

LONGEST = ("hw4", "going_further", "true_false", "test_export_report", "test_model_file",
           "test_train_utils", "test_faults", "test_notebooks", "test_pool", "test_cifar10",
           "test_export", "test_inference", "test_throughput", "test_checkpoints")


def pytest_collection_modifyitems(items):
    """Put the files that take longest first, so that no worker waits for the other at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def cifar_root():
    """The data folder, wherever pytest was started."""
    import cifar10

    return cifar10.default_root().resolve()


@pytest.fixture(scope="session")
def cifar(cifar_root):
    """All of CIFAR-10, fetched on first use."""
    import cifar10

    return cifar10.load(cifar_root)


@pytest.fixture(scope="session")
def small_cifar(cifar):
    """256 real training and 200 real test images."""
    return first_of(cifar, 256, 200)


def first_of(cifar, train, test):
    """The first `train` training and `test` test images: a file that trains takes fewer."""
    sizes = (train, train, test, test)
    return type(cifar)(*(tensor[:n].clone() for tensor, n in zip(cifar, sizes)))


@pytest.fixture
def in_small_world(monkeypatch, tmp_path, small_cifar):
    """The homework's entry points take their data from a slice and write into an empty folder."""
    import train_utils

    monkeypatch.setattr(train_utils, "get_data", lambda device: small_cifar)
    monkeypatch.chdir(tmp_path)


def make_net(**fixed_point):
    """The smallest ResNet, always with the same weights."""
    import torch

    from resnet20 import ResNetCIFAR

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
    import torch

    return state.keys() == other.keys() and all(
        torch.equal(state[name], other[name]) for name in state
    )


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


class Bomb:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path="boom"):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def no_space(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*arguments, **named):
    raise KeyboardInterrupt


@pytest.fixture
def sigint_is_heard():
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
