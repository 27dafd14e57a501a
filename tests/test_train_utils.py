"""The training loop: against plain PyTorch loops, killed and resumed, and with everything that can
go wrong.
"""

import copy
import errno
import functools
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import cifar10
import train_utils
from cifar10 import Batches, normalize
from conftest import REPOSITORY
from FP_layers import fit_levels, fit_step
from pruning import (
    DynamicPruning,
    global_prune_by_percentage,
    prunable_layers,
    sparsity,
    weight_masks,
)
from resnet20 import ResNetCIFAR
from train_utils import (
    SoftTargets,
    atomic_save,
    evaluate,
    execution,
    finetune,
    finetune_after_prune,
    fit,
    learning_rate,
    load_weights,
    save_weights,
    train,
    train_epoch,
    training_speed,
)


@pytest.fixture(autouse=True)
def in_small_world(monkeypatch, tmp_path, small_cifar):
    """The homework's entry points fetch their data and write into the current folder."""
    monkeypatch.setattr(train_utils, "get_data", lambda device: small_cifar)
    monkeypatch.chdir(tmp_path)


def make_net(**fixed_point):
    torch.manual_seed(0)
    return ResNetCIFAR(num_layers=8, **fixed_point)


@pytest.fixture
def net():
    return make_net()


def state_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[name], other[name]) for name in state
    )


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


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


def test_it_learns_on_a_slice_of_cifar10(monkeypatch, cifar):
    """Chance is 10 %, with a deviation of 1 point on 1,000 images."""
    data = cifar._replace(
        train_images=cifar.train_images[:2048],
        train_labels=cifar.train_labels[:2048],
        test_images=cifar.test_images[:1000],
        test_labels=cifar.test_labels[:1000],
    )
    monkeypatch.setattr(train_utils, "get_data", lambda device: data)
    net = make_net(Nbits=4)
    history = train(net, epochs=6, batch_size=64, lr=0.05, reg=1e-4)
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
    batches = list(Batches(small_cifar.train_images, small_cifar.train_labels, 100, augment=True))
    criterion = nn.CrossEntropyLoss()

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)

    loss, accuracy = train_epoch(net, batches, sgd(net), criterion, hold_zeros=hold_zeros)

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
    assert loss == pytest.approx(total / 256, rel=1e-4) and accuracy == pytest.approx(
        correct / 256, abs=2.1 / 256
    )
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_evaluate_equals_a_plain_loop_over_torchvision_transforms(net, small_cifar):
    # BatchNorm statistics worth their name
    fit(net, epochs=1, batch_size=64, lr=0.05, weight_decay=0)
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
    assert evaluate(net, small_cifar) == pytest.approx((loss / 200, correct / 200), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_changes_neither_mode_nor_state(net, small_cifar, training):
    net.train(training)
    before = state_of(net)
    evaluate(net, small_cifar)
    assert net.training is training and same(net.state_dict(), before)


def test_test_prints_the_line_of_the_homework(net, capsys):
    loss, accuracy = evaluate(net)
    assert train_utils.test(net) == accuracy
    assert capsys.readouterr().out == f"Test Loss={loss:.4f}, Test accuracy={accuracy:.4f}\n"
    assert train_utils.test(net, verbose=False) == accuracy and capsys.readouterr().out == ""


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "schedule, progress, warmup, expected",
    [
        ("constant", 0.0, 0.0, 0.4),
        ("constant", 0.99, 0.0, 0.4),
        ("constant", 0.05, 0.2, 0.1),
        ("step", 0.0, 0.0, 0.4),
        ("step", 0.4999, 0.0, 0.4),
        ("step", 0.5, 0.0, 0.04),
        ("step", 0.7499, 0.0, 0.04),
        ("step", 0.75, 0.0, 0.004),
        ("step", 0.99, 0.0, 0.004),
        ("cosine", 0.0, 0.0, 0.4),
        ("cosine", 0.5, 0.0, 0.2),
        ("cosine", 1 / 3, 0.0, 0.3),
        ("cosine", 1.0, 0.0, 0.0),
        ("cosine", 0.0, 0.1, 0.0),
        ("cosine", 0.05, 0.1, 0.2),
        ("cosine", 0.1, 0.1, 0.4),
        ("cosine", 0.55, 0.1, 0.2),
    ],
)
def test_learning_rate(schedule, progress, warmup, expected):
    assert learning_rate(schedule, 0.4, progress, warmup) == pytest.approx(expected, abs=1e-12)


