"""Learning from a teacher beside the labels."""

import torch
import torch.nn.functional as F

from arguments import FRACTION, POSITIVE, check


class Distillation:
    """A loss against labels and a teacher: (1 - w) CE(z, y) + w T^2 KL(teacher(x) / T || z / T).

    teacher: maps images (B, 3, 32, 32) to logits (B, classes), or None, and the loss is CE(z, y);
    weight: w, 0 to 1; temperature: T, above 0. T^2 keeps the size of the gradients. Use:

        for x, y in distillation.taught(batches):
            loss = distillation(net(x), y)

    Raises ValueError for a value out of range, and for a teacher without a weight or the reverse.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    def __init__(self, teacher, weight, temperature=1.0):
        check(FRACTION, weight=weight)
        check(POSITIVE, temperature=temperature)
        if bool(weight) != (teacher is not None):
            raise ValueError("weight, a recipe's distill, must be above 0 with a teacher and 0 "
                             f"without one, got {weight!r} and teacher={type(teacher).__name__}")
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
