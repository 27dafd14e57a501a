"""Training and testing: one loop, from which train, finetune and finetune_after_prune are made."""

import functools

import torch
import torch.nn.functional as F

import cifar10
from arguments import RATE, check
from files import check_writable
from pruning import apply_masks, prune_before_epoch, sparsity, weight_masks
from training.batches import Batches
from training.checkpoints import atomic_save, load_weights, save_weights
from training.distillation import Distillation
from training.execution import Execution, exact_convolutions
from training.inference import for_evaluation
from training.journal import Journal
from training.recipe import Pruning, Recipe

__all__ = ["train", "finetune", "finetune_after_prune", "test", "evaluate", "fit", "train_epoch",
           "save_weights", "load_weights"]


def train_epoch(net, batches, optimizer, criterion, masks=None, forward=None):
    """Train `net`, in place, on one pass over `batches`.

    masks: of pruning.weight_masks, kept after each step; forward: maps images to logits, the net if
    None. Returns (mean loss, accuracy as a fraction). Raises ValueError if there is no batch.
    """
    device = next(net.parameters()).device
    forward = net if forward is None else forward
    total_loss, correct, seen = 0, 0, 0
    net.train()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits = forward(images)
        loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if masks is not None:
            apply_masks(net, masks)  # what was pruned is zero again
        total_loss += loss.detach() * len(labels)  # tensors: to read them is to wait for a GPU
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    if not seen:
        raise ValueError("batches must hold at least one batch, got none")
    return total_loss.item() / seen, correct.item() / seen


def finetune_after_prune(net, trainloader, criterion, optimizer, prune=True):
    """Train `net`, in place, for one epoch; if `prune`, weights that are zero now stay zero.

    trainloader: yields (images, labels); criterion(logits, labels) returns a scalar loss;
    optimizer: over the net's parameters. Returns (mean loss, accuracy as a fraction).
    """
    masks = weight_masks(net) if prune else None  # 1 where a weight is kept, 0 where it is pruned
    return train_epoch(net, trainloader, optimizer, criterion, masks)


def fit(net, recipe, data=None, *, pruning=Pruning(), teacher=None, seed=0,
        execution=Execution(), journal=None):
    """Train `net`, in place, as `recipe` and `pruning` say; return the history.

    recipe, pruning: see training.recipe; data: a cifar10.CIFAR10 on the net's device, fetched if
    None; teacher: a net on the same device, if the recipe distills, put into evaluation mode; seed:
    of order and augmentation; execution: see training.execution; journal: a training.journal's
    Journal, for a name and a state to go on from. It says what history holds and what is raised;
    ValueError, too, if the pruning takes more epochs than there are. Its best epoch is the best one
    tested from the last pruning on: before it, a net is not sparse enough to count.
    """
    if pruning.epochs > recipe.epochs:
        raise ValueError(f"pruning.epochs must be at most recipe.epochs, {recipe.epochs}, "
                         f"got {pruning.epochs}")
    data = get_data(next(net.parameters()).device) if data is None else data
    journal = Journal() if journal is None else journal
    net.to(memory_format=torch.channels_last)
    optimizer, forward = _optimizer(net, recipe), execution.of(net)
    taught = None if teacher is None else execution.of(for_evaluation(teacher.eval()))
    criterion = Distillation(taught, recipe.distill, recipe.temperature)
    steps = recipe.steps(len(data.train_images))
    with execution.in_its_threads(), journal.of(net, optimizer, recipe, steps) as epochs:
        for epoch in epochs:
            prune_before_epoch(net, pruning, epoch)
            masks = weight_masks(net) if pruning.holds(epoch) else None
            batches = Batches(data.train_images, data.train_labels, recipe.batch_size, seed, epoch,
                              augment=True, cutout=recipe.cutout)
            batches = journal.paced(criterion.taught(batches), epoch)
            loss, accuracy = train_epoch(net, batches, optimizer, criterion, masks, forward)
            entry = {"train_loss": loss, "train_accuracy": accuracy}
            if epoch % recipe.test_every == 0 or epoch == recipe.epochs:
                entry["test_loss"], entry["test_accuracy"] = evaluate(net, data)
                entry["sparsity"] = sparsity(net)
            journal.epoch_done(epoch, entry, may_be_best=epoch >= pruning.last_epoch)
    return journal.history


