"""Magnitude pruning: which layers, which weights, and masks that keep pruned weights at zero."""

import math

import torch
import torch.nn as nn

from arguments import PERCENTAGE, check


def prunable_layers(net):
    """Return [(name, layer)] of all conv and linear layers, save the shortcuts' 1x1 projections.

    For ResNet-20 that is 20 layers with 268,336 weights, in forward order; names without the
    wrapper's `.conv` or `.linear` (head_conv.0, body_op.0.conv1.0, ..., final_fc).
    """
    return [(name.removesuffix(".conv").removesuffix(".linear"), layer)
            for name, layer in net.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and "id_mapping" not in name]


def percentile(magnitudes, q):
    """Return the q-th percentile of a tensor: of two neighbours, the lower.

    Save for rounding, what is at or below it is at or below np.percentile's interpolated value too,
    and nothing else is. Raises ValueError if q is outside 0 to 100, there is no element, or one is
    NaN or infinite.
    """
    check(PERCENTAGE, q=q)
    if magnitudes.numel() == 0:
        raise ValueError("magnitudes must have at least one element, got none")
    if not torch.isfinite(magnitudes).all():
        raise ValueError("magnitudes must be finite to be ranked, got NaN or infinite ones")
    ordered = magnitudes.flatten().sort().values
    return ordered[math.floor(float(q) * (len(ordered) - 1) / 100)]


def prune_by_percentage(layer, q=70.0):
    """Set to zero, in place, the weights of one layer at or below the q-th percentile of |w|.

    layer: an nn.Conv2d or nn.Linear, or an FP_Conv or FP_Linear around one; its bias is left alone.
    Ties fall together, so at least q % of the weights become zero, up to one weight's rounding.
    Raises TypeError for another layer, and as percentile does, and changes nothing then.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    weight = _weight_of(layer)
    with torch.no_grad():
        threshold = percentile(weight.abs(), q)
        weight.masked_fill_(weight.abs() <= threshold, 0)


def global_prune_by_percentage(net, q=70.0):
    """Prune all prunable layers of `net`, in place, at the q-th percentile of all their |w|.

    Layers with small weights lose more of them than others. Raises as prune_by_percentage does,
    and ValueError if `net` has no prunable layer; the net is unchanged then.
    """
    weights = [_weight_of(layer) for _, layer in prunable_layers(net)]
    if not weights:
        raise ValueError("net has no conv or linear layer to prune")
    with torch.no_grad():
        threshold = percentile(torch.cat([weight.abs().flatten() for weight in weights]), q)
        for weight in weights:
            weight.masked_fill_(weight.abs() <= threshold, 0)


def prune_before_epoch(net, pruning, epoch):
    """Prune `net`, in place, as a training.recipe.Pruning has it before `epoch`, from 1."""
    q = pruning.percentage(epoch)
    if q is None:
        return
    if pruning.method == "global":
        global_prune_by_percentage(net, q)
    else:
        for _, layer in prunable_layers(net):
            prune_by_percentage(layer, q)


def weight_masks(net):
    """Return a mask for each prunable layer: 1 where a weight is kept, 0 where it is zero."""
    return [(layer.weight.detach() != 0).to(layer.weight.dtype)
            for _, layer in prunable_layers(net)]


def apply_masks(net, masks):
    """Multiply the weights of the prunable layers by `masks` (from weight_masks), in place.

    Raises ValueError if the masks are those of other layers.
    """
    weights = [layer.weight for _, layer in prunable_layers(net)]
    if [mask.shape for mask in masks] != [weight.shape for weight in weights]:
        raise ValueError("masks must be those of the net's prunable layers, got other shapes")
    with torch.no_grad():
        torch._foreach_mul_(weights, masks)


def sparsity(module):
    """Return the fraction of exactly zero weights, 0 to 1, over all prunable layers of `module`.

    Raises ValueError if it has none.
    """
    layers = prunable_layers(module)
    if not layers:
        raise ValueError("module has no conv or linear layer")
    zeros = sum(int((layer.weight == 0).sum()) for _, layer in layers)
    return zeros / sum(layer.weight.numel() for _, layer in layers)


def layer_sparsity(net):
    """Return {name: fraction of exactly zero weights} for each prunable layer, in forward order."""
    return {name: sparsity(layer) for name, layer in prunable_layers(net)}


def _weight_of(layer):
    inner = getattr(layer, "conv", None) or getattr(layer, "linear", None) or layer
    if not isinstance(inner, (nn.Conv2d, nn.Linear)):
        raise TypeError("layer must be an nn.Conv2d or nn.Linear, or an FP_Conv or FP_Linear "
                        f"around one, got {type(layer).__name__}")
    if not isinstance(inner.weight, nn.Parameter):
        raise TypeError("layer must hold its weight as a parameter, got one that is computed anew "
                        "in each forward pass; torch.nn.utils.prune.remove makes it permanent")
    return inner.weight
