"""The optimizer of a recipe: SGD, or Muon beside it."""

import torch
from torch import nn

__all__ = ["Muon", "make_optimizer"]


def make_optimizer(net, recipe):
    """Return the optimizer that `recipe` wants for `net`; groups keep their peak as "initial_lr".
    """
    sgd = dict(lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov,
               weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":
        fused = True if next(net.parameters()).device.type == "cuda" else None
        optimizer = torch.optim.SGD(net.parameters(), fused=fused, **sgd)
    else:
        convolutions = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)][1:]
        taken = {id(weight) for weight in convolutions}
        others = [p for p in net.parameters() if id(p) not in taken]
        optimizer = Muon(convolutions, others, recipe.muon_lr, **sgd)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


class Muon(torch.optim.SGD):
    """Train matrices by orthogonal steps, and other parameters by SGD.

    matrices: parameters (out, ...), taken as matrices (out, rest), without weight decay. Each step
    is momentum, with Nesterov's look ahead, made orthogonal, times muon_lr * sqrt(max(1, out /
    rest)). others, sgd: parameters and options of torch.optim.SGD.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, matrices, others, muon_lr, *, muon_momentum=0.9, **sgd):
        orthogonal = dict(params=matrices, lr=muon_lr, muon_momentum=muon_momentum)
        super().__init__([dict(params=others), orthogonal], **sgd)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        for p in (p for p in group["params"] if p.grad is not None):
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.mul_(group["muon_momentum"]).add_(p.grad)
            ahead = p.grad.add(momentum, alpha=group["muon_momentum"]).flatten(1)
            step = orthogonal(ahead) * max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
            p.sub_(step.view(p.shape), alpha=group["lr"])
            p.grad = None  # so that SGD passes it over
        super().step()


def orthogonal(matrix, steps=4):
    """Return about U V^T of matrix = U S V^T, (rows, columns), by a Newton-Schulz iteration.

    Singular values end near 1, between about 0.7 and 1.2, which is enough for an optimizer.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at zero, so that few steps are enough
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
