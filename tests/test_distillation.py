"""Distillation against its formula written out."""

import copy

import pytest
import torch
from torch import nn

from conftest import first_of, make_net, same, state_of
from resnet20 import ResNetCIFAR
from train_utils import fit, train_epoch
from training.batches import Batches, normalize
from training.distillation import Distillation
from training.recipe import Recipe


@pytest.fixture(scope="module")
def small_cifar(cifar):
    """128 real training and 50 real test images."""
    return first_of(cifar, 128, 50)


@pytest.fixture(scope="module")
def teacher(small_cifar):
    """One with opinions: an untrained net whose statistics fit the images, its logits made large.
    """
    torch.manual_seed(3)
    teacher = ResNetCIFAR(num_layers=8)
    teacher.final_fc.linear.weight.data *= 20
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics are those of the last batch
    with torch.no_grad():
        teacher(normalize(small_cifar.train_images))
    return teacher.eval()


@pytest.fixture(scope="module")
def batches(small_cifar):
    images, labels = small_cifar.train_images, small_cifar.train_labels
    return Batches(images, labels, 64, seed=1, augment=True)


# ---------------------------------------------------------------- the loss


def by_formula(z, y, u, weight, t):
    """The loss of logits z, in softmaxes and logarithms: labels y, a teacher's logits u."""
    student, teacher = (z / t).softmax(1), (u / t).softmax(1)
    divergence = (teacher * (teacher.log() - student.log())).sum(1).mean()
    hard = -z.softmax(1)[torch.arange(len(y)), y].log().mean()
    return (1 - weight) * hard + weight * t**2 * divergence


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_loss_and_its_gradient_are_the_formula_s(weight, temperature):
    generator = torch.Generator().manual_seed(0)
    z, u = (3 * torch.randn(12, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.arange(12) % 10
    losses, gradients = [], []
    distillation = Distillation(lambda x: u, weight, temperature)
    (x, labels), = distillation.taught([("images", y)])
    assert x == "images" and labels is y
    for loss in (distillation, lambda z, y: by_formula(z, y, u, weight, temperature)):
        logits = z.clone().requires_grad_()
        losses.append(loss(logits, y))
        gradients += torch.autograd.grad(losses[-1], logits)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_each_batch_has_the_teacher_s_word_on_its_own_images(teacher, batches):
    distillation = Distillation(teacher, 0.3, 2.0)
    net = make_net().eval()
    for (x, y), (_, plain) in zip(distillation.taught(batches), batches, strict=True):
        with torch.no_grad():
            expected = by_formula(net(x), y, teacher(x), 0.3, 2.0)
            torch.testing.assert_close(distillation(net(x), y), expected)
        assert torch.equal(y, plain)
        assert not distillation.targets.requires_grad


def test_the_size_of_the_gradient_hardly_depends_on_the_temperature():
    """What the factor T^2 is there for: for small logits the gradient is (z - u) / classes."""
    generator = torch.Generator().manual_seed(0)
    z, u = (0.01 * torch.randn(8, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    for temperature in (1.0, 4.0, 16.0):
        distillation, logits = Distillation(lambda x: u, 1.0, temperature), z.clone()
        list(distillation.taught([(None, None)]))
        loss = distillation(logits.requires_grad_(), torch.zeros(8, dtype=torch.long))
        gradient, = torch.autograd.grad(loss, logits)
        expected = ((z - z.mean(1, keepdim=True)) - (u - u.mean(1, keepdim=True))) / 10 / 8
        torch.testing.assert_close(gradient, expected, rtol=0.05, atol=1e-6)


def test_without_a_teacher_an_epoch_is_one_of_cross_entropy(net, batches):
    """The weight's other end: all labels, and so the gradients of a plain epoch."""
    nets, criterion = [net, copy.deepcopy(net)], Distillation(None, 0.0)
    results = [
        train_epoch(one, its, torch.optim.SGD(one.parameters(), lr=0.1), loss)
        for one, its, loss in zip(nets, (batches, criterion.taught(batches)),
                                  (nn.CrossEntropyLoss(), criterion))
    ]
    assert results[0] == results[1] and same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.slow
def test_distilling_trains_toward_the_teacher_and_leaves_it_as_it_is(
    net, small_cifar, teacher, batches
):
    before = state_of(teacher)

    def distance():
        x, _ = next(iter(batches))
        with torch.no_grad():
            return nn.functional.kl_div(
                net.eval()(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean"
            )

    first = distance()
    recipe = Recipe(epochs=4, batch_size=32, lr=0.05, weight_decay=0.0, distill=1.0)
    fit(net, recipe, small_cifar, teacher=teacher)
    assert distance() < 0.5 * first
    assert same(teacher.state_dict(), before)


def test_a_teacher_that_cannot_be_folded_is_asked_in_evaluation_mode(net, small_cifar, teacher):
    odd = copy.deepcopy(teacher).train()
    odd.register_forward_hook(lambda *_: None)
    before = state_of(odd)
    fit(net, Recipe(epochs=1, batch_size=128, distill=0.3), small_cifar, teacher=odd)
    assert same(odd.state_dict(), before)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fit_takes_weight_and_temperature_from_the_recipe(
    net, small_cifar, teacher, temperature
):
    """One step at rate 0: the loss that is recorded is that of the net as it was."""
    recipe = Recipe(epochs=1, batch_size=128, lr=0.0, distill=0.3, temperature=temperature)
    (x, y), = Batches(*small_cifar[:2], 128, seed=2, augment=True)
    with torch.no_grad():
        expected = by_formula(copy.deepcopy(net).train()(x), y, teacher(x), 0.3, temperature)
    history = fit(net, recipe, small_cifar, teacher=teacher, seed=2)
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("distill, with_teacher", [(0.0, True), (0.5, False)])
def test_distill_and_teacher_go_together(net, small_cifar, distill, with_teacher):
    teacher = make_net() if with_teacher else None
    before = state_of(net)
    with pytest.raises(ValueError, match=f"weight, .* must be .*got {distill!r}"):
        fit(net, Recipe(epochs=1, distill=distill), small_cifar, teacher=teacher)
    assert same(net.state_dict(), before)


def test_the_temperature_is_1_unless_it_is_said():
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    losses = []
    for temperature in ((), (1.0,), (2.0,)):
        distillation = Distillation(lambda x: x * 3, 0.5, *temperature)
        for x, y in distillation.taught([(logits, labels)]):
            losses.append(distillation(x, y).item())
    assert losses[0] == losses[1] != losses[2]