def _optimizer(net, recipe):
    on_gpu = next(net.parameters()).is_cuda
    return torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.nesterov,
                           weight_decay=recipe.weight_decay, fused=on_gpu or None)


# ---------------------------------------------------------------- the homework's entry points


def train(
    net, epochs, batch_size, lr, reg, log_every_n=50, checkpoint="net_after_train.pt", seed=0
):
    """Train `net` from where it stands, in place, with the assigned pre-training recipe.

    SGD, momentum 0.875, weight decay `reg`, lr divided by 10 at 50 % and 75 % of the epochs. The
    net ends in its last epoch, in evaluation mode; its best test epoch is written to `checkpoint`
    (None: nowhere). The progress bar moves each log_every_n steps. Returns the history and raises
    as fit does.
    """
    recipe = _assigned(epochs, batch_size, lr, reg, schedule="step")
    journal = Journal("train", log_every_n=log_every_n)
    return _fit_into(checkpoint, net, recipe, Pruning(hold_zeros=False), seed, journal)


def finetune(net, epochs, batch_size, lr, reg, log_every_n=50,
             checkpoint="quantized_net_after_finetune.pt", hold_zeros=True, seed=0):
    """Fine-tune `net`, in place, with the assigned recipe at constant lr.

    SGD, momentum 0.875, weight decay `reg`. Weights that are zero at the start stay zero unless
    hold_zeros=False. The net ends in its last epoch, in evaluation mode; its best test epoch is
    written to `checkpoint` (None: nowhere). The progress bar moves each log_every_n steps. Returns
    the history and raises as fit does.
    """
    recipe = _assigned(epochs, batch_size, lr, reg)
    journal = Journal("finetune", log_every_n=log_every_n)
    return _fit_into(checkpoint, net, recipe, Pruning(hold_zeros=hold_zeros), seed, journal)


def _assigned(epochs, batch_size, lr, reg, **others):
    check(RATE, reg=reg)
    return Recipe(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=reg, **others)


def _fit_into(checkpoint, net, recipe, pruning, seed, journal):
    """Return the history of fit; the best epoch's weights are written to `checkpoint`, if any,
    those of a training that was stopped or failed, too.
    """
    if checkpoint is not None:
        check_writable(checkpoint)
    try:
        history = fit(net, recipe, pruning=pruning, seed=seed, journal=journal)
    finally:
        if checkpoint is not None and journal.best["state"] is not None:
            atomic_save(journal.best["state"], checkpoint)
    net.eval()  # as the course's own functions leave it: readers call net(x) next
    return history


# ---------------------------------------------------------------- testing


@torch.no_grad()
def evaluate(net, data=None, batch_size=None):
    """Return (mean cross entropy, accuracy as a fraction) of `net` on the 10,000 test images.

    In float32, on a GPU too, whose convolutions would else round to TF32, and with running
    BatchNorm statistics; the net is left in the modes it was in. Weights are quantized and
    BatchNorms folded once, where the net allows it (see training.inference). data: a
    cifar10.CIFAR10 on the net's device, fetched if None. batch_size changes the speed, not the
    result; None: on a CPU 25 for each thread, whose caches hold that much, else 1000.
    """
    device = next(net.parameters()).device
    data = get_data(device) if data is None else data
    if batch_size is None:
        batch_size = 25 * torch.get_num_threads() if device.type == "cpu" else 1000
    modes = {module: module.training for module in net.modules()}
    loss, correct = 0, 0
    try:
        forward = Execution().of(for_evaluation(net.eval()))
        with exact_convolutions():
            for images, labels in Batches(data.test_images, data.test_labels, batch_size):
                logits = forward(images)
                loss += F.cross_entropy(logits, labels, reduction="sum")
                correct += (logits.argmax(1) == labels).sum()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return loss.item() / len(data.test_labels), correct.item() / len(data.test_labels)


def test(net, verbose=True):
    """Return the net's accuracy on CIFAR-10's test set, a fraction; print it if verbose.

    The net ends in evaluation mode.
    """
    loss, accuracy = evaluate(net.eval())
    if verbose:
        print(f"Test Loss={loss:.4f}, Test accuracy={accuracy:.4f}")
    return accuracy


@functools.lru_cache(maxsize=2)
def _cached_data(root, device):
    return cifar10.load(root, device)


def get_data(device):
    """Return CIFAR-10 (cifar10.CIFAR10) on `device`, read once a process and data folder."""
    device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one
    return _cached_data(str(cifar10.default_root()), str(device))
