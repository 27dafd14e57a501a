"""The assigned pipeline, as the homework's own notebook has it.

torchvision transforms on PIL images, a DataLoader with worker processes, a float32 NCHW net without
compilation, loss and accuracy read back in each step.
"""

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

from cifar10 import MEAN, STD
from resnet20 import ResNetCIFAR


class AsTorchvision(TorchvisionCIFAR10):
    """torchvision's CIFAR10 and its __getitem__, around images (N, 3, 32, 32) already read."""

    def __init__(self, images, labels, transform):
        self.data = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.targets = labels.tolist()
        self.transform, self.target_transform = transform, None


TO_NORMALIZED = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
AUGMENTATION = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]


def assigned_loader(images, labels, batch_size, workers, train):
    """Return the assigned DataLoader: augmented and shuffled for training, in order for testing."""
    transform = transforms.Compose([*AUGMENTATION, *TO_NORMALIZED] if train else TO_NORMALIZED)
    return DataLoader(
        AsTorchvision(images, labels, transform), batch_size, shuffle=train, num_workers=workers
    )


def assigned_net(device):
    """Return the assigned ResNet-20 on `device`: activations do not overwrite what they read."""
    net = ResNetCIFAR(num_layers=20).to(device)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    return net


def assigned_epoch(net, loader, optimizer, criterion, forward=None):
    """Train `net` as assigned on what `loader` yields; return (mean loss, accuracy)."""
    device = next(net.parameters()).device
    forward = net if forward is None else forward
    net.train()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        logits = forward(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(y)
        correct += logits.argmax(1).eq(y).sum().item()
        seen += len(y)
    return total_loss / seen, correct / seen


@torch.no_grad()
def assigned_evaluation(net, loader):
    """Evaluate `net` as assigned on what `loader` yields; return (mean loss, accuracy)."""
    device, criterion = next(net.parameters()).device, torch.nn.CrossEntropyLoss()
    net.eval()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        logits = net(x)
        total_loss += criterion(logits, y).item() * len(y)
        correct += logits.argmax(1).eq(y).sum().item()
        seen += len(y)
    return total_loss / seen, correct / seen
