"""How a net is computed: the same net, however it is done; timed only where that pays, and bfloat16
only where it is right.
"""

import copy
import sys
import time
from subprocess import SubprocessError
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conftest import first_of, make_net, same, state_of
from train_utils import fit
from training import execution
from training.batches import normalize
from training.execution import (
    Execution,
    bf16_is_right,
    fastest,
    has_bf16,
    has_compiler,
    seconds_a_step,
)
from training.recipe import Recipe

FLOAT, BF16, COMPILED = Execution(), Execution(bf16=True), Execution(compile=True)
BOTH, GRAPH = Execution(bf16=True, compile=True), Execution(graph=True)
BF16_GRAPH = Execution(bf16=True, graph=True)


# ---------------------------------------------------------------- the same net, and threads


def test_logits_are_float32_and_close_in_bfloat16(net, small_cifar):
    x = normalize(small_cifar.test_images[:16])
    net.eval()
    with torch.no_grad():
        exact, rounded = FLOAT.of(net)(x), BF16.of(net)(x)
        assert torch.equal(exact, net(x.contiguous(memory_format=torch.channels_last)))
    assert exact.dtype == rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_gradients_in_bfloat16_reach_the_float32_weights(net, small_cifar):
    x, gradients = normalize(small_cifar.train_images[:64]), []
    for how in (FLOAT, BF16):
        one = copy.deepcopy(net)
        how.of(one)(x).logsumexp(1).sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in one.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert F.cosine_similarity(*gradients, 0) > 0.99 and not torch.equal(*gradients)


@pytest.mark.slow
def test_only_the_size_of_the_first_batch_is_compiled(net, small_cifar, monkeypatch):
    """64 images in batches of 25: the net and its teacher take the last 14 uncompiled, with the
    same result.
    """
    sizes, data = [], first_of(small_cifar, 64, 50)
    recipe = Recipe(epochs=2, batch_size=25, lr=0.05, distill=0.5, test_every=2)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: lambda x: (
        sizes.append((len(x), dynamic)) or net(x)))
    plain = copy.deepcopy(net)
    fit(net, recipe, data, teacher=make_net(), execution=COMPILED)
    assert sizes == [(25, False)] * 2 * 2 * 2  # of net and teacher, two an epoch
    fit(plain, recipe, data, teacher=make_net())
    assert same(net.state_dict(), plain.state_dict())


def test_a_graph_is_of_the_first_size_and_mode_alone(net, small_cifar, monkeypatch):
    """Captured once, after a warm-up that leaves no trace in the BatchNorms."""
    captured, replayed = [], []

    def capture(module, sample):
        assert len(list(module.parameters())) == len(list(net.parameters()))
        captured.append([module(*sample) for _ in range(3)])
        return lambda x: (replayed.append(len(x)), module(x))[1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    x, plain = normalize(small_cifar.train_images[:64]), copy.deepcopy(net)
    forward = Execution(graph=True).of(net)
    for net_, how in ((net, forward), (plain, FLOAT.of(plain))):
        for images, training in ((x, True), (x[:20], True), (x, True), (x, False)):
            logits = how(images) if net_.train(training) else None
            logits.sum().backward()
    assert len(captured) == 1 and replayed == [64, 64]
    assert same(net.state_dict(), plain.state_dict())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), plain.parameters()))


