"""Magnitude pruning: which layers, which weights, and masks that keep pruned weights at zero."""

import math
import numbers

import torch
import torch.nn as nn

__all__ = [
    "prunable_layers", "prune_by_percentage", "global_prune_by_percentage",
    "DynamicPruning", "weight_masks", "apply_masks", "sparsity", "layer_sparsity",
]


def prunable_layers(net):
    """Return [(name, layer)] of every conv and linear layer in `net`, save the shortcuts' 1x1 projections.

    For ResNet-20 that is 20 layers with 268,336 weights, in forward order; names without the wrapper's
    `.conv` or `.linear` (head_conv.0, body_op.0.conv1.0, ..., final_fc).
    """
    return [
        (name.removesuffix(".conv").removesuffix(".linear"), layer)
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and "id_mapping" not in name
    ]


def _check_percentage(q):
    if isinstance(q, bool) or not isinstance(q, numbers.Real) or not 0 <= q <= 100:
        raise ValueError(f"q must be a percentage from 0 to 100, got {q!r}")


def _threshold(magnitudes, q):
    """Return the q-th percentile of a tensor of magnitudes, linearly interpolated as NumPy does."""
    _check_percentage(q)
    if not torch.isfinite(magnitudes).all():
        raise ValueError("weights must be finite to be ranked, got NaN or infinite ones")
    ordered = magnitudes.flatten().double().sort().values  # torch.quantile refuses more than 2^24 elements
    position = float(q) / 100 * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def prune_by_percentage(layer, q=70.0):
    """Set the weights of one layer to zero, in place, that are at or below the q-th percentile of |w|.

    layer: an nn.Conv2d or nn.Linear (or an FP_Conv or FP_Linear around one); its bias is left alone.
    Ties fall together, so at least q % of the weights become zero, up to one weight's rounding; even q=0
    takes the smallest. Raises TypeError if the layer has no weight, ValueError if q is outside 0 to 100
    or a weight is NaN or infinite; the layer is unchanged then.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
    """
    weight = _weight_of(layer)
    with torch.no_grad():
        magnitudes = weight.abs()
        weight.masked_fill_(magnitudes.double() <= _threshold(magnitudes, q), 0)


def global_prune_by_percentage(net, q=70.0):
    """Prune all prunable layers of `net`, in place, with one threshold: the q-th percentile of all their |w|.

    Layers with small weights lose more of them than others. Raises as prune_by_percentage does, and
    ValueError if `net` has no prunable layer; the net is unchanged then.
    """
    layers = prunable_layers(net)
    if not layers:
        raise ValueError("net has no conv or linear layer to prune")
    with torch.no_grad():
        threshold = _threshold(torch.cat([layer.weight.abs().flatten() for _, layer in layers]), q)
        for _, layer in layers:
            layer.weight.masked_fill_(layer.weight.abs().double() <= threshold, 0)


class DynamicPruning:
    """Global pruning in which pruned weights go on being trained out of sight, and come back when they have grown.

    To be called after each step of a torch.optim.Optimizer over the net's parameters (register_step_post_hook):
    the step's change of a pruned weight is added to the dense one behind it, and every `every` steps the q % smallest
    dense weights of all prunable layers are the ones at zero. The dense weights live in the optimizer's state,
    beside the momentum. q may be set between steps; restart() begins a new count of them, as an epoch does.

    Weight decay sees the net, so it does not shrink dense weights while they are pruned. Raises ValueError if `net`
    has no prunable layer, q is outside 0 to 100 or `every` is no positive integer.

    Source: Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020, equation 4 and section 4.
    """

    def __init__(self, net, q=0.0, every=16):
        _check_percentage(q)
        if isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}")
        self.weights = [layer.weight for _, layer in prunable_layers(net)]
        if not self.weights:
            raise ValueError("net has no conv or linear layer to prune")
        self.q, self.every, self.steps = q, every, 0

    def restart(self):
        """Rank the weights anew after the next step."""
        self.steps = 0

    @torch.no_grad()
    def __call__(self, optimizer, args, kwargs):
        states = [optimizer.state[weight] for weight in self.weights]
        for weight, state in zip(self.weights, states):
            if "dense" in state:  # a pruned weight was at zero before the step, and now is what the step added
                state["dense"].mul_(1 - state["kept"]).add_(weight)
            else:
                state["dense"] = weight.clone()
        if self.steps % self.every == 0:
            threshold = _threshold(torch.cat([state["dense"].abs().flatten() for state in states]), self.q)
            for state in states:
                state["kept"] = (state["dense"].abs().double() > threshold).to(state["dense"].dtype)
        for weight, state in zip(self.weights, states):
            weight.copy_(state["dense"] * state["kept"])
        self.steps += 1


def weight_masks(net):
    """Return {name: mask} for the prunable layers: 1 where a weight is kept, 0 where it is zero (pruned)."""
    return {name: (layer.weight.detach() != 0).to(layer.weight.dtype) for name, layer in prunable_layers(net)}


def apply_masks(net, masks):
    """Multiply the weights of the prunable layers by `masks` (from weight_masks), in place."""
    layers = dict(prunable_layers(net))
    if layers.keys() != masks.keys():
        raise ValueError(f"masks must name the net's prunable layers, got {sorted(layers.keys() ^ masks.keys())} amiss")
    with torch.no_grad():
        torch._foreach_mul_([layers[name].weight for name in masks], list(masks.values()))


def sparsity(module):
    """Return the fraction of exactly zero weights, 0 to 1, over all prunable layers of `module`."""
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
    if not isinstance(getattr(inner, "weight", None), torch.Tensor):
        raise TypeError(f"layer must have a weight (nn.Conv2d, nn.Linear), got {type(layer).__name__}")
    return inner.weight
