"""The training loop and the homework's entry points: against plain PyTorch loops, and where
training goes wrong.
"""

import copy
import functools
import math
import time

import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import FP_layers
import train_utils
from conftest import first_of, make_net, same, state_of
from FP_layers import Learned
from pruning import global_prune_by_percentage, prunable_layers, sparsity, weight_masks
from resnet20 import ResNetCIFAR
from train_utils import evaluate, finetune, finetune_after_prune, fit, load_weights, train
from train_utils import train_epoch
from training import batches as training_batches
from training.batches import Batches, normalize
from training.distillation import Distillation
from training.execution import Execution
from training.journal import Journal
from training.recipe import Pruning, Recipe

pytestmark = pytest.mark.usefixtures("in_small_world")


@pytest.fixture(scope="module")
def small_cifar(cifar):
    """64 real training and 50 real test images."""
    return first_of(cifar, 64, 50)


@pytest.fixture
def optimizer_steps():
    """What SGD was set to at each step."""
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        )
    )
    yield seen
    hook.remove()


# ---------------------------------------------------------------- it learns


@pytest.mark.slow
def test_it_learns_on_a_slice_of_cifar10(monkeypatch, cifar):
    """Chance is 10 %, with a deviation of 1.3 points on 500 images."""
    data = first_of(cifar, 1536, 500)
    monkeypatch.setattr(train_utils, "get_data", lambda device: data)
    net = make_net(Nbits=4)
    history = train(net, epochs=5, batch_size=32, lr=0.02, reg=1e-4)
    losses = [entry["train_loss"] for entry in history]
    assert losses[-1] < losses[0] - 0.3
    assert history[-1]["train_accuracy"] > 0.30
    assert history[-1]["test_accuracy"] > 0.25
    assert history[-1]["test_loss"] < math.log(10) - 0.2


# ---------------------------------------------------------------- against plain loops