def test_on_a_cpu_there_is_no_graph(net, small_cifar):
    x = normalize(small_cifar.test_images[:16])
    assert torch.equal(Execution(graph=True).of(net.eval())(x), FLOAT.of(net)(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_graph_trains_the_same_net(net, small_cifar, bf16):
    data, nets = small_cifar.to("cuda"), [copy.deepcopy(net).cuda() for _ in range(2)]
    recipe = Recipe(epochs=2, batch_size=100, distill=0.5, test_every=2)
    for one, graph in zip(nets, (False, True)):
        fit(one, recipe, data, teacher=make_net().cuda(), execution=Execution(bf16, graph=graph))
    states = [net.state_dict() for net in nets]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_an_evaluation_is_in_float32_however_the_net_is_trained(net, small_cifar, monkeypatch):
    """The record of a run has to hold on every machine."""
    seen, tested = [], nn.functional.conv2d

    def watched(x, *arguments):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return tested(x, *arguments)

    monkeypatch.setattr(F, "conv2d", watched)
    fit(net, Recipe(epochs=1, batch_size=32), first_of(small_cifar, 64, 50), execution=BF16)
    assert set(seen) == {(True, True), (False, False)}


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), Execution(threads=before + 1).in_its_threads():
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------- the fastest


@pytest.fixture
def timed(monkeypatch):
    """Let each Execution take the seconds given, on a machine that can do everything; returns what
    was timed.
    """
    def make(seconds, bf16=True, right=True, compiler=True):
        calls = []
        monkeypatch.setattr(execution, "has_bf16", lambda device: bf16)
        monkeypatch.setattr(execution, "bf16_is_right", lambda net: right)
        monkeypatch.setattr(execution, "has_compiler", lambda: compiler)
        monkeypatch.setattr(execution, "seconds_a_step",
                            lambda net, size, how: calls.append(how) or seconds[how])
        return calls

    return make


@pytest.mark.parametrize("seconds, expected", [
    ((1.0, 2.0, 2.0, 2.0), FLOAT),
    ((1.0, 0.5, 2.0, 2.0), BF16),
    ((1.0, 2.0, 0.5, 2.0), COMPILED),
    ((1.0, 0.5, 2.0, 0.2), BOTH),
    ((1.0, 0.92, 2.0, 2.0), FLOAT),  # faster, but by less than a tenth
    ((1.0, 0.90, 2.0, 2.0), BF16),
    ((1.0, 2.0, 0.92, 2.0), FLOAT),
    ((1.0, 2.0, 0.90, 2.0), COMPILED),
    ((1.0, 0.50, 2.0, 0.46), BF16),
    ((1.0, 0.50, 2.0, 0.45), BOTH),
    ((1.0, 0.92, 0.85, 0.1), COMPILED),  # bfloat16 was out already
], ids=str)
def test_what_takes_more_is_taken_only_if_it_is_clearly_faster(net, timed, seconds, expected):
    """Seconds of float32, of bfloat16, of compiled float32, and of both."""
    timed(dict(zip((FLOAT, BF16, COMPILED, BOTH), seconds)))
    assert fastest(net, 64) == expected


@pytest.mark.parametrize("steps", [1, 100, 999])
def test_short_runs_are_not_timed(net, timed, steps):
    calls = timed({})
    assert fastest(net, 64, steps) == FLOAT and calls == []


def test_long_runs_are_timed_on_the_net_and_batch_they_have(net, monkeypatch, timed):
    timed({})
    calls = []
    monkeypatch.setattr(execution, "seconds_a_step", lambda *given: calls.append(given) or 1)
    assert fastest(net, 96, 1000) == FLOAT
    assert [how for _, _, how in calls] == [FLOAT, BF16, COMPILED]
    assert all(of is net and size == 96 for of, size, _ in calls)


@pytest.mark.parametrize("machine, tried", [
    (dict(bf16=False), [FLOAT, COMPILED]),
    (dict(right=False), [FLOAT, COMPILED]),
    (dict(compiler=False), [FLOAT, BF16]),
    (dict(bf16=False, compiler=False), [FLOAT]),
], ids=str)
def test_what_the_machine_cannot_do_is_not_tried(net, timed, machine, tried):
    calls = timed({FLOAT: 1.0, BF16: 0.99, COMPILED: 0.99, BOTH: 0.99}, **machine)
    assert fastest(net, 64) == FLOAT and calls == tried


def test_a_compilation_that_fails_is_left_out(net, timed, monkeypatch):
    """As one does without Python's headers."""
    calls = timed({FLOAT: 1.0, BF16: 0.5})
    whole = execution.seconds_a_step

    def failing(net, size, how):
        if how.compile:
            raise SubprocessError("Python.h: No such file or directory")
        return whole(net, size, how)

    monkeypatch.setattr(execution, "seconds_a_step", failing)
    with pytest.warns(UserWarning, match="torch.compile fails .*Python.h"):
        assert fastest(net, 64) == BF16
    assert calls == [FLOAT, BF16]


def test_a_cpu_without_a_compiler_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler()
    monkeypatch.setenv("CXX", sys.executable)
    assert has_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    assert has_compiler()


@pytest.fixture
def on_gpu():
    """A net of which `fastest` is to think that it is on a GPU."""
    parameter = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(parameters=lambda: iter([parameter]))


@pytest.mark.parametrize("took, expected", [(0.40, BF16_GRAPH), (0.46, GRAPH)], ids=str)
def test_on_a_gpu_a_graph_is_tried_and_nothing_is_compiled(on_gpu, timed, took, expected):
    """bfloat16 is timed in a graph: launched one by one, its kernels may take longer."""
    calls = timed({FLOAT: 1.0, GRAPH: 0.5, BF16_GRAPH: took})
    assert fastest(on_gpu, 64) == expected and calls == [FLOAT, GRAPH, BF16_GRAPH]


def test_a_graph_that_fails_is_left_out(on_gpu, timed):
    timed({FLOAT: 1.0, BF16: 0.5})  # a KeyError for the graph
    with pytest.warns(UserWarning, match="a CUDA graph fails .*KeyError"):
        assert fastest(on_gpu, 64) == BF16


def test_bfloat16_that_fails_is_left_out(net, timed, monkeypatch):
    timed({FLOAT: 1.0, COMPILED: 0.5})  # a KeyError for bfloat16
    with pytest.warns(UserWarning, match="bfloat16 fails .*KeyError"):
        assert fastest(net, 64) == COMPILED

    def failing(net):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(execution, "bf16_is_right", failing)
    with pytest.warns(UserWarning, match="bfloat16 fails .*no memory"):
        assert fastest(net, 64) == COMPILED


def test_bfloat16_is_for_hardware_that_multiplies_it(monkeypatch):
    for amx, avx512 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        assert has_bf16(torch.device("cpu")) is (amx or avx512)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)  # as in another PyTorch
    assert has_bf16(torch.device("cpu")) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    assert has_bf16(torch.device("cuda")) is False


