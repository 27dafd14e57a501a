"""How a net is trained and pruned, as data. Nothing here needs torch."""

import math
from dataclasses import dataclass

from arguments import BELOW_ONE, COUNT, FRACTION, NATURAL, PERCENTAGE, POSITIVE, RATE, check


@dataclass(frozen=True)
class Recipe:
    """How train_utils.fit trains a net; the defaults are the assigned fine-tuning.

    Raises ValueError, naming the field, for a value out of range.
    """

    epochs: int = 20
    batch_size: int = 256  # images a step
    lr: float = 0.002  # peak rate
    schedule: str = "constant"  # "step": a tenth from 50 %, a hundredth from 75 %; "cosine": to 0
    warmup: float = 0.0  # fraction of all steps in which the rate rises from 0
    momentum: float = 0.875
    nesterov: bool = False
    weight_decay: float = 1e-4  # on all parameters
    cutout: int = 0  # pixels; side of the square that is blanked in each training image
    distill: float = 0.0  # weight of the teacher beside the labels
    temperature: float = 1.0  # of the teacher's softmax and the student's
    test_every: int = 1  # epochs between evaluations; the last epoch is always evaluated

    def __post_init__(self):
        check(COUNT, epochs=self.epochs, batch_size=self.batch_size, test_every=self.test_every)
        check(NATURAL, cutout=self.cutout)
        check(RATE, lr=self.lr, weight_decay=self.weight_decay)
        check(BELOW_ONE, momentum=self.momentum, warmup=self.warmup)
        check(FRACTION, distill=self.distill)
        check(POSITIVE, temperature=self.temperature)
        check((True, False), nesterov=self.nesterov)
        if self.nesterov:
            check(POSITIVE, momentum=self.momentum)
        check(("constant", "step", "cosine"), schedule=self.schedule)

    def steps(self, n_images):
        """Return the steps of an epoch of n_images; the last batch may be smaller."""
        return math.ceil(n_images / self.batch_size)

    def rate(self, progress):
        """Return the rate as a fraction of its peak at `progress`, the fraction of steps done.

        Raises ValueError if that is not from 0 to 1.
        """
        check(FRACTION, progress=progress)
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "step":
            return 1 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return 1


@dataclass(frozen=True)
class Pruning:
    """When and how far a net is pruned while it is trained; the defaults only keep zeros at zero.

    Raises ValueError, naming the field, for a value out of range.
    """

    method: str | None = None  # "layer": a threshold for each layer; "global": one for all
    q: float = 0.0  # percentage of the weights that is pruned in the end
    epochs: int = 0  # n: to q*e/n before epoch e = 1..n; 0: once, before epoch 1
    hold_zeros: bool = True  # weights that are zero stay zero, from the last pruning on

    def __post_init__(self):
        check(PERCENTAGE, q=self.q)
        check(("layer", "global") if self.q else (None, "layer", "global"), method=self.method)
        check(NATURAL, epochs=self.epochs)
        if self.epochs and self.method is None:  # it would only free the zeros until then
            raise ValueError(f"epochs must be 0 where method is None, got {self.epochs}")
        check((True, False), hold_zeros=self.hold_zeros)

    @property
    def last_epoch(self):
        """The epoch, from 1, before which the net is pruned for the last time."""
        return max(self.epochs, 1)

    def percentage(self, epoch):
        """Return the percentage to prune to before `epoch` (from 1), or None in other epochs."""
        if self.method is None or epoch > self.last_epoch:
            return None
        return self.q * epoch / self.last_epoch

    def holds(self, epoch):
        """Return whether zeros are held in `epoch` (from 1)."""
        return self.hold_zeros and epoch >= self.last_epoch
