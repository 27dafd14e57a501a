"""What a training keeps beside its net: a progress bar, its history, and the state to go on from.
"""

import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from arguments import COUNT, check
from files import check_writable
from training.checkpoints import LastWholeEpoch, atomic_save, cannot_resume, read_state, snapshot


class Journal:
    """The bar, history, best epoch and resumable state of one training.

    name: shown before the bar, which moves every log_every_n steps. state_path: where the whole
    state is kept after each epoch, if anywhere. A later training with the same path and tag goes on
    from it, bit for bit on the same machine; the caller removes the file. tag: plain data that is
    kept with the state and must be the same then.

    `history` has a dict an epoch: epoch, lr (at its start), train_loss, train_accuracy,
    seconds and, where tested, test_loss, test_accuracy (fractions) and sparsity. `best` has
    "epoch", "accuracy" and "state" of the best epoch tested.

    Raises ValueError if log_every_n is not a positive integer.
    """

    def __init__(self, name="training", state_path=None, tag=None, log_every_n=50):
        check(COUNT, log_every_n=log_every_n)
        self.name, self.state_path, self.tag = name, state_path, tag
        self.log_every_n = log_every_n
        self.history, self.best = [], {"epoch": None, "accuracy": -1.0, "state": None}

    @contextmanager
    def of(self, net, optimizer, recipe, steps):
        """A context in which `net` is trained by `recipe`, in so many steps an epoch.

        Goes on from the state at state_path, if there is one. Left by an error or Ctrl-C, the net
        holds the last whole epoch. Raises OSError if state_path cannot be written, ValueError if
        what is there is damaged or has another tag, or if this Journal had a training before, and
        the errors of training explained.
        """
        if self.history:
            raise ValueError(f"journal must be a new one, got one of {len(self.history)} epochs")
        self.net, self.optimizer, self.recipe, self.steps = net, optimizer, recipe, steps
        if self.state_path is not None:
            check_writable(self.state_path)
            if Path(self.state_path).exists():
                self._resume()
        done = len(self.history)
        with LastWholeEpoch(net) as self.whole, tqdm(
                total=recipe.epochs * steps, initial=done * steps, desc=self.name, unit="step",
                mininterval=2.0) as self.bar, self._explained():
            self.started = time.perf_counter()
            yield range(done + 1, recipe.epochs + 1)

    def paced(self, batches, epoch):
        """Yield from `batches`; before each step set its rate, after it move the bar."""
        for step, batch in enumerate(batches):
            rate = self.recipe.rate((epoch - 1 + step / self.steps) / self.recipe.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * rate
            yield batch
            if (step + 1) % self.log_every_n == 0:
                self.bar.update(self.log_every_n)

    def epoch_done(self, epoch, entry, may_be_best):
        """Keep the net and `entry` as the last whole epoch.

        may_be_best: also as the best one, if it was tested and no epoch before was as accurate.
        Raises FloatingPointError if the loss or a weight is NaN or infinite; nothing is kept then.
        """
        if not (math.isfinite(entry["train_loss"]) and _is_finite(self.net)):
            raise FloatingPointError
        if may_be_best and entry.get("test_accuracy", -1) > self.best["accuracy"]:
            self.best = {"epoch": epoch, "accuracy": entry["test_accuracy"],
                         "state": snapshot(self.net)}
        now = time.perf_counter()
        rate = self.recipe.lr * self.recipe.rate((epoch - 1) / self.recipe.epochs)
        entry = {"epoch": epoch, "lr": rate, **entry, "seconds": now - self.started}
        self.started = now
        self.history.append(entry)
        self.whole.keep()
        if self.state_path is not None:
            atomic_save({"net": self.whole.state, "optimizer": self.optimizer.state_dict(),
                         "tag": self.tag, "history": self.history, "best": self.best},
                        self.state_path)
        self.bar.update(epoch * self.steps - self.bar.n)
        accuracy = entry.get("test_accuracy", entry["train_accuracy"])
        self.bar.set_postfix(epoch=epoch, loss=f"{entry['train_loss']:.4f}",
                             accuracy=f"{100 * accuracy:.2f}%")

    def _resume(self):
        state = read_state(self.state_path)
        try:
            if state["tag"] != self.tag:
                raise ValueError("it was written by a run with another config or other parents")
            with LastWholeEpoch(self.net):  # what does not fit as a whole is not left loaded
                self.net.load_state_dict(state["net"])
                self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise cannot_resume(self.state_path, error) from error
        self.history, self.best = state["history"], state["best"]

    @contextmanager
    def _explained(self):
        """Say in which epoch, with which setting, an error of training happened."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            size = self.recipe.batch_size
            raise torch.OutOfMemoryError(
                f"{self._where()}: out of memory with batch_size={size}; try "
                f"batch_size={max(size // 2, 1)}. The net holds the last whole epoch. "
                f"({error})") from error
        except (FloatingPointError, ValueError) as error:
            # A quantizer may meet broken weights, with a ValueError, before the loss does.
            if isinstance(error, ValueError) and _is_finite(self.net):
                raise
            raise FloatingPointError(
                f"{self._where()}: loss or weights became NaN or infinite; lr={self.recipe.lr} may "
                "be too large. The net holds the last whole epoch.") from error

    def _where(self):
        return f"{self.name}: epoch {len(self.history) + 1}"


def _is_finite(net):
    return all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())
