"""Pruning against np.percentile and torch.nn.utils.prune."""

import copy
import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from conftest import same, state_of
from FP_layers import FP_Conv, FP_Linear
from pruning import (
    apply_masks,
    global_prune_by_percentage,
    layer_sparsity,
    percentile,
    prunable_layers,
    prune_before_epoch,
    prune_by_percentage,
    sparsity,
    weight_masks,
)
from resnet20 import ResNetCIFAR
from training.recipe import Pruning


def linear(values):
    layer = nn.Linear(len(values), 1)
    layer.weight.data = torch.tensor([values], dtype=torch.float32)
    return layer


# ---------------------------------------------------------------- one layer


def near_a_weight(position):
    """Whether rounding may decide if the percentile is a weight or lies between two."""
    return abs(position - round(position)) < 1e-9


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.floats(0, 100))
@example([1, 2], 99.99)  # two neighbours: the lower falls, the upper stays
@example([0.5] * 30 + [1] * 20, 70)
def test_weights_at_or_below_numpys_percentile_are_zero_and_others_untouched(values, q):
    assume(not near_a_weight(Fraction(q) * (len(values) - 1) / 100) or q in (0, 100))
    layer = linear(values)
    before = layer.weight.detach().numpy().copy()
    prune_by_percentage(layer, q)
    magnitudes = np.abs(before.astype(np.float64))
    expected = np.where(magnitudes <= np.percentile(magnitudes, q), np.float32(0), before)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected)


@given(st.integers(1, 400), st.integers(0, 100), st.randoms(use_true_random=False))
@example(51, 58, Random(0))  # 0.58 * 50 is below 29 in binary
def test_counts_are_exact_for_distinct_magnitudes(n, q, random):
    """floor(q (n - 1) / 100) + 1 weights, in exact arithmetic."""
    values = list(range(1, n + 1))
    random.shuffle(values)
    layer = linear([value * random.choice((-1, 1)) for value in values])
    prune_by_percentage(layer, q)
    pruned = int((layer.weight == 0).sum())
    assert pruned == math.floor(Fraction(q, 100) * (n - 1)) + 1
    assert layer.weight.abs().flatten().sort().values[pruned:].tolist() == list(
        range(pruned + 1, n + 1)
    )


@pytest.mark.parametrize("q", [10, 30.0, 70.0, 99.5])
def test_the_mask_is_that_of_torchs_l1_unstructured(q):
    torch.manual_seed(1)
    ours, theirs = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)
    theirs.load_state_dict(ours.state_dict())
    prune_by_percentage(ours, q)
    prune.l1_unstructured(theirs, "weight", amount=int((ours.weight == 0).sum()))
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("values, q, expected", [
    ([1, -1, 1, 2], 10, [0, 0, 0, 2]),  # ties fall together
    ([3, -1, 2], 0, [3, 0, 2]),
    ([3, -1, 2], 100, [0, 0, 0]),
    ([0, 0, 0, 5], 50, [0, 0, 0, 5]),
    ([-7], 70, [0]),
])
def test_edges(values, q, expected):
    layer = linear(values)
    prune_by_percentage(layer, q)
    assert layer.weight.flatten().tolist() == expected


@pytest.mark.parametrize(
    "make", [lambda: FP_Conv(4, 4, 3), lambda: FP_Linear(30, 7), lambda: nn.Conv2d(4, 4, 3)]
)
def test_the_course_wrappers_and_plain_layers_are_taken(make):
    layer = make()
    prune_by_percentage(layer)
    assert sparsity(layer) == pytest.approx(0.70, abs=0.01)


class Wrapper(nn.Module):
    """A layer around another one, as the course's skeleton has it."""

    def __init__(self, **child):
        super().__init__()
        self.__dict__.update(child)


@pytest.mark.parametrize("child", ["conv", "linear"])
def test_wrappers_that_show_no_weight_themselves_are_taken(child):
    inner = linear([3, -1, 2])
    prune_by_percentage(Wrapper(**{child: inner}), 50)
    assert inner.weight.tolist() == [[3, 0, 0]]


