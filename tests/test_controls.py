"""The interventions by which a notebook isolates a cause do just what they say."""

import copy

import pytest
import torch

from conftest import same, state_of
from experiments.controls import reestimate_statistics, round_weights
from FP_layers import STE, FP_Conv
from pruning import global_prune_by_percentage
from training.batches import normalize


def test_statistics_are_the_means_over_the_batches_and_nothing_else_moves(net, small_cifar):
    """Against the first BatchNorm's own input; its mean and variance count each batch alike."""
    images = torch.cat([small_cifar.train_images[:256], small_cifar.test_images[:60]])
    before = state_of(net)
    norm = net.head_conv[1]
    norm.running_mean.fill_(7.0)
    assert reestimate_statistics(net, images) is net and not net.training
    with torch.no_grad():
        seen = [net.head_conv[0](normalize(batch)) for batch in images.split(256)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    weights = {name for name, _ in net.named_parameters()}
    after = net.state_dict()
    assert same({name: before[name] for name in weights}, {name: after[name] for name in weights})


def test_without_images_no_statistic_is_touched(net, small_cifar):
    before = state_of(net)
    with pytest.raises(ValueError, match="images must have at least one image, got none"):
        reestimate_statistics(net, small_cifar.train_images[:0])
    assert same(net.state_dict(), before)


def stages(net):
    return [layer.conv.weight.detach() for layer in net.body_op.modules()
            if isinstance(layer, FP_Conv)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_the_stages_are_rounded_as_the_layer_would(net, symmetric):
    global_prune_by_percentage(net, 50.0)
    before = copy.deepcopy(net)
    assert round_weights(net, 3, symmetric) is net
    assert len(stages(net)) == 8
    for rounded, weight in zip(stages(net), stages(before)):
        assert torch.equal(rounded, STE.apply(weight, 3, symmetric))
        assert not torch.equal(rounded, weight)
    assert torch.equal(net.head_conv[0].weight, before.head_conv[0].weight)
    assert torch.equal(net.final_fc.weight, before.final_fc.weight)


def test_centred_rounding_keeps_the_sum_of_each_filter_and_its_zeros(net):
    global_prune_by_percentage(net, 50.0)
    with torch.no_grad():
        net.body_op[0].conv1[0].conv.weight[0] = 0  # a filter without weights
    before = copy.deepcopy(net)
    round_weights(net, 2, centred=True)
    for rounded, weight in zip(stages(net), stages(before)):
        torch.testing.assert_close(
            rounded.sum((1, 2, 3)), weight.sum((1, 2, 3)), rtol=1e-4, atol=1e-5)
        assert torch.equal(rounded == 0, weight == 0)
        assert not torch.equal(rounded, weight)
