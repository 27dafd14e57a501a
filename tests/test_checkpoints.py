"""Weights on disk, hostile files among them, and trainings killed and resumed bit for bit."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import train_utils
from cifar10 import CIFAR10
from conftest import REPOSITORY, Bomb, interrupted, make_net, no_space, same, state_of
from conftest import without_seconds
from FP_layers import FP_Linear, Learned, fit_step
from pruning import prune_before_epoch
from resnet20 import ResNetCIFAR
from train_utils import fit
from training.checkpoints import atomic_save, load_weights, save_weights
from training.journal import Journal
from training.recipe import Pruning, Recipe

# ---------------------------------------------------------------- killed and resumed


# Everything that has a state of its own, or depends on the epoch.
RECIPE = Recipe(
    epochs=3, batch_size=64, lr=0.05, weight_decay=1e-3, momentum=0.9, nesterov=True,
    schedule="cosine", warmup=0.2, cutout=8, distill=0.3, temperature=2.0,
)


@pytest.fixture(scope="module")
def data(small_cifar):
    """Three steps an epoch, the last of which is smaller."""
    return CIFAR10(*(tensor[:n].clone() for tensor, n in zip(small_cifar, (150, 150, 100, 100))))


def make_teacher():
    teacher = make_net()
    teacher.final_fc.linear.weight.data *= 20
    return teacher


def train(data, state_path=None, net=None):
    """Return (net, history, best) of a training that is pruned on the way, from `state_path` on."""
    net = make_net(Nbits=4) if net is None else net
    journal = Journal("run", state_path)
    fit(net, RECIPE, data, pruning=Pruning("global", 50.0, epochs=2), seed=5,
        teacher=make_teacher(), journal=journal)
    return net, journal.history, journal.best["state"]


@pytest.fixture(scope="module")
def unbroken(data):
    net, history, best = train(data)
    return state_of(net), without_seconds(history), best


def assert_resumes_to(unbroken, data, state_path):
    state, expected_history, expected_best = unbroken
    net = make_net(Nbits=4)
    net.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
    net, history, best = train(data, state_path, net)
    assert without_seconds(history) == expected_history
    assert same(net.state_dict(), state) and same(best, expected_best)


@pytest.mark.slow
def test_a_run_that_fails_between_epochs_resumes_bit_for_bit(monkeypatch, unbroken, data, tmp_path):
    def fail(net, pruning, at):
        if at == 2:  # the killed one below fails in the third
            raise KeyboardInterrupt
        prune_before_epoch(net, pruning, at)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_utils, "prune_before_epoch", fail)
        train(data, tmp_path / "state.pt")
    history = torch.load(tmp_path / "state.pt", weights_only=True)["history"]
    assert [entry["epoch"] for entry in history] == [1]
    assert_resumes_to(unbroken, data, tmp_path / "state.pt")


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, "tests")
from test_checkpoints import train
from cifar10 import CIFAR10

torch.set_num_threads(int(sys.argv[2]))
calls, backward = [], torch.Tensor.backward

def kill_in_the_third_epoch(loss):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    backward(loss)

torch.Tensor.backward = kill_in_the_third_epoch
data = CIFAR10(*torch.load("{path}", weights_only=True))
train(data, sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(unbroken, data, tmp_path):
    state_path = tmp_path / "state.pt"
    torch.save(list(data), tmp_path / "data.pt")
    process = subprocess.run(
        [sys.executable, "-c", KILLED.format(path=tmp_path / "data.pt"), state_path,
         str(torch.get_num_threads())],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert len(torch.load(state_path, weights_only=True)["history"]) == 2
    assert_resumes_to(unbroken, data, state_path)


def test_a_training_that_is_done_is_not_done_again(monkeypatch, unbroken, data, tmp_path):
    train(data, tmp_path / "state.pt")
    monkeypatch.setattr(train_utils, "train_epoch", None)
    assert_resumes_to(unbroken, data, tmp_path / "state.pt")


def keep_one_epoch(path, data, tag=None):
    fit(make_net(), Recipe(epochs=1, batch_size=128), data, journal=Journal("run", path, tag))


def test_a_state_with_another_tag_is_refused(net, data, tmp_path):
    keep_one_epoch(tmp_path / "state.pt", data, tag={"lr": 0.1})
    before = state_of(net)
    with pytest.raises(ValueError, match="state.pt cannot be resumed from.*another config.*delete"):
        fit(net, Recipe(), data, journal=Journal("run", tmp_path / "state.pt", {"lr": 0.2}))
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("damage", [
    lambda path, state: path.write_bytes(b"PK\3\4"),
    lambda path, state: torch.save(state | {"net": {}}, path),
    *(lambda path, state, name=name: torch.save({k: v for k, v in state.items() if k != name}, path)
      for name in ("optimizer", "history", "best", "tag")),
    lambda path, state: torch.save(state | {"optimizer": {"state": {}, "param_groups": []}}, path),
    lambda path, state: torch.save([state], path),
], ids=["no archive", "no weights", "no optimizer", "no history", "no best", "no tag",
        "of another optimizer", "list"])
def test_a_damaged_state_is_refused(net, data, tmp_path, damage):
    path = tmp_path / "state.pt"
    keep_one_epoch(path, data)
    damage(path, torch.load(path, weights_only=True))
    before = state_of(net)
    with pytest.raises(ValueError, match="(?s)state.pt cannot be resumed from.*delete it"):
        fit(net, Recipe(epochs=2, batch_size=128), data, journal=Journal("run", path))
    assert same(net.state_dict(), before)


# ---------------------------------------------------------------- weights on disk


def test_weights_come_back_as_they_were_saved(net, tmp_path):
    torch.nn.init.normal_(net.head_conv[1].running_mean)
    save_weights(net, tmp_path / "new" / "net.pt")
    other = load_weights(ResNetCIFAR(num_layers=8), tmp_path / "new" / "net.pt")
    assert same(other.state_dict(), net.state_dict())
    assert same(torch.load(tmp_path / "new" / "net.pt", weights_only=True), net.state_dict())


def test_tensors_are_saved_in_the_usual_order_however_they_lie_in_memory(net, tmp_path):
    save_weights(net.to(memory_format=torch.channels_last), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_a_state_dict_saved_by_plain_torch_is_taken(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert same(
        load_weights(ResNetCIFAR(num_layers=8), tmp_path / "net.pt").state_dict(), net.state_dict()
    )


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
            altered(lambda state: state.update(
                {"module.final_fc.linear.bias": state.pop("final_fc.linear.bias")})),
            "another architecture.*module.final_fc",
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
        "one prefix",
        "shape",
        "no tensor",
        "NaN",
    ],
)
def test_a_file_that_is_no_checkpoint_of_the_net_is_refused(
    net, tmp_path, monkeypatch, write, complaint
):
    monkeypatch.chdir(tmp_path)  # where the bomb would go off
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


# ---------------------------------------------------------------- learned steps


def test_a_float_checkpoint_loads_into_learned_steps_fitted_to_it(net, tmp_path):
    save_weights(net, tmp_path / "float.pt")
    torch.manual_seed(9)
    learned = load_weights(
        ResNetCIFAR(num_layers=8, Nbits=3, quantizer=Learned), tmp_path / "float.pt"
    )
    state = learned.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    for name, step in state.items():
        if name.endswith(".step"):
            weight = state[name.replace("quantizer.step", "conv.weight")]
            assert torch.equal(step, fit_step(weight, -4, 3))


def test_a_linear_layer_s_learned_steps_are_fitted_too(tmp_path):
    net = torch.nn.Sequential(FP_Linear(6, 4))
    save_weights(net, tmp_path / "net.pt")
    learned = torch.nn.Sequential(FP_Linear(6, 4, Nbits=3, quantizer=Learned))
    load_weights(learned, tmp_path / "net.pt")
    assert torch.equal(learned[0].quantizer.step, fit_step(net[0].weight, -4, 3))


def test_a_checkpoint_with_learned_steps_comes_back_whole_and_is_refused_by_a_float_net(
    net, tmp_path
):
    learned = make_net(Nbits=2, quantizer=Learned)
    learned.body_op[0].conv1[0].quantizer.step.data.fill_(0.123)
    save_weights(learned, tmp_path / "learned.pt")
    again = load_weights(make_net(Nbits=2, quantizer=Learned), tmp_path / "learned.pt")
    assert same(again.state_dict(), learned.state_dict())
    with pytest.raises(ValueError, match="another architecture.*step"):
        load_weights(net, tmp_path / "learned.pt")