@pytest.mark.parametrize("prune_it", [prune_by_percentage, global_prune_by_percentage])
def test_70_percent_are_pruned_unless_said_otherwise(prune_it):
    layer = linear(range(1, 102))
    prune_it(layer)
    assert int((layer.weight == 0).sum()) == 71  # the 70 % below the 71st weight, and that one


def test_a_layer_without_weights_is_refused():
    for layer in (nn.ReLU(), nn.BatchNorm2d(4)):
        name = type(layer).__name__
        with pytest.raises(TypeError, match=f"layer must be an nn.Conv2d.*got {name}"):
            prune_by_percentage(layer)


def test_a_weight_that_is_computed_anew_is_refused():
    """What is pruned in it would be back with the next forward pass."""
    layer = FP_Conv(3, 4, 3)
    prune.l1_unstructured(layer.conv, "weight", 0.1)
    for prune_it in (prune_by_percentage, global_prune_by_percentage):
        before = layer.conv.weight.clone()
        with pytest.raises(TypeError, match="prune.remove makes it permanent"):
            prune_it(layer)
        assert torch.equal(layer.conv.weight, before)
    prune.remove(layer.conv, "weight")
    prune_by_percentage(layer)
    layer(torch.zeros(1, 3, 8, 8))
    assert sparsity(layer) == pytest.approx(0.7, abs=0.01)


def test_no_magnitudes_have_no_percentile():
    with pytest.raises(ValueError, match="magnitudes must have at least one element, got none"):
        percentile(torch.zeros(0), 50)


# ---------------------------------------------------------------- the whole net


@pytest.mark.parametrize("q", [7.0, 50.0, 70.0])
def test_the_global_mask_is_that_of_torchs_global_unstructured(net, q):
    theirs = ResNetCIFAR(num_layers=8)
    theirs.load_state_dict(net.state_dict())
    global_prune_by_percentage(net, q)
    pruned = sum(int((layer.weight == 0).sum()) for _, layer in prunable_layers(net))
    parameters = [(m, "weight") for name, m in theirs.named_modules()
                  if isinstance(m, (nn.Conv2d, nn.Linear)) and "id_mapping" not in name]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=pruned)
    assert pruned == pytest.approx(q / 100 * sum(m.weight.numel() for m, _ in parameters), abs=1)
    for (_, ours), (expected, _) in zip(prunable_layers(net), parameters, strict=True):
        assert torch.equal(ours.weight, expected.weight)


def test_global_pruning_leaves_shortcuts_norms_and_biases_alone(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    global_prune_by_percentage(net, 90.0)
    changed = {
        name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])
    }
    names = [name for name, _ in prunable_layers(net)]
    assert changed == {
        f"{name}.{'linear' if name == 'final_fc' else 'conv'}.weight" for name in names
    }
    assert not any("id_mapping" in name for name in changed)


def test_prunable_layers_are_named_in_forward_order(net):
    assert [name for name, _ in prunable_layers(net)] == [
        "head_conv.0",
        *(f"body_op.{block}.conv{i}.0" for block in range(3) for i in (1, 2)),
        "final_fc",
    ]


# ---------------------------------------------------------------- epoch by epoch


@pytest.mark.parametrize("method", ["layer", "global"])
@pytest.mark.parametrize("epochs, percentages", [
    (0, [80, None, None, None, None]), (1, [80, None, None, None, None]),
    (4, [20, 40, 60, 80, None]),
])
def test_before_each_epoch_it_is_pruned_as_planned(net, method, epochs, percentages):
    pruning, expected = Pruning(method, 80, epochs), copy.deepcopy(net)
    for epoch, q in enumerate(percentages, 1):
        if q is not None and method == "global":
            global_prune_by_percentage(expected, q)
        elif q is not None:
            for _, layer in prunable_layers(expected):
                prune_by_percentage(layer, q)
        prune_before_epoch(net, pruning, epoch)
        assert same(net.state_dict(), expected.state_dict())
        assert sparsity(net) == pytest.approx(next(
            q for q in reversed(percentages[:epoch]) if q is not None) / 100, abs=0.002)
        with torch.no_grad():  # between prunings weights are trained
            for each in (net, expected):
                each.final_fc.weight.add_(0.01 * (each.final_fc.weight != 0))


