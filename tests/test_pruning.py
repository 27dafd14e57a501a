"""Pruning against np.percentile and torch.nn.utils.prune."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from FP_layers import FP_Conv, FP_Linear
from pruning import (
    DynamicPruning,
    apply_masks,
    global_prune_by_percentage,
    layer_sparsity,
    prunable_layers,
    prune_by_percentage,
    sparsity,
    weight_masks,
)
from resnet20 import ResNetCIFAR


def linear(values):
    layer = nn.Linear(len(values), 1)
    layer.weight.data = torch.tensor([values], dtype=torch.float32)
    return layer


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ResNetCIFAR(num_layers=8)


# ---------------------------------------------------------------- one layer


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.floats(0, 100))
def test_weights_at_or_below_numpys_percentile_are_zero_and_others_untouched(values, q):
    layer = linear(values)
    before = layer.weight.detach().numpy().copy()
    prune_by_percentage(layer, q)
    magnitudes = np.abs(before.astype(np.float64))
    expected = np.where(magnitudes <= np.percentile(magnitudes, q), np.float32(0), before)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected)


@given(st.integers(1, 400), st.integers(0, 100), st.randoms(use_true_random=False))
def test_counts_are_exact_for_distinct_magnitudes(n, q, random):
    """floor(q (n - 1) / 100) + 1 weights, in exact arithmetic; where q/100 itself is rounded, one
    may be missing.
    """
    values = list(range(1, n + 1))
    random.shuffle(values)
    layer = linear([value * random.choice((-1, 1)) for value in values])
    prune_by_percentage(layer, q)
    position = Fraction(q, 100) * (n - 1)
    pruned = int((layer.weight == 0).sum())
    expected = position.__floor__() + 1
    assert pruned == expected or position.denominator == 1 and pruned == expected - 1
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


def test_a_layer_without_weights_is_refused():
    with pytest.raises(TypeError, match="layer must have a weight.*ReLU"):
        prune_by_percentage(nn.ReLU())


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


# ---------------------------------------------------------------- refused, and nothing changed


both = pytest.mark.parametrize("prune_it", [prune_by_percentage, global_prune_by_percentage])


@both
@pytest.mark.parametrize("q", [-1, 100.5, float("nan"), "70", True, None])
def test_a_bad_percentage_is_refused(prune_it, q):
    layer = linear([1, 2, 3])
    with pytest.raises(ValueError, match="q must be a percentage from 0 to 100") as caught:
        prune_it(layer, q)
    assert repr(q) in str(caught.value) and layer.weight.tolist() == [[1, 2, 3]]


@both
@pytest.mark.parametrize("q", [70.0, np.float64(70), np.float32(70), np.int64(70)])
def test_any_real_number_is_a_percentage(prune_it, q):
    layer = linear([1, 2, 3, 4, 5])
    prune_it(layer, q)
    assert layer.weight.tolist() == [[0, 0, 0, 4, 5]]


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(prune_it, poison):
    layer = linear([1, 2, poison, 3])
    with pytest.raises(ValueError, match="weights must be finite"):
        prune_it(layer, 50)
    assert layer.weight[0, :2].tolist() == [1, 2]


@pytest.mark.parametrize("function", [global_prune_by_percentage, sparsity, DynamicPruning])
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
    grown = {name: layer.weight.detach().clone() for name, layer in prunable_layers(net)}
    shortcut = net.body_op[1].id_mapping[0].conv.weight.clone()
    apply_masks(net, masks)
    for name, layer in prunable_layers(net):
        assert torch.equal(layer.weight, torch.where(masks[name] == 0, 0, grown[name]))
    assert sparsity(net) == pytest.approx(0.7, abs=1e-3)
    assert torch.equal(net.body_op[1].id_mapping[0].conv.weight, shortcut)


def test_dynamic_pruning_trains_pruned_weights_out_of_sight_and_brings_them_back():
    """Two of five weights are pruned; gradients of one a step let the smallest overtake the others.
    """
    layer = linear([1.0, 2.0, 3.0, 4.0, 5.0])
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    optimizer.register_step_post_hook(DynamicPruning(nn.Sequential(layer), q=25, every=3))
    seen = []
    for gradient in ([0, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [-1, 0, 0, 1, 0], [-2, 0, 0, 0, 0]):
        layer.weight.grad = torch.tensor([gradient], dtype=torch.float32)
        optimizer.step()
        seen.append(layer.weight[0].tolist())
    assert seen == [[0, 0, 3, 4, 5], [0, 0, 3, 4, 5], [0, 0, 3, 3, 5], [5, 0, 0, 0, 5]]


def test_dynamic_pruning_of_a_net_is_exact_after_each_step_and_goes_on_from_the_optimizers_state(
    net,
):
    def steps(net, optimizer, n):
        for i in n:
            net(
                torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i))
            ).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield sparsity(net)

    def pruned_sgd(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        optimizer.register_step_post_hook(DynamicPruning(net, q=70.0, every=2))
        return optimizer

    optimizer = pruned_sgd(net)
    assert list(steps(net, optimizer, range(4))) == pytest.approx([0.7] * 4, abs=1e-3)
    resumed = ResNetCIFAR(num_layers=8)
    resumed.load_state_dict(net.state_dict())
    again = pruned_sgd(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = weight_masks(net)
    for which in ((net, optimizer), (resumed, again)):
        list(steps(*which, range(4, 7)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters()))
    grown = sum(
        int(((before[name] == 0) & (layer.weight != 0)).sum())
        for name, layer in prunable_layers(net)
    )
    assert grown > 0


def test_masks_of_another_net_are_refused(net):
    masks = weight_masks(net)
    del masks["final_fc"]
    with pytest.raises(ValueError, match=r"masks must name.*final_fc"):
        apply_masks(net, masks)


def test_sparsity_is_the_fraction_of_zeros():
    net = nn.Sequential(linear([0, 1, 0, 2]), linear([0, 0, 0, 0, 0, 3]))
    assert sparsity(net) == 0.7
    assert layer_sparsity(net) == {"0": 0.5, "1": 5 / 6}
