"""Interventions that isolate a cause: what the notebooks do to a net to find out why it lost
accuracy.
"""

import torch
from torch import nn

from FP_layers import STE
from training.batches import normalize


@torch.no_grad()
def reestimate_statistics(net, images):
    """Estimate the BatchNorm statistics of `net`, in place, anew on `images`; return the net.

    images: uint8, (N, 3, 32, 32), on the net's device. No weight is touched. The statistics are
    means over batches of 256; the net ends in evaluation mode. Raises ValueError if there is no
    image; the net is unchanged then.
    """
    if not len(images):
        raise ValueError("images must have at least one image, got none")
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    net.train()
    for batch in images.split(256):
        net(normalize(batch))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return net.eval()


@torch.no_grad()
def round_weights(net, Nbits, symmetric=False, centred=False):
    """Round the float weights of the residual stages to the grid of STE, in place; return the net.

    centred: take the mean rounding error of each filter's non-zero weights out again. Its sum is
    what shifts the filter's output; the rounded weights are then off the grid. Raises as STE does.
    """
    for _, layer in net.stage_layers():
        w = layer.weight
        rounded, kept = STE.apply(w, Nbits, symmetric), w != 0
        if centred:
            error = (rounded - w).sum((1, 2, 3), keepdim=True)
            rounded -= kept * error / kept.sum((1, 2, 3), keepdim=True).clamp(min=1)
        w.copy_(rounded)
    return net
