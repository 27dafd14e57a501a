"""A notebook written against the course's skeleton runs on our modules as it is."""

import shutil

import pytest
import torch

import train_util
import train_utils
from cifar10 import CIFAR10
from conftest import REPOSITORY, state_of

# Cells as students write them; the course's functions are called as its skeleton calls them.
CELLS = (
    # the imports, in the skeleton's order
    """
from resnet20 import ResNetCIFAR
from train_util import train, finetune, test
import torch
import numpy as np
import matplotlib.pyplot as plt
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import time
import torchvision.transforms as transforms
import torchvision

from FP_layers import *
""",
    # the float model
    """
device = 'cuda' if torch.cuda.is_available() else 'cpu'

net = ResNetCIFAR(num_layers=20, Nbits=None)
net = net.to(device)
net.load_state_dict(torch.load("pretrained_model.pt"))
float_accuracy = test(net)
""",
    # Lab 2: pruning by hand
    """
def prune_by_percentage(layer, q=70.0):
    weight = layer.weight.data.cpu().numpy()
    threshold = np.percentile(np.abs(weight), q)
    mask = (np.abs(weight) > threshold).astype(np.float32)
    layer.weight.data = torch.from_numpy(weight * mask).to(device)

for name, layer in net.named_modules():
    if (isinstance(layer, nn.Conv2d) or isinstance(layer, nn.Linear)) and 'id_mapping' not in name:
        prune_by_percentage(layer, q=70.0)
        np_weight = layer.weight.data.cpu().numpy()
        zeros_in = {**globals().get('zeros_in', {}), name: (np_weight == 0).mean()}

pruned_accuracy = test(net)
finetune(net, epochs=1, batch_size=32, lr=0.002, reg=1e-4)
torch.save(net.state_dict(), "pruned.pt")
tuned_accuracy = test(net)
""",
    # Lab 2: the loop by hand, with finetune_after_prune from the notebook
    """
def finetune_after_prune(net, trainloader, criterion, optimizer, prune=True):
    weight_mask = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and 'id_mapping' not in name:
            weight_mask[name] = (layer.weight.data != 0).float()
    net.train()
    for inputs, targets in trainloader:
        optimizer.zero_grad()
        loss = criterion(net(inputs), targets)
        loss.backward()
        optimizer.step()
        if prune:
            for name, layer in net.named_modules():
                if name in weight_mask:
                    layer.weight.data *= weight_mask[name]

transform = transforms.Compose([transforms.ToTensor()])
images = torch.rand(8, 3, 32, 32, device=device)
labels = torch.arange(8, device=device)
optimizer = optim.SGD(net.parameters(), lr=0.01, momentum=0.875, weight_decay=1e-4)
finetune_after_prune(net, [(images, labels)], nn.CrossEntropyLoss(), optimizer)
""",
    # Lab 3: quantization, from the float model and from the pruned one
    """
Nbits = 4
net = ResNetCIFAR(num_layers=20, Nbits=Nbits)
net = net.to(device)
net.load_state_dict(torch.load("pretrained_model.pt"))
quantized_accuracy = test(net)
finetune(net, epochs=1, batch_size=256, lr=0.002, reg=1e-4)
net.load_state_dict(torch.load("quantized_net_after_finetune.pt"))
test(net)

net.load_state_dict(torch.load("pruned.pt"))
finetune(net, epochs=1, batch_size=256, lr=0.002, reg=1e-4)
pruned_and_quantized = net
""",
    # from scratch
    """
train(ResNetCIFAR(num_layers=8).to(device), epochs=1, batch_size=64, lr=0.1, reg=1e-4)
""",
    # the STE by itself
    """
x = torch.linspace(-1, 1, 9, device=device, requires_grad=True)
y = STE.apply(x, 2)
y.sum().backward()
""",
)


def test_the_courses_spelling_hands_on_the_same_functions():
    public = {name for name in vars(train_util) if not name.startswith("_")}
    assert public == {*train_utils.__all__}
    assert all(getattr(train_util, name) is getattr(train_utils, name) for name in public)


@pytest.fixture
def on_a_slice(monkeypatch, tmp_path, small_cifar):
    """A folder as a reader has it, and few images."""
    data = CIFAR10(*(tensor[:n] for tensor, n in zip(small_cifar, (64, 64, 100, 100))))
    monkeypatch.setattr(train_utils, "get_data", lambda device: data.to(device))
    shutil.copy(REPOSITORY / "pretrained_model.pt", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_the_cells_of_a_students_notebook_run_one_after_another(on_a_slice, tmp_path, capsys):
    space = {"__name__": "__main__"}
    states = []
    for cell in CELLS:
        exec(compile(cell, "cell", "exec"), space)
        if "net" in space:
            states.append(state_of(space["net"]))

    # what test prints is the course's line, and what it returns is usable
    assert "Test Loss=" in (printed := capsys.readouterr().out) and "Test accuracy=" in printed
    assert space["float_accuracy"] > 0.8 > space["pruned_accuracy"]
    assert space["tuned_accuracy"] > space["pruned_accuracy"]
    assert abs(space["quantized_accuracy"] - space["float_accuracy"]) < 0.1

    # 20 layers pruned, which stay so through finetune and through the loop by hand
    zeros = space["zeros_in"]
    assert len(zeros) == 20 and all(abs(zeros[name] - 0.7) < 0.01 for name in zeros)
    loaded, pruned, by_hand = states[:3]
    quantized = space["pruned_and_quantized"].state_dict()
    for name in zeros:
        zero = pruned[f"{name}.weight"] == 0
        assert zero.float().mean() == pytest.approx(zeros[name], abs=1e-6)
        assert not (loaded[f"{name}.weight"] == 0).all()
        assert torch.equal(by_hand[f"{name}.weight"] == 0, zero)
        assert (quantized[f"{name}.weight"][zero] == 0).all()
        assert not torch.equal(by_hand[f"{name}.weight"], pruned[f"{name}.weight"])

    # the weights behind 4 bits are floats, what is computed with has 16 values
    layer = space["pruned_and_quantized"].body_op[4].conv1[0]
    with torch.no_grad():
        assert len(layer.conv.weight.unique()) > 1000
        assert len(layer.quantizer(layer.conv.weight).unique()) <= 17  # the zeros beside the grid
    assert space["y"].unique().numel() <= 5 and torch.equal(
        space["x"].grad, torch.ones_like(space["x"]))
    assert {path.name for path in tmp_path.iterdir()} == {
        "pretrained_model.pt", "pruned.pt", "quantized_net_after_finetune.pt", "net_after_train.pt"}
