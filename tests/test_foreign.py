"""What people bring: checkpoints of other hands, narrower nets, data folders in other places."""

import copy
import importlib.util

import pytest
import torch

import cifar10
import train_utils
from conftest import REPOSITORY, first_of, same, state_of
from resnet20 import ResNetCIFAR
from training.checkpoints import load_weights


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ResNetCIFAR(num_layers=8)
    torch.nn.init.normal_(net.head_conv[1].running_mean)
    return net


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("change", [
    prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."),
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model_state_dict": state, "epoch": 3},
    lambda state: {"model": prefixed("module.")(state), "optimizer": {"lr": 0.1}},
    lambda state: {"net": state, "acc": 91.5},
    lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
    lambda state: {name: tensor.double() for name, tensor in state.items()},
], ids=["module", "compiled", "both", "state_dict", "model_state_dict", "model", "net",
        "old BatchNorm", "float64"])
def test_the_same_architecture_loads_however_it_was_saved(net, tmp_path, change):
    torch.save(change(net.state_dict()), tmp_path / "net.pt")
    other = load_weights(ResNetCIFAR(num_layers=8), tmp_path / "net.pt")
    for name, tensor in other.state_dict().items():
        expected = net.state_dict()[name]
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype


@pytest.mark.parametrize("object_, complaint", [
    (torch.nn.Linear(2, 2), "it holds a torch.nn.modules.linear.Linear, not tensors alone"),
    ([1, 2], "it holds a list, not a state dict"), (torch.ones(3), "it holds a Tensor"),
    ({"state_dict": {"a": torch.ones(1)}}, "another architecture"),
    ({}, "another architecture"), ({0: torch.ones(1)}, "another architecture"),
])
def test_what_is_no_state_dict_is_named_for_what_it_is(net, tmp_path, object_, complaint):
    torch.save(object_, tmp_path / "net.pt")
    before = state_of(net)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_weights(net, tmp_path / "net.pt")
    assert "weights_only" not in str(caught.value)  # torch's advice, an option that we do not have
    assert same(net.state_dict(), before)


@pytest.fixture(scope="module")
def float_net():
    return load_weights(ResNetCIFAR(num_layers=20), REPOSITORY / "pretrained_model.pt")


@pytest.fixture(scope="module")
def expected(float_net, small_cifar):
    """The accuracy of `float_net` on 64 images."""
    return train_utils.evaluate(float_net, first_of(small_cifar, 1, 64))[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_net_of_another_precision_is_tested_in_it(
    monkeypatch, small_cifar, float_net, expected, dtype
):
    data = first_of(small_cifar, 1, 64)
    monkeypatch.setattr(train_utils, "get_data", lambda device: data)
    found = train_utils.test(copy.deepcopy(float_net).to(dtype), verbose=False)
    assert expected > 0.8 and abs(found - expected) <= 0.02


# ---------------------------------------------------------------- the data folder


@pytest.fixture
def batches(tmp_path):
    """A folder that looks like the unpacked batches, and what the reader was asked for."""
    folder = tmp_path / "downloads" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"")
    return folder


@pytest.mark.parametrize("root", [".", "..", "../.."])
def test_batches_are_found_in_the_folder_one_level_down_and_as_the_folder(batches, root):
    assert cifar10._find_batches((batches / root).resolve()) == batches


def test_a_folder_without_batches_is_none(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert cifar10._find_batches(tmp_path) is None


def test_the_data_are_read_once_for_each_folder(monkeypatch, tmp_path):
    loads = []
    monkeypatch.setattr(cifar10, "load", lambda *where: loads.append(where) or object())

    def get(folder):
        monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / folder))
        return train_utils.get_data(torch.device("cpu"))

    a, b = get("a"), get("b")
    assert get("a") is a is not b and get("b") is b
    assert train_utils.get_data("cpu:0") is train_utils.get_data("cpu") is b  # one device
    assert loads == [(str(tmp_path / name), "cpu") for name in "ab"]
    train_utils._cached_data.cache_clear()


def test_the_data_folder_does_not_depend_on_where_one_starts(monkeypatch, tmp_path):
    """Imported anew, from another folder than the one that pytest was started in."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("imported_elsewhere", REPOSITORY / "cifar10.py")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert str(again.default_root()) == str(REPOSITORY / "data")


# ---------------------------------------------------------------- nets of other libraries


@pytest.mark.parametrize("fixed_point", [{}, {"Nbits": 4}], ids=["float", "4 bits"])
def test_a_net_pruned_by_torch_trains_on_and_stays_as_sparse(small_cifar, fixed_point):
    """torch.nn.utils.prune computes the weight in a hook of the convolution, before each pass."""
    from torch.nn.utils import prune

    from pruning import prunable_layers
    from training.recipe import Pruning, Recipe

    torch.manual_seed(0)
    net = ResNetCIFAR(num_layers=8, **fixed_point)
    layers = [layer for _, layer in prunable_layers(net)]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured,
                              amount=0.7)
    before = layers[0].weight_orig.detach().clone()
    data = cifar10.CIFAR10(*(tensor[:128] for tensor in small_cifar))
    train_utils.fit(net, Recipe(epochs=2, batch_size=32, lr=0.05), data,
                    pruning=Pruning(hold_zeros=False))
    net.eval()(torch.zeros(1, 3, 32, 32))  # the hooks compute the weights anew
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert zeros / sum(layer.weight.numel() for layer in layers) == pytest.approx(0.7, abs=1e-3)
    assert not torch.equal(layers[0].weight_orig, before)
