"""Muon against torch.optim.Muon, SGD and the singular value decomposition."""

import copy

import pytest
import torch
from torch import nn

from conftest import make_net
from FP_layers import Learned
from training.optimizer import Muon, make_optimizer, orthogonal
from training.recipe import Recipe

SHAPES = [(16, 16), (32, 9), (9, 40), (10, 1)]


def random_tensors(shape, n):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def take_steps(parameter, gradients, optimizer):
    """Return the parameter after each step."""
    states = []
    for gradient in gradients:
        parameter.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
        states.append(parameter.detach().clone())
    return states


def steps_of_muon(start, gradients, muon_lr=0.02, **sgd):
    """Return what our Muon makes of one matrix; what it has for SGD must not matter to it."""
    matrix, other = (nn.Parameter(t.clone(memory_format=torch.preserve_format))
                     for t in (start, torch.zeros(3)))
    sgd = dict(lr=0.5, momentum=0.3, nesterov=True, weight_decay=0.1) | sgd
    return take_steps(matrix, gradients, Muon([matrix], [other], muon_lr, **sgd))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="since PyTorch 2.9")
@pytest.mark.parametrize("in_float32", [True, False], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_move_as_by_torchs_muon(monkeypatch, shape, in_float32):
    """PyTorch's iterates in bfloat16, which has 8 bits; kept from it, the two agree to rounding."""
    if in_float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    start, *gradients = random_tensors(shape, 6)
    parameter = nn.Parameter(start.clone())
    oracle = torch.optim.Muon([parameter], lr=0.02, momentum=0.9, nesterov=True, ns_steps=4,
                              weight_decay=0)
    expected = take_steps(parameter, gradients, oracle)
    ours = steps_of_muon(start, gradients)
    before = [start, *expected]
    for i, (a, b) in enumerate(zip(ours, expected)):
        step = b - before[i]
        error = ((a - [start, *ours][i]) - step).norm() / step.norm()
        assert error < (1e-4 if in_float32 else 0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (40, 4, 3, 3), (32, 16, 1, 1)], ids=str)
def test_a_convolution_moves_as_the_matrix_of_its_filters(shape, memory_format):
    start, *gradients = (t.to(memory_format=memory_format) for t in random_tensors(shape, 5))
    convolution = steps_of_muon(start, gradients)
    matrix = steps_of_muon(start.flatten(1), [g.flatten(1) for g in gradients])
    for a, b in zip(convolution, matrix):
        assert a.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(a.flatten(1), b)


def test_what_is_no_matrix_moves_as_by_sgd():
    sgd = dict(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01)
    start, *gradients = random_tensors((5, 3), 5)
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    matrix = nn.Parameter(torch.ones(4, 4))
    expected = take_steps(parameters[0], gradients, torch.optim.SGD(parameters[:1], **sgd))
    ours = take_steps(parameters[1], gradients, Muon([matrix], parameters[1:], 0.3, **sgd))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    assert torch.equal(matrix, torch.ones(4, 4))  # which had no gradient


# ---------------------------------------------------------------- orthogonal steps


@pytest.mark.parametrize("shape", [(16, 16), (64, 576), (32, 144), (48, 12), (1, 7)], ids=str)
def test_singular_vectors_stay_and_singular_values_come_near_1(shape):
    matrix, = random_tensors(shape, 1)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = s / s.square().sum().sqrt()
    for _ in range(4):  # the polynomial of the source, on numbers
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    result = orthogonal(matrix).double()
    torch.testing.assert_close(result, u @ expected.diag() @ vh, rtol=1e-3, atol=1e-4)
    values = torch.linalg.svdvals(result)[s > 0.05 * s.max()]
    assert 0.65 < values.min() and values.max() < 1.25


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_size_of_a_gradient_does_not_matter(scale):
    matrix, = random_tensors((12, 30), 1)
    torch.testing.assert_close(orthogonal(scale * matrix), orthogonal(matrix), rtol=1e-3, atol=1e-4)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(4, 9)), torch.zeros(4, 9))


# ---------------------------------------------------------------- the optimizer of a recipe


def names_of(net, parameters):
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("arguments", [{}, dict(Nbits=2, quantizer=Learned)],
                         ids=["float", "2 bit"])
def test_muon_trains_the_convolutions_but_the_first_and_sgd_the_rest(arguments):
    net = make_net(**arguments)
    recipe = Recipe(optimizer="muon", muon_lr=0.03, lr=0.1, momentum=0.8, nesterov=True,
                    weight_decay=0.01)
    optimizer = make_optimizer(net, recipe)
    others, matrices = optimizer.param_groups
    convolutions = {name for name, _ in net.named_parameters() if name.endswith("conv.weight")}
    assert len(convolutions) == 1 + 6 + 2  # ResNet-8: head, blocks, projections
    assert names_of(net, matrices["params"]) == convolutions - {"head_conv.0.conv.weight"}
    assert (names_of(net, others["params"]) | names_of(net, matrices["params"])
            == {name for name, _ in net.named_parameters()})
    assert len(others["params"]) + len(matrices["params"]) == len(list(net.parameters()))
    assert [group["initial_lr"] for group in (others, matrices)] == [0.1, 0.03]
    assert (others["momentum"], others["nesterov"], others["weight_decay"]) == (0.8, True, 0.01)


def test_the_assigned_optimizer_is_sgd_on_everything(net):
    optimizer = make_optimizer(net, Recipe(lr=0.3, momentum=0.7, weight_decay=0.02))
    assert type(optimizer) is torch.optim.SGD
    group, = optimizer.param_groups
    assert names_of(net, group["params"]) == {name for name, _ in net.named_parameters()}
    assert [group[name] for name in ("lr", "initial_lr", "momentum", "nesterov", "weight_decay")
            ] == [0.3, 0.3, 0.7, False, 0.02]


def test_momentum_is_kept_with_the_state_and_goes_on(net):
    """Two steps, the state given to another optimizer, and one more step."""
    recipe = Recipe(optimizer="muon", muon_lr=0.02, lr=0.1)
    gradients = [random_tensors(p.shape, 3) for p in net.parameters()]

    def step(net, optimizer, i):
        for parameter, gradient in zip(net.parameters(), gradients):
            parameter.grad = gradient[i].clone()
        optimizer.step()

    optimizer = make_optimizer(net, recipe)
    for i in range(2):
        step(net, optimizer, i)
    other, forgetful = copy.deepcopy(net), copy.deepcopy(net)
    resumed = make_optimizer(other, recipe)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((net, optimizer), (other, resumed),
                     (forgetful, make_optimizer(forgetful, recipe))):
        step(one, its, 2)
    for a, b, c in zip(net.parameters(), other.parameters(), forgetful.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, c)