def test_train_follows_the_assigned_recipe(net, optimizer_steps):
    history = train(net, epochs=4, batch_size=128, lr=0.1, reg=1e-3)
    assert [step["lr"] for step in optimizer_steps] == pytest.approx(
        [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    )
    assert {(s["momentum"], s["weight_decay"], s["nesterov"]) for s in optimizer_steps} == {
        (0.875, 1e-3, False)
    }
    assert [entry["lr"] for entry in history] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_finetune_follows_the_assigned_recipe(net, optimizer_steps):
    finetune(net, epochs=2, batch_size=128, lr=0.002, reg=1e-4)
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
    history = entry_point(net, 3, 128, 0.05, 1e-4)
    assert [entry["test_accuracy"] for entry in history] == [0.3, 0.5, 0.4]
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert same(load_weights(make_net(), file).state_dict(), states[1])
    assert same(net.state_dict(), states[2])


@pytest.mark.parametrize("entry_point", [train, finetune])
def test_nothing_is_saved_where_no_checkpoint_is_wanted(tmp_path, net, entry_point):
    entry_point(net, 1, 128, 0.05, 1e-4, checkpoint=None)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- pruned weights


@pytest.mark.parametrize("n_bits", [None, 4])
def test_finetune_holds_zeros_unless_told_otherwise(n_bits):
    net = make_net(Nbits=n_bits)
    global_prune_by_percentage(net, 70.0)
    masks, start = weight_masks(net), copy.deepcopy(net)
    grown = copy.deepcopy(net)
    finetune(net, 2, 64, 0.01, 1e-4, checkpoint=None)
    finetune(grown, 1, 64, 0.01, 1e-4, checkpoint=None, hold_zeros=False)
    for (name, layer), (_, before) in zip(prunable_layers(net), prunable_layers(start)):
        assert torch.equal(layer.weight != 0, masks[name] != 0)
        assert not torch.equal(layer.weight, before.weight)
    assert sparsity(grown) < 0.05


@pytest.mark.parametrize("prune", [True, False])
def test_finetune_after_prune_takes_a_torchvision_loader(net, small_cifar, prune):
    to_tensor = transforms.Compose(
        [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    pairs = zip(small_cifar.train_images, small_cifar.train_labels)
    dataset = [(to_tensor(image), int(label)) for image, label in pairs]
    global_prune_by_percentage(net, 70.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.875, weight_decay=1e-4)
    finetune_after_prune(
        net, DataLoader(dataset, 64, shuffle=True), nn.CrossEntropyLoss(), optimizer, prune=prune
    )
    assert sparsity(net) == pytest.approx(0.7, abs=1e-3) if prune else sparsity(net) < 0.05


def test_finetune_after_prune_returns_the_mean_loss_and_accuracy_of_its_batches(net, small_cifar):
    x, y = normalize(small_cifar.train_images), small_cifar.train_labels
    with torch.no_grad():
        logits = copy.deepcopy(net).train()(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    loss, accuracy = finetune_after_prune(net, [(x, y)], nn.CrossEntropyLoss(), optimizer)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item(), abs=1.1 / 256)


def test_an_epoch_without_batches_is_refused(net):
    with pytest.raises(ValueError, match="at least one batch"):
        finetune_after_prune(
            net, [], nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1)
        )


# ---------------------------------------------------------------- killed and resumed


def prune_in_epoch_2(epoch, net):
    if epoch == 2:
        global_prune_by_percentage(net, 50.0)


RECIPE = dict(
    epochs=3,
    batch_size=64,
    lr=0.05,
    weight_decay=1e-3,
    momentum=0.9,
    nesterov=True,
    schedule="cosine",
    warmup=0.2,
    label_smoothing=0.1,
    seed=5,
    hold_zeros_from=2,
)


@pytest.fixture(scope="module")
def unbroken(small_cifar):
    net = make_net(Nbits=4)
    history, best = fit(net, data=small_cifar, before_epoch=prune_in_epoch_2, **RECIPE)
    return state_of(net), without_seconds(history), best


def assert_resumes_to(unbroken, small_cifar, state_path):
    net = make_net(Nbits=4)
    net.load_state_dict(
        {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    )
    history, best = fit(
        net, data=small_cifar, before_epoch=prune_in_epoch_2, state_path=state_path, **RECIPE
    )
    state, expected_history, expected_best = unbroken
    assert without_seconds(history) == expected_history
    assert same(net.state_dict(), state) and same(best, expected_best)


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_run_that_fails_between_epochs_resumes_bit_for_bit(
    unbroken, small_cifar, tmp_path, epoch
):
    def fail(at, net):
        if at == epoch:
            raise KeyboardInterrupt
        prune_in_epoch_2(at, net)

    with pytest.raises(KeyboardInterrupt):
        fit(
            make_net(Nbits=4),
            data=small_cifar,
            before_epoch=fail,
            state_path=tmp_path / "state.pt",
            **RECIPE,
        )
    assert_resumes_to(unbroken, small_cifar, tmp_path / "state.pt")


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, "tests")
from test_train_utils import RECIPE, make_net, prune_in_epoch_2
from cifar10 import CIFAR10
from train_utils import fit

torch.set_num_threads(int(sys.argv[2]))
net, passes = make_net(Nbits=4), [0]

def kill_in_the_third_epoch(net, inputs):
    passes[0] += net.training
    if passes[0] == 10:
        os.kill(os.getpid(), signal.SIGKILL)

net.register_forward_pre_hook(kill_in_the_third_epoch)
data = CIFAR10(*torch.load("{data}", weights_only=True))
fit(net, data=data, before_epoch=prune_in_epoch_2, state_path=sys.argv[1], **RECIPE)
"""


def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(
    unbroken, small_cifar, tmp_path
):
    state_path = tmp_path / "state.pt"
    torch.save(list(small_cifar), tmp_path / "data.pt")
    script = KILLED.format(data=tmp_path / "data.pt")
    process = subprocess.run(
        [sys.executable, "-c", script, state_path, str(torch.get_num_threads())],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert len(torch.load(state_path, weights_only=True)["history"]) == 2
    assert_resumes_to(unbroken, small_cifar, state_path)


def test_a_damaged_state_is_refused(net, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="state.pt cannot be resumed from.*delete it"):
        fit(net, epochs=1, batch_size=64, lr=0.1, weight_decay=0, state_path=tmp_path / "state.pt")


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("n_bits", [None, 4])
# 256: one step, and only the weights after it are broken
@pytest.mark.parametrize("batch_size", [64, 256])
def test_divergence_is_an_error_and_the_net_keeps_its_last_good_epoch(n_bits, batch_size):
    net = make_net(Nbits=n_bits)
    before = state_of(net)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*lr=1e\+38"):
        fit(net, epochs=1, batch_size=batch_size, lr=1e38, weight_decay=1e38)
    assert same(net.state_dict(), before)


def test_divergence_is_an_error_where_quantizers_do_not_check(monkeypatch):
    """As on a GPU and inside torch.compile, where NaN has to come all the way to the loss."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net = make_net(Nbits=4)
    before = state_of(net)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*lr=1e\+38"):
        fit(net, epochs=1, batch_size=64, lr=1e38, weight_decay=1e38)
    assert same(net.state_dict(), before)


def test_divergence_in_a_later_epoch_keeps_the_epoch_before(net):
    def poison(epoch, net):
        if epoch == 2:
            nn.init.constant_(net.final_fc.linear.bias, math.nan)

    good = make_net()
    fit(good, epochs=1, batch_size=64, lr=0.01, weight_decay=0)
    with pytest.raises(FloatingPointError, match="epoch 2"):
        fit(net, epochs=3, batch_size=64, lr=0.01, weight_decay=0, before_epoch=poison)
    assert same(net.state_dict(), good.state_dict())


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "argument, value",
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", "64"),
        ("test_every", 0),
        ("log_every_n", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", "fast"),
        ("weight_decay", -1e-4),
        ("weight_decay", math.inf),
        ("schedule", "linear"),
        ("momentum", -1),
        ("warmup", 1.5),
        ("warmup", -0.1),
    ],
)
def test_a_bad_argument_is_refused_by_name_before_any_work(net, argument, value):
    before = state_of(net)
    arguments = dict(epochs=1, batch_size=64, lr=0.1, weight_decay=0.0) | {argument: value}
    with pytest.raises(ValueError, match=f"(?i)^(invalid )?{argument}") as caught:
        fit(net, **arguments)
    assert str(value) in str(caught.value) and same(net.state_dict(), before)


# ---------------------------------------------------------------- weights on disk


def test_weights_come_back_as_they_were_saved(net, tmp_path):
    torch.nn.init.normal_(net.head_conv[1].running_mean)
    save_weights(net, tmp_path / "new" / "net.pt")
    other = load_weights(ResNetCIFAR(num_layers=8), tmp_path / "new" / "net.pt")
    assert same(other.state_dict(), net.state_dict())
    assert same(torch.load(tmp_path / "new" / "net.pt", weights_only=True), net.state_dict())


def test_a_state_dict_saved_by_plain_torch_is_taken(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert same(
        load_weights(ResNetCIFAR(num_layers=8), tmp_path / "net.pt").state_dict(), net.state_dict()
    )


class Bomb:
    def __reduce__(self):
        return open, ("boom", "w")


def truncated(net, path):
    save_weights(net, path)
    os.truncate(path, path.stat().st_size // 2)


def altered(change):
    def write(net, path):
        state = state_of(net)
        change(state)
        torch.save(state, path)

    return write


def set_nan(state):
    state["body_op.1.id_mapping.0.conv.weight"][0, 0] = math.nan


@pytest.mark.parametrize(
    "write, complaint",
    [
        (truncated, "not a readable checkpoint"),
        (lambda net, path: path.write_bytes(b""), "not a readable checkpoint"),
        (lambda net, path: torch.save(Bomb(), path), "not a readable checkpoint"),
        (altered(lambda state: state.update(bomb=Bomb())), "not a readable checkpoint"),
        (lambda net, path: torch.save([1, 2], path), "another architecture"),
        (
            lambda net, path: save_weights(ResNetCIFAR(num_layers=14), path),
            "another architecture.*body_op.1.id_mapping",
        ),
        (
            altered(lambda state: state.pop("final_fc.linear.bias")),
            "another architecture.*final_fc.linear.bias",
        ),
        (
            altered(lambda state: state.update({"final_fc.linear.bias": torch.zeros(11)})),
            r"final_fc.linear.bias has shape \(11,\)",
        ),
        (
            altered(lambda state: state.update({"final_fc.linear.bias": [0.0] * 10})),
            "final_fc.linear.bias is a list",
        ),
        (altered(set_nan), "body_op.1.id_mapping.0.conv.weight holds NaN"),
    ],
    ids=[
        "truncated",
        "empty",
        "malicious",
        "malicious inside",
        "list",
        "deeper net",
        "missing key",
        "shape",
        "no tensor",
        "NaN",
    ],
)
def test_a_file_that_is_no_checkpoint_of_the_net_is_refused(net, tmp_path, write, complaint):
    write(net, tmp_path / "net.pt")
    other = ResNetCIFAR(num_layers=8)
    before = state_of(other)
    with pytest.raises(ValueError, match=f"net.pt.*{complaint}"):
        load_weights(other, tmp_path / "net.pt")
    assert same(other.state_dict(), before)
    assert not (tmp_path / "boom").exists()


def test_a_missing_checkpoint_is_named(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent.pt"):
        load_weights(net, tmp_path / "absent.pt")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("trouble, error", [(no_space, OSError), (interrupted, KeyboardInterrupt)])
def test_a_failed_save_keeps_the_earlier_file(monkeypatch, tmp_path, function, trouble, error):
    path = tmp_path / "net.pt"
    atomic_save({"a": torch.ones(3)}, path)
    monkeypatch.setattr(os, function, trouble)
    with pytest.raises(
        error, match="cannot write .*net.pt.*No space left" if error is OSError else None
    ):
        atomic_save({"a": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_into_no_folder_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*net.pt"):
        atomic_save({}, tmp_path / "file" / "net.pt")


# ---------------------------------------------------------------- distillation


def teacher_and_batches(small_cifar):
    """A teacher with opinions: an untrained net whose statistics fit the images, its logits made
    large.
    """
    torch.manual_seed(3)
    teacher = ResNetCIFAR(num_layers=8)
    teacher.final_fc.linear.weight.data *= 20
    with torch.no_grad():
        for _ in range(20):
            teacher(normalize(small_cifar.train_images[:128]))
    return teacher.eval(), Batches(
        small_cifar.train_images, small_cifar.train_labels, 128, seed=1, augment=True
    )


def test_soft_targets_mix_the_loss_against_labels_and_teacher(net, small_cifar):
    teacher, batches = teacher_and_batches(small_cifar)
    (x, mixed), (_, y) = next(iter(SoftTargets(batches, teacher, 0.3))), next(iter(batches))
    with torch.no_grad():
        logits, taught = net(x), teacher(x)
    against_teacher = -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    expected = 0.7 * nn.functional.cross_entropy(logits, y) + 0.3 * against_teacher
    torch.testing.assert_close(nn.functional.cross_entropy(logits, mixed), expected)
    assert torch.allclose(mixed.sum(1), torch.ones(len(y)))


def test_a_teacher_without_weight_changes_nothing(net, small_cifar):
    """The weight's other end: all labels, and so the gradients of a plain epoch."""
    teacher, batches = teacher_and_batches(small_cifar)
    nets = [net, copy.deepcopy(net)]
    results = [
        train_epoch(
            one,
            b,
            torch.optim.SGD(one.parameters(), lr=0.1),
            nn.CrossEntropyLoss(),
            hold_zeros=False,
        )
        for one, b in zip(nets, (batches, SoftTargets(batches, teacher, 0.0)))
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    for ours, plain in zip(nets[1].parameters(), nets[0].parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_distilling_trains_toward_the_teacher_and_leaves_it_as_it_is(net, small_cifar):
    teacher, batches = teacher_and_batches(small_cifar)
    before = state_of(teacher)

    def distance():
        x, _ = next(iter(batches))
        with torch.no_grad():
            return nn.functional.kl_div(
                net.eval()(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean"
            )

    first = distance()
    fit(
        net,
        epochs=4,
        batch_size=64,
        lr=0.05,
        weight_decay=0.0,
        teacher=teacher,
        distill=1.0,
        data=small_cifar,
    )
    assert distance() < 0.5 * first
    assert same(teacher.state_dict(), before)


@pytest.mark.parametrize("distill, with_teacher", [
    (1.5, True), (-0.1, True), ("half", True), (0.0, True), (0.5, False),
])
def test_distill_and_teacher_go_together(net, small_cifar, distill, with_teacher):
    teacher = make_net() if with_teacher else None
    with pytest.raises(ValueError, match=f"distill must be .*got {distill!r}"):
        fit(
            net,
            epochs=1,
            batch_size=64,
            lr=0.1,
            weight_decay=0.0,
            teacher=teacher,
            distill=distill,
            data=small_cifar,
        )


# ---------------------------------------------------------------- learned steps, speed


def test_a_float_checkpoint_loads_into_learned_steps_fitted_to_it(net, tmp_path):
    save_weights(net, tmp_path / "float.pt")
    torch.manual_seed(9)
    learned = load_weights(
        ResNetCIFAR(num_layers=8, Nbits=3, quantizer="learned"), tmp_path / "float.pt"
    )
    state = learned.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    for name, step in state.items():
        if name.endswith(".step"):
            assert torch.equal(step, fit_step(state[name.replace("step", "conv.weight")], -4, 3))


def test_a_checkpoint_with_learned_steps_comes_back_whole_and_is_refused_by_a_float_net(
    net, tmp_path
):
    learned = make_net(Nbits=2, quantizer="learned")
    learned.body_op[0].conv1[0].step.data.fill_(0.123)
    save_weights(learned, tmp_path / "learned.pt")
    again = load_weights(make_net(Nbits=2, quantizer="learned"), tmp_path / "learned.pt")
    assert same(again.state_dict(), learned.state_dict())
    with pytest.raises(ValueError, match="another architecture.*step"):
        load_weights(net, tmp_path / "learned.pt")


@pytest.mark.parametrize("n_bits, symmetric", [(2, False), (2, True), (4, False)])
def test_learned_steps_are_trained_and_zeros_are_held(small_cifar, n_bits, symmetric):
    net = make_net(Nbits=n_bits, symmetric=symmetric, quantizer="learned")
    global_prune_by_percentage(net, 50)
    before, steps = sparsity(net), net.body_op[0].conv1[0].step.detach().clone()
    history, _ = fit(net, epochs=2, batch_size=64, lr=0.05, weight_decay=1e-4, data=small_cifar)
    assert not torch.equal(net.body_op[0].conv1[0].step, steps)
    assert [entry["sparsity"] for entry in history] == [before, before] == [sparsity(net)] * 2


def test_ternary_levels_are_trained_and_fitted_to_a_float_checkpoint(net, small_cifar, tmp_path):
    save_weights(net, tmp_path / "float.pt")
    ternary = load_weights(make_net(Nbits=2, quantizer="ternary"), tmp_path / "float.pt")
    layer = ternary.body_op[0].conv1[0]
    before = layer.levels.detach().clone()
    assert torch.equal(before, fit_levels(layer.weight))
    fit(ternary, epochs=1, batch_size=64, lr=0.05, weight_decay=1e-4, data=small_cifar)
    assert not torch.equal(layer.levels, before) and len(layer.quantized_weight().unique()) == 3


def average_by_hand(states, decay):
    averaged = {name: tensor.clone() for name, tensor in states[0].items()}
    for state in states[1:]:
        for name, tensor in state.items():
            if tensor.is_floating_point():
                averaged[name].mul_(decay).add_((1 - decay) * tensor)
    return averaged


def test_averaging_tests_and_ends_with_the_moving_average_of_all_steps(net, small_cifar):
    states, plain = [], copy.deepcopy(net)
    recipe = dict(epochs=2, batch_size=64, lr=0.05, weight_decay=1e-4, data=small_cifar)
    plain_history, _ = fit(plain, after_step=lambda *_: states.append(state_of(plain)), **recipe)
    history, best = fit(net, average=0.6, **recipe)
    expected = average_by_hand(states, 0.6)
    assert len(states) == 8
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name])
    # training is what it was
    assert [e["train_loss"] for e in history] == [e["train_loss"] for e in plain_history]
    assert history[-1]["test_loss"] == pytest.approx(evaluate(net, small_cifar)[0], rel=1e-5)
    assert history[-1]["test_loss"] != pytest.approx(plain_history[-1]["test_loss"], rel=1e-3)
    assert best.keys() == net.state_dict().keys()


def test_an_average_of_a_net_that_was_pruned_on_the_way_is_as_sparse(net, small_cifar):
    history, _ = fit(net, data=small_cifar, before_epoch=prune_in_epoch_2, average=0.99, **RECIPE)
    assert [entry["sparsity"] for entry in history[1:]] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert sparsity(net) == history[-1]["sparsity"]


@pytest.mark.parametrize("options", [dict(average=0.9), dict(regrow=True)], ids=str)
def test_what_is_kept_beside_the_weights_resumes_bit_for_bit(small_cifar, tmp_path, options):
    def arguments(net):
        dynamic = DynamicPruning(net, 50.0, every=3)
        return (
            (
                dict(after_step=dynamic, before_epoch=lambda epoch, net: dynamic.restart())
                if "regrow" in options
                else options
            )
            | dict(data=small_cifar)
            | RECIPE
            | dict(hold_zeros_from=None)
        )

    nets = [make_net() for _ in range(3)]
    fit(nets[0], **arguments(nets[0]))
    fit(nets[1], state_path=tmp_path / "state.pt", **arguments(nets[1]))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["history"]) == 3 and same(nets[1].state_dict(), nets[0].state_dict())

    def stop(epoch, net):
        if epoch == 3:
            raise KeyboardInterrupt
        arguments_of_third.get("before_epoch", lambda *_: None)(epoch, net)

    (tmp_path / "state.pt").unlink()
    arguments_of_third = arguments(nets[2])
    with pytest.raises(KeyboardInterrupt):
        fit(
            nets[2],
            state_path=tmp_path / "state.pt",
            **arguments_of_third | dict(before_epoch=stop),
        )
    resumed = make_net()
    fit(resumed, state_path=tmp_path / "state.pt", **arguments(resumed))
    assert same(resumed.state_dict(), nets[0].state_dict())


def test_short_runs_stay_eager_and_a_cpu_without_a_compiler_too(monkeypatch):
    assert execution("cpu", steps=100)["compile"] is False
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert execution("cpu", steps=10_000)["compile"] is False


def test_training_speed_is_that_of_its_steps(net):
    speed = training_speed(net, batch_size=32)
    assert 10 < speed < 1e6


def test_only_the_size_of_the_first_batch_is_compiled(net, small_cifar, monkeypatch):
    """256 images in batches of 100: the net and its teacher take the last 56 uncompiled, with the
    same result.
    """
    sizes, arguments = (
        [],
        dict(epochs=2, batch_size=100, lr=0.05, weight_decay=0.0, distill=0.5, data=small_cifar),
    )
    monkeypatch.setattr(
        torch, "compile", lambda net, dynamic: lambda x: sizes.append(len(x)) or net(x)
    )
    plain = copy.deepcopy(net)
    fit(net, compile=True, teacher=make_net(), **arguments)
    assert sizes == [100] * 2 * 2 * 2  # of net and teacher, two an epoch
    fit(plain, teacher=make_net(), **arguments)
    assert same(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "arguments", [{}, {"Nbits": 4}, {"Nbits": 2, "quantizer": "learned"}], ids=str
)
def test_nothing_in_an_epoch_waits_for_a_gpu(monkeypatch, arguments):
    """With fake CUDA tensors, which have no values, whatever reads one is an error: only the
    epoch's end does.

    The backward pass is left out, as PyTorch's engine needs a real device.
    """
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    events, fresh_cache = [], functools.lru_cache(cifar10._per_channel.__wrapped__)
    monkeypatch.setattr(cifar10, "_per_channel", fresh_cache)

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

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake_tensor.FakeTensorMode(), Watch():
        with torch.device("cuda"):
            net, teacher = (ResNetCIFAR(num_layers=8, **arguments) for _ in range(2))
            images, labels = (
                torch.empty(256, 3, 32, 32, dtype=torch.uint8),
                torch.zeros(256, dtype=torch.long),
            )
        batches = SoftTargets(Batches(images, labels, 64, augment=True), teacher, 0.5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(fake_tensor.DataDependentOutputException):
            train_epoch(
                net,
                batches,
                optimizer,
                nn.CrossEntropyLoss(),
                hold_zeros=True,
                on_step=events.append,
            )
    assert events[-4:] == [0, 1, 2, 3] and "sent" in events