@pytest.mark.parametrize("hold_zeros", [False, True])
def test_an_epoch_equals_a_plain_loop(net, small_cifar, hold_zeros):
    global_prune_by_percentage(net, 50.0)
    plain = copy.deepcopy(net).train()
    zeros = {
        name: p == 0
        for name, p in plain.named_parameters()
        if p.dim() > 1 and "id_mapping" not in name
    }
    batches = list(Batches(small_cifar.train_images, small_cifar.train_labels, 25, augment=True))
    criterion = nn.CrossEntropyLoss()

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)

    masks = weight_masks(net) if hold_zeros else None
    loss, accuracy = train_epoch(net, batches, sgd(net), criterion, masks)

    total, correct, optimizer = 0.0, 0, sgd(plain)
    for x, y in batches:
        optimizer.zero_grad()
        logits = plain(x)
        criterion(logits, y).backward()
        optimizer.step()
        if hold_zeros:
            for name, p in plain.named_parameters():
                if name in zeros:
                    p.data[zeros[name]] = 0
        total += criterion(logits, y).item() * len(y)
        correct += (logits.argmax(1) == y).sum().item()
    assert loss == pytest.approx(total / 64, rel=1e-4) and accuracy == pytest.approx(
        correct / 64, abs=1.1 / 64
    )
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_evaluate_equals_a_plain_loop_over_torchvision_transforms(net, small_cifar):
    # BatchNorm statistics worth their name
    fit(net, Recipe(epochs=1, batch_size=16, lr=0.05, weight_decay=0), small_cifar)
    to_tensor = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )
    images = [
        to_tensor(Image.fromarray(image.permute(1, 2, 0).numpy()))
        for image in small_cifar.test_images
    ]
    plain = copy.deepcopy(net).eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for x, y in DataLoader(
            TensorDataset(torch.stack(images), small_cifar.test_labels), batch_size=33
        ):
            logits = plain(x)
            loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
            correct += (logits.argmax(1) == y).sum().item()
    assert evaluate(net, small_cifar) == pytest.approx((loss / 50, correct / 50), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_changes_neither_mode_nor_state(net, small_cifar, training):
    net.train(training)
    before = state_of(net)
    evaluate(net, small_cifar)
    assert net.training is training and same(net.state_dict(), before)


@pytest.fixture
def cudnn():
    """PyTorch's settings of cuDNN, put back in the end."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    yield cudnn
    cudnn.conv.fp32_precision, cudnn.deterministic = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since PyTorch 2.9")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_evaluate_rounds_nothing_to_tf32_and_leaves_cudnn_as_it_was(
    net, small_cifar, cudnn, precision
):
    cudnn.conv.fp32_precision, cudnn.deterministic, seen = precision, True, set()
    net.register_forward_pre_hook(
        lambda *_: seen.add((cudnn.conv.fp32_precision, cudnn.deterministic)))
    evaluate(net, small_cifar)
    assert seen == {("ieee", True)} and cudnn.conv.fp32_precision == precision


def test_test_prints_the_line_of_the_homework(net, capsys):
    loss, accuracy = evaluate(net)
    assert train_utils.test(net) == accuracy
    assert capsys.readouterr().out == f"Test Loss={loss:.4f}, Test accuracy={accuracy:.4f}\n"
    assert train_utils.test(net, verbose=False) == accuracy and capsys.readouterr().out == ""


# ---------------------------------------------------------------- the net is left ready for use


def is_in_evaluation(net):
    return not any(module.training for module in net.modules())


@pytest.mark.parametrize("use", [
    lambda net: train_utils.test(net, verbose=False),
    lambda net: finetune(net, 1, 16, 0.01, 1e-4, checkpoint=None),
    lambda net: train(net, 1, 16, 0.01, 1e-4, checkpoint=None),
], ids=["test", "finetune", "train"])
def test_what_a_reader_calls_next_is_an_evaluation(small_cifar, use):
    """As after the course's own functions, a following net(x) has running statistics and keeps
    them.
    """
    net = make_net(Nbits=4).train()
    use(net)
    assert net.training is False and is_in_evaluation(net)
    before, x = state_of(net), normalize(small_cifar.test_images)
    with torch.no_grad():
        logits = net(x)
        assert torch.equal(logits, copy.deepcopy(net).eval()(x))
    assert same(net.state_dict(), before)
    accuracy = (logits.argmax(1) == small_cifar.test_labels).float().mean().item()
    assert train_utils.test(net, verbose=False) == pytest.approx(accuracy)


def test_finetune_after_a_test_trains_in_training_mode(net):
    """BatchNorm statistics move, although the net was left in evaluation mode."""
    train_utils.test(net, verbose=False)
    before = net.head_conv[1].running_mean.clone()
    finetune(net, 1, 16, 0.01, 1e-4, checkpoint=None)
    assert not torch.equal(net.head_conv[1].running_mean, before)


# ---------------------------------------------------------------- the assigned recipes


@pytest.mark.slow
def test_train_follows_the_assigned_recipe(net, optimizer_steps):
    history = train(net, epochs=4, batch_size=32, lr=0.1, reg=1e-3)
    assert [step["lr"] for step in optimizer_steps] == pytest.approx(
        [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    )
    assert {(s["momentum"], s["weight_decay"], s["nesterov"]) for s in optimizer_steps} == {
        (0.875, 1e-3, False)
    }
    assert [entry["lr"] for entry in history] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_finetune_follows_the_assigned_recipe(net, optimizer_steps):
    finetune(net, epochs=2, batch_size=32, lr=0.002, reg=1e-4)
    assert [step["lr"] for step in optimizer_steps] == pytest.approx([0.002] * 4)
    assert {(s["momentum"], s["weight_decay"], s["nesterov"]) for s in optimizer_steps} == {
        (0.875, 1e-4, False)
    }


@pytest.mark.parametrize("entry_point, file", [
    (train, "net_after_train.pt"), (finetune, "quantized_net_after_finetune.pt"),
])
def test_the_best_epoch_is_saved_in_the_current_folder(
    monkeypatch, tmp_path, net, entry_point, file
):
    accuracies, states = iter([0.3, 0.5, 0.4]), []

    def fake_evaluate(net, data):
        states.append(state_of(net))
        return 1.0, next(accuracies)

    monkeypatch.setattr(train_utils, "evaluate", fake_evaluate)
    history = entry_point(net, 3, 32, 0.05, 1e-4)
    assert [entry["test_accuracy"] for entry in history] == [0.3, 0.5, 0.4]
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert same(load_weights(make_net(), file).state_dict(), states[1])
    assert same(net.state_dict(), states[2])


@pytest.mark.parametrize("entry_point", [train, finetune])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, FloatingPointError])
def test_the_best_epoch_of_a_training_that_stops_is_saved(
    monkeypatch, tmp_path, net, entry_point, stop
):
    results, states = iter([0.5, 0.4, stop]), []

    def fake_evaluate(net, data):
        states.append(state_of(net))
        result = next(results)
        if result is stop:
            raise stop
        return 1.0, result

    monkeypatch.setattr(train_utils, "evaluate", fake_evaluate)
    with pytest.raises(stop):
        entry_point(net, 5, 32, 0.05, 1e-4, checkpoint="best.pt")
    assert same(load_weights(make_net(), "best.pt").state_dict(), states[0])


@pytest.mark.parametrize("entry_point", [train, finetune])
def test_nothing_is_saved_where_no_checkpoint_is_wanted(tmp_path, net, entry_point):
    entry_point(net, 1, 32, 0.05, 1e-4, checkpoint=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("losses_of", [
    lambda net, **seed: train(net, 1, 32, 0.05, 1e-4, checkpoint=None, **seed),
    lambda net, **seed: finetune(net, 1, 32, 0.05, 1e-4, checkpoint=None, **seed),
    lambda net, **seed: fit(net, Recipe(epochs=1, batch_size=32, lr=0.05), **seed),
], ids=["train", "finetune", "fit"])
def test_the_seed_is_0_unless_it_is_said_and_another_trains_otherwise(net, losses_of):
    first, again, other = (losses_of(copy.deepcopy(net), **seed)[0]["train_loss"]
                           for seed in ({}, {"seed": 0}, {"seed": 1}))
    assert first == again != other


# ---------------------------------------------------------------- what fit asks of an epoch


@pytest.fixture
def epochs_seen(monkeypatch):
    """Batches, and the rates in front of each, of epochs in which nothing is trained."""
    batches, rates = [], []

    def watched(net, of_epoch, optimizer, *_):
        group, = optimizer.param_groups
        for batch in of_epoch:
            batches.append(batch)
            rates.append(group["lr"])
        return 1.0, 0.1

    monkeypatch.setattr(train_utils, "train_epoch", watched)
    return batches, rates


def test_each_step_has_its_rate(epochs_seen, net, small_cifar):
    # 64 images: three steps an epoch
    recipe = Recipe(epochs=2, batch_size=25, lr=0.1, schedule="cosine", warmup=0.4)
    fit(net, recipe, small_cifar)
    assert epochs_seen[1] == pytest.approx([0.1 * recipe.rate(i / 6) for i in range(6)])


def test_the_optimizer_is_sgd_on_everything_as_the_recipe_says(monkeypatch, net, small_cifar):
    seen = []

    def watched(net, batches, optimizer, *_):
        seen.append(optimizer)
        return 1.0, 0.1

    monkeypatch.setattr(train_utils, "train_epoch", watched)
    recipe = Recipe(epochs=1, lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.02)
    fit(net, recipe, small_cifar)
    (optimizer,) = seen
    group, = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")
            ] == [0.3, 0.7, True, 0.02]


def test_each_epoch_has_the_batches_of_its_seed_and_number(epochs_seen, net, small_cifar):
    fit(net, Recipe(epochs=2, batch_size=40, cutout=8), small_cifar, seed=3)
    expected = [batch for epoch in (1, 2)
                for batch in Batches(*small_cifar[:2], 40, 3, epoch, augment=True, cutout=8)]
    assert len(epochs_seen[0]) == len(expected) == 4
    assert all(torch.equal(a, b) for pair in zip(epochs_seen[0], expected) for a, b in zip(*pair))


# ---------------------------------------------------------------- what fit returns


@pytest.mark.parametrize("accuracy", [0.0, 0.5])
def test_of_equally_good_epochs_the_first_is_the_best(monkeypatch, net, accuracy):
    states = []
    monkeypatch.setattr(train_utils, "evaluate",
                        lambda net, data: states.append(state_of(net)) or (1.0, accuracy))
    fit(net, Recipe(epochs=2, batch_size=64), journal=(journal := Journal()))
    assert same(journal.best["state"], states[0]) and not same(*states)


def test_seconds_are_those_of_each_epoch(monkeypatch, net, small_cifar):
    monkeypatch.setattr(time, "perf_counter", iter([3.0, 5.0, 9.0]).__next__)
    history = fit(net, Recipe(epochs=2, batch_size=64), small_cifar)
    assert [entry["seconds"] for entry in history] == [2, 4]


def test_epochs_are_tested_as_often_as_the_recipe_says(net, small_cifar):
    recipe, journal = Recipe(epochs=3, batch_size=32, test_every=2), Journal()
    history = fit(net, recipe, small_cifar, journal=journal)
    assert ["test_accuracy" in entry for entry in history] == [False, True, True]
    assert history[-1]["test_accuracy"] == evaluate(net, small_cifar)[1]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert journal.best["state"].keys() == net.state_dict().keys()
    assert net.head_conv[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("epochs, best_epoch", [(0, 1), (2, 2), (3, 4)])
def test_the_best_epoch_is_none_before_the_last_pruning(monkeypatch, net, epochs, best_epoch):
    accuracies, states = iter([0.9, 0.8, 0.3, 0.4]), []

    def fake_evaluate(net, data):
        states.append(state_of(net))
        return 1.0, next(accuracies)

    monkeypatch.setattr(train_utils, "evaluate", fake_evaluate)
    pruning = Pruning("layer", 60.0, epochs=epochs)
    journal = Journal()
    history = fit(net, Recipe(epochs=4, batch_size=64), pruning=pruning, journal=journal)
    assert same(journal.best["state"], states[best_epoch - 1])
    reached = [60 * min(epoch / max(epochs, 1), 1) / 100 for epoch in range(1, 5)]
    held = [entry["sparsity"] for entry in history][max(epochs, 1) - 1:]
    assert held == pytest.approx(reached[max(epochs, 1) - 1:], abs=2e-3)


def test_a_pruning_that_takes_more_epochs_than_there_are_is_refused(net):
    with pytest.raises(ValueError, match="pruning.epochs must be at most recipe.epochs, 2, got 3"):
        fit(net, Recipe(epochs=2), pruning=Pruning("layer", 60.0, epochs=3))


# ---------------------------------------------------------------- pruned weights


@pytest.mark.parametrize("n_bits", [None, 4])
def test_finetune_holds_zeros_unless_told_otherwise(n_bits):
    net = make_net(Nbits=n_bits)
    global_prune_by_percentage(net, 70.0)
    masks, start = weight_masks(net), copy.deepcopy(net)
    grown = copy.deepcopy(net)
    finetune(net, 2, 16, 0.01, 1e-4, checkpoint=None)
    finetune(grown, 1, 16, 0.01, 1e-4, checkpoint=None, hold_zeros=False)
    for (_, layer), (_, before), mask in zip(prunable_layers(net), prunable_layers(start), masks):
        assert torch.equal(layer.weight != 0, mask != 0)
        assert not torch.equal(layer.weight, before.weight)
    assert sparsity(grown) < 0.05


def test_train_lets_pruned_weights_grow(net):
    global_prune_by_percentage(net, 70.0)
    train(net, 1, 16, 0.01, 1e-4, checkpoint=None)
    assert sparsity(net) < 0.05


@pytest.mark.parametrize("options, held", [({}, True), ({"prune": True}, True),
                                           ({"prune": False}, False)], ids=str)
def test_finetune_after_prune_takes_a_torchvision_loader(net, small_cifar, options, held):
    to_tensor = transforms.Compose(
        [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    pairs = zip(small_cifar.train_images, small_cifar.train_labels)
    dataset = [(to_tensor(image), int(label)) for image, label in pairs]
    global_prune_by_percentage(net, 70.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.875, weight_decay=1e-4)
    finetune_after_prune(
        net, DataLoader(dataset, 16, shuffle=True), nn.CrossEntropyLoss(), optimizer, **options
    )
    assert sparsity(net) == pytest.approx(0.7, abs=1e-3) if held else sparsity(net) < 0.05


def test_finetune_after_prune_returns_the_mean_loss_and_accuracy_of_its_batches(net, small_cifar):
    x, y = normalize(small_cifar.train_images), small_cifar.train_labels
    with torch.no_grad():
        logits = copy.deepcopy(net).train()(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    loss, accuracy = finetune_after_prune(net, [(x, y)], nn.CrossEntropyLoss(), optimizer)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item(), abs=1.1 / 64)


def test_an_epoch_without_batches_is_refused(net):
    with pytest.raises(ValueError, match="at least one batch"):
        finetune_after_prune(
            net, [], nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1)
        )


@pytest.mark.parametrize("n_bits, symmetric", [(2, False), (2, True), (4, False)])
def test_learned_steps_are_trained_and_zeros_are_held(n_bits, symmetric):
    net = make_net(Nbits=n_bits, symmetric=symmetric, quantizer=Learned)
    global_prune_by_percentage(net, 50)
    before, steps = sparsity(net), net.body_op[0].conv1[0].quantizer.step.detach().clone()
    history = fit(net, Recipe(epochs=2, batch_size=16, lr=0.05))
    assert not torch.equal(net.body_op[0].conv1[0].quantizer.step, steps)
    assert [entry["sparsity"] for entry in history] == [before, before] == [sparsity(net)] * 2


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("n_bits", [None, 4])
# 64: one step, and only the weights after it are broken
@pytest.mark.parametrize("batch_size", [16, 64])
def test_divergence_is_an_error_and_the_net_keeps_its_last_good_epoch(n_bits, batch_size):
    net = make_net(Nbits=n_bits)
    before = state_of(net)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*lr=1e\+38"):
        fit(net, Recipe(epochs=1, batch_size=batch_size, lr=1e38, weight_decay=1e38))
    assert same(net.state_dict(), before)


def test_divergence_is_an_error_where_quantizers_do_not_check(monkeypatch):
    """As on a GPU and inside torch.compile, where NaN has to come all the way to the loss."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net = make_net(Nbits=4)
    before = state_of(net)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*lr=1e\+38"):
        fit(net, Recipe(epochs=1, batch_size=16, lr=1e38, weight_decay=1e38))
    assert same(net.state_dict(), before)


def test_a_loss_that_is_not_finite_is_divergence_though_the_weights_are(monkeypatch, net):
    monkeypatch.setattr(train_utils, "train_epoch", lambda *_: (math.nan, 0.1))
    with pytest.raises(FloatingPointError, match="epoch 1.*lr="):
        fit(net, Recipe(epochs=1, batch_size=64))


def test_divergence_in_a_later_epoch_keeps_the_epoch_before(monkeypatch, net):
    def poison(net, pruning, epoch):
        if epoch == 2:
            nn.init.constant_(net.final_fc.linear.bias, math.nan)

    good = make_net()
    fit(good, Recipe(epochs=1, batch_size=16, lr=0.01))
    monkeypatch.setattr(train_utils, "prune_before_epoch", poison)
    with pytest.raises(FloatingPointError, match="epoch 2"):
        fit(net, Recipe(epochs=3, batch_size=16, lr=0.01))
    assert same(net.state_dict(), good.state_dict())


# ---------------------------------------------------------------- nothing waits for a GPU


IMPROVED = dict(cutout=8, nesterov=True)


@pytest.mark.parametrize("arguments, options", [
    ({}, {}),
    ({"Nbits": 4}, {}),
    ({"Nbits": 2, "quantizer": Learned}, {}),
    ({"Nbits": 2, "quantizer": Learned}, IMPROVED),
], ids=["float", "4 bit", "learned", "improved"])
def test_nothing_in_an_epoch_waits_for_a_gpu(monkeypatch, arguments, options):
    """With fake CUDA tensors, which have no values, whatever reads one is an error: only the
    epoch's end does.

    The backward pass is left out, as PyTorch's engine needs a real device.
    """
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake_tensor.FakeTensorMode():
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("this PyTorch, 2.6 say, asks a driver even for a fake tensor")
    events, recipe = [], Recipe(batch_size=64, distill=0.5, temperature=2.0, **options)
    fresh_cache = functools.lru_cache(training_batches._per_channel.__wrapped__)
    monkeypatch.setattr(training_batches, "_per_channel", fresh_cache)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
            if str(function).startswith(("aten._to_copy", "aten.copy_")) and len(devices) > 1:
                events.append("sent")
            return result

    def backward(loss):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def recorded(batches):
        for step, batch in enumerate(batches):
            events.append(step)
            yield batch

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(FP_layers, "fit_step", lambda w, *_: torch.ones(len(w), 1, 1, 1))
    with fake_tensor.FakeTensorMode(), Watch():
        with torch.device("cuda"):
            net, teacher = (ResNetCIFAR(num_layers=8, **arguments) for _ in range(2))
            images, labels = (
                torch.empty(256, 3, 32, 32, dtype=torch.uint8),
                torch.zeros(256, dtype=torch.long),
            )
        criterion = Distillation(teacher, 0.5, 2.0)
        batches = criterion.taught(Batches(images, labels, 64, augment=True, cutout=recipe.cutout))
        optimizer, masks = train_utils._optimizer(net, recipe), weight_masks(net)
        for group in optimizer.param_groups:
            group["fused"] = False  # that kernel does not know fake tensors
        with pytest.raises(fake_tensor.DataDependentOutputException):
            train_epoch(net, recorded(batches), optimizer, criterion, masks)
    assert events[-4:] == [0, 1, 2, 3] and "sent" in events


# ---------------------------------------------------------------- what fit is given


def test_fit_trains_in_the_threads_of_its_execution(net, small_cifar, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    epoch = train_utils.train_epoch
    monkeypatch.setattr(train_utils, "train_epoch",
                        lambda *args: seen.append(torch.get_num_threads()) or epoch(*args))
    fit(net, Recipe(epochs=1, batch_size=64, lr=0.01), small_cifar,
        execution=Execution(threads=threads + 1))
    assert seen == [threads + 1] and torch.get_num_threads() == threads


def test_a_journal_of_an_earlier_training_is_refused(net, small_cifar):
    journal = Journal()
    recipe = Recipe(epochs=1, batch_size=64, lr=0.01)
    fit(net, recipe, small_cifar, journal=journal)
    before = state_of(net)
    with pytest.raises(ValueError, match="journal must be a new one, got one of 1 epochs"):
        fit(net, recipe, small_cifar, journal=journal)
    assert same(net.state_dict(), before)
