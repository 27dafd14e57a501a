"""Learning from a teacher beside the labels, and averaging weights over steps."""

import copy

import torch
import torch.nn.functional as F

from arguments import BELOW_ONE, FRACTION, check
from pruning import apply_masks

__all__ = ["Distillation", "MovingAverage"]


class Distillation:
    """A loss against labels and a teacher: (1 - w) CE(z, y) + w T^2 KL(teacher(x) / T || z / T).

    teacher: maps images (B, 3, 32, 32) to logits (B, classes), or None, and the loss is CE(z, y);
    weight: w, 0 to 1; temperature: T, above 0. T^2 keeps the size of the gradients. Use it
    as

        for x, y in distillation.taught(batches):
            loss = distillation(net(x), y)

    Raises ValueError for a teacher without a weight or the reverse.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    def __init__(self, teacher, weight, temperature=1.0):
        check(FRACTION, weight=weight)
        if bool(weight) != (teacher is not None):
            raise ValueError("weight must be above 0 with a teacher and 0 without one, "
                             f"got {weight!r} and teacher={type(teacher).__name__}")
        self.teacher, self.weight, self.temperature = teacher, weight, temperature

    def taught(self, batches):
        """Yield from `batches`; the loss then knows what the teacher says of the last one."""
        for x, y in batches:
            if self.teacher is not None:
                with torch.no_grad():
                    self.targets = (self.teacher(x) / self.temperature).log_softmax(1)
            yield x, y

    def __call__(self, logits, labels):
        hard = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return hard
        student = (logits / self.temperature).log_softmax(1)
        soft = F.kl_div(student, self.targets, reduction="batchmean", log_target=True)
        return torch.lerp(hard, self.temperature**2 * soft, self.weight)


class MovingAverage:
    """An exponential moving average of a net's weights and BatchNorm statistics over its steps.

    decay: a step, reached from below as min(decay, (1 + n) / (10 + n)), so that the first steps,
    which are far from where training ends, are soon forgotten. `net` is the averaged copy.
    """

    def __init__(self, net, decay):
        check(BELOW_ONE, decay=decay)
        self.net, self.decay, self.steps = copy.deepcopy(net), decay, 0

    @torch.no_grad()
    def update(self, net):
        """Take in the weights of `net`, after one more step."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = zip(self.net.state_dict().values(), net.state_dict().values())
        averaged, current = zip(*((a, b) for a, b in pairs if a.is_floating_point()))
        torch._foreach_lerp_(list(averaged), list(current), weight)

    def masked(self, masks):
        """Return the averaged net, pruned weights at zero (masks: pruning.weight_masks or None).

        What was pruned on the way has been averaged with what it was before.
        """
        if masks is not None:
            apply_masks(self.net, masks)
        return self.net

    def state_dict(self):
        """Return what has to be kept to go on."""
        return {"net": self.net.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        """Go on from what state_dict returned."""
        self.net.load_state_dict(state["net"])
        self.steps = state["steps"]
