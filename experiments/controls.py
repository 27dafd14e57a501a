"""Interventions that isolate a cause: what the notebooks do to a net to find out why it lost
accuracy.
"""

from typing import NamedTuple

import torch
from torch import nn

from FP_layers import STE, FP_Conv
from training.batches import normalize

__all__ = ["reestimate_statistics", "round_weights", "RoundingError", "rounding_error"]


@torch.no_grad()
def reestimate_statistics(net, images, batch_size=256):
    """Estimate the BatchNorm statistics of `net`, in place, anew on uint8 `images`; return the net.

    No weight is touched. The statistics are means over the batches; the net ends in evaluation
    mode.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    net.train()
    for batch in images.split(batch_size):
        net(normalize(batch))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return net.eval()


@torch.no_grad()
def round_weights(net, Nbits, symmetric=False, centred=False):
    """Round the float weights of the residual stages to the grid of STE, in place; return the net.

    centred: take the mean rounding error of each filter's non-zero weights out again. Its sum is
    what shifts the filter's output; the rounded weights are then off the grid.
    """
    for w in _weights(net):
        rounded, kept = STE.apply(w, Nbits, symmetric), w != 0
        if centred:
            error = (rounded - w).sum((1, 2, 3), keepdim=True)
            rounded -= kept * error / kept.sum((1, 2, 3), keepdim=True).clamp(min=1)
        w.copy_(rounded)
    return net


def _weights(net):
    """Return the float weights of the convolutions in the residual stages, (C, ., ., .) each."""
    return [layer.weight for layer in net.body_op.modules() if isinstance(layer, FP_Conv)]


class RoundingError(NamedTuple):
    """How far weights move when they are rounded."""

    squared: float  # squared error of a layer, over its weights' square; the mean over layers
    shift: float  # size of a filter's mean error, over its weights' root mean square; likewise
    up: float  # fraction of the filters whose mean error is above zero


@torch.no_grad()
def rounding_error(net, Nbits, symmetric=False):
    """Return the RoundingError of the grid of STE in the residual stages; `net` is not changed."""
    squared, shift, up = [], [], []
    for w in _weights(net):
        error = STE.apply(w, Nbits, symmetric) - w
        mean, size = error.mean((1, 2, 3)), w.square().mean((1, 2, 3)).sqrt().clamp_min(1e-12)
        squared.append(error.square().sum() / w.square().sum())
        shift.append(mean.abs() / size)
        up.append(mean > 0)
    return RoundingError(torch.stack(squared).mean().item(), torch.cat(shift).mean().item(),
                         torch.cat(up).float().mean().item())