# ---------------------------------------------------------------- how long a step takes


def test_a_step_takes_the_least_of_those_after_the_second(net, monkeypatch):
    """A clock that says how long each of six steps took."""
    took = [0.5, 0.1, 3.0, 2.0, 5.0, 4.0]
    ticks = [tick for i, seconds in enumerate(took) for tick in (10.0 * i, 10.0 * i + seconds)]
    monkeypatch.setattr(time, "perf_counter", iter(ticks).__next__)
    assert seconds_a_step(net, 4) == pytest.approx(2.0)


def test_what_is_timed_is_training_in_the_way_asked_for(net, monkeypatch):
    seen, backward = [], torch.Tensor.backward
    net.eval().register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_autocast_enabled("cpu"))))
    monkeypatch.setattr(torch.Tensor, "backward",
                        lambda loss: seen.append("backward") or backward(loss))
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append("step"))
    seconds_a_step(net, 4, BF16, steps=1)
    hook.remove()
    assert seen == [(True, True), "backward", "step"] * 3


def test_timing_leaves_the_net_as_it_was(net):
    net.eval()
    before = state_of(net)
    seconds_a_step(net, 8, steps=1)
    assert same(net.state_dict(), before) and not net.training
    assert all(p.grad is None for p in net.parameters())


# ---------------------------------------------------------------- bfloat16 that is wrong


class Times(torch.autograd.Function):
    """The identity, whose gradient is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def disturb(monkeypatch, where, factor=1.02, concerned=lambda w, stride: True):
    """Let bfloat16 convolutions that are `concerned` be wrong by 2 %, in one of three results."""
    exact = F.conv2d

    def conv2d(x, w, bias=None, stride=1, padding=0, *others):
        if x.dtype != torch.bfloat16 or not concerned(w, stride):
            return exact(x, w, bias, stride, padding, *others)
        x = Times.apply(x, factor) if where == "input gradient" else x
        w = Times.apply(w, factor) if where == "weight gradient" else w
        y = exact(x, w, bias, stride, padding, *others)
        return y * factor if where == "output" else y

    monkeypatch.setattr(execution.F, "conv2d", conv2d)


WHERE = pytest.mark.parametrize("where", ["output", "input gradient", "weight gradient"])


@WHERE
def test_bfloat16_that_is_wrong_is_refused(net, monkeypatch, where):
    assert bf16_is_right(net)
    disturb(monkeypatch, where)
    assert not bf16_is_right(net)


@WHERE
def test_bfloat16_that_is_not_finite_is_refused(net, monkeypatch, where):
    disturb(monkeypatch, where, factor=float("nan"))
    assert not bf16_is_right(net)


@WHERE
def test_bfloat16_may_be_wrong_by_its_own_rounding(net, monkeypatch, where):
    disturb(monkeypatch, where, factor=1.005)
    assert bf16_is_right(net)


@pytest.mark.parametrize("arguments", [{}, {"Nbits": 4}], ids=str)
@pytest.mark.parametrize("concerned", [
    lambda w, stride: w.shape[1] == 3,
    lambda w, stride: w.shape == (64, 64, 3, 3),
    lambda w, stride: w.shape[2:] == (1, 1),
    lambda w, stride: tuple(stride) == (2, 2) and w.shape[2:] == (3, 3),
    lambda w, stride: w.shape[2:] == (3, 3) and w.is_contiguous(memory_format=torch.channels_last),
], ids=["first", "last", "1x1", "stride 2", "channels last"])
def test_every_kind_of_convolution_in_the_net_is_looked_at(monkeypatch, concerned, arguments):
    disturb(monkeypatch, "output", concerned=concerned)
    assert not bf16_is_right(make_net(**arguments))


@pytest.mark.parametrize("layer, concerned, right", [
    (nn.Conv2d(3, 4, 5, padding=2), lambda w, stride: w.shape == (4, 3, 5, 5), False),
    (nn.Conv2d(3, 4, 5, padding=2), lambda w, stride: w.shape == (4, 3, 3, 3), True),
])
def test_convolutions_of_torch_are_looked_at_too_and_no_others(
    monkeypatch, layer, concerned, right
):
    disturb(monkeypatch, "output", concerned=concerned)
    assert bf16_is_right(nn.Sequential(layer, nn.ReLU())) is right


def test_wrong_bfloat16_is_not_timed(net, monkeypatch):
    calls = []
    monkeypatch.setattr(execution, "has_bf16", lambda device: True)
    monkeypatch.setattr(execution, "has_compiler", lambda: False)
    monkeypatch.setattr(execution, "seconds_a_step",
                        lambda net, size, how: calls.append(how) or 1 - 0.5 * how.bf16)
    assert fastest(net, 64) == BF16
    disturb(monkeypatch, "weight gradient")
    calls.clear()
    assert fastest(net, 64) == FLOAT and calls == [FLOAT]


def test_looking_leaves_the_net_as_it_was(net):
    before = state_of(net)
    bf16_is_right(net)
    assert same(net.state_dict(), before) and net.training
    assert not any(m._forward_pre_hooks for m in net.modules())