def test_without_a_method_nothing_is_pruned(net):
    before = state_of(net)
    for epoch in (1, 2, 10):
        prune_before_epoch(net, Pruning(), epoch)
    assert same(net.state_dict(), before)


# ---------------------------------------------------------------- allowed, or refused unchanged


both = pytest.mark.parametrize("prune_it", [prune_by_percentage, global_prune_by_percentage])


@both
@pytest.mark.parametrize(
    "number", [int, float, np.float64, np.float32, np.int64, np.int8, Fraction]
)
def test_any_real_number_is_a_percentage(prune_it, number):
    """Of 5 weights, and of as many as a ResNet-20 has: floor(71 * 268369 / 100) + 1."""
    layer = linear([1, 2, 3, 4, 5])
    prune_it(layer, number(70))
    assert layer.weight.tolist() == [[0, 0, 0, 4, 5]]
    layer = linear(range(1, 268_371))
    prune_it(layer, number(71))
    assert int((layer.weight == 0).sum()) == 190_542 and layer.weight[0, 190_542] == 190_543


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(prune_it, poison):
    layer = linear([1, 2, poison, 3])
    with pytest.raises(ValueError, match="magnitudes must be finite"):
        prune_it(layer, 50)
    assert layer.weight[0, :2].tolist() == [1, 2]


@pytest.mark.parametrize("function", [global_prune_by_percentage, sparsity])
def test_a_net_without_layers_is_refused(function):
    with pytest.raises(ValueError, match="no conv or linear layer"):
        function(nn.ReLU())


# ---------------------------------------------------------------- masks and sparsity


def test_masks_bring_pruned_weights_back_to_zero_and_keep_the_others(net):
    global_prune_by_percentage(net, 70.0)
    masks = weight_masks(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.5)
    grown = [layer.weight.detach().clone() for _, layer in prunable_layers(net)]
    shortcut = net.body_op[1].id_mapping[0].conv.weight.clone()
    apply_masks(net, masks)
    for (_, layer), mask, weight in zip(prunable_layers(net), masks, grown, strict=True):
        assert torch.equal(layer.weight, torch.where(mask == 0, 0, weight))
    assert sparsity(net) == pytest.approx(0.7, abs=1e-3)
    assert torch.equal(net.body_op[1].id_mapping[0].conv.weight, shortcut)


def test_masks_of_another_net_are_refused(net):
    masks, before = weight_masks(net), state_of(net)
    for others in (masks[:-1], [*masks[:-1], torch.zeros(9, 64)]):
        with pytest.raises(ValueError, match="masks must be those of the net's prunable layers"):
            apply_masks(net, others)
    assert same(net.state_dict(), before)


def test_masks_hold_layers_whose_names_differ_in_the_wrapper_alone():
    net = nn.ModuleDict({"head": nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3),
                                                "linear": nn.Linear(8, 4)})})
    global_prune_by_percentage(net, 50.0)
    before, masks = [sparsity(layer) for _, layer in prunable_layers(net)], weight_masks(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    apply_masks(net, masks)
    assert [sparsity(layer) for _, layer in prunable_layers(net)] == before and min(before) > 0


def test_sparsity_is_the_fraction_of_zeros():
    net = nn.Sequential(linear([0, 1, 0, 2]), linear([0, 0, 0, 0, 0, 3]))
    assert sparsity(net) == 0.7
    assert layer_sparsity(net) == {"0": 0.5, "1": 5 / 6}
