"""Training and testing: one loop, from which train, finetune and finetune_after_prune are made."""

import functools
import io
import math
import numbers
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

import cifar10
from files import atomic_write, check_writable
from FP_layers import FP_Conv, FP_Linear
from inference import fingerprint, for_evaluation
from pruning import apply_masks, sparsity, weight_masks

__all__ = ["train", "finetune", "finetune_after_prune", "test", "evaluate", "fit", "save_weights", "load_weights"]


# ---------------------------------------------------------------- data and files


@functools.lru_cache(maxsize=2)
def _cached_data(root, device):
    return cifar10.load(root, device)


def get_data(device):
    """Return CIFAR-10 (cifar10.CIFAR10) on `device`, read once a process and data folder."""
    return _cached_data(str(cifar10.default_root()), str(device))


def atomic_save(object_, path):
    """torch.save to `path`, whole or not at all; raises OSError, naming `path`, if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(object_, buffer)  # in memory first: torch reports a full disk as a RuntimeError without a name
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_weights(net, path):
    """Write the net's state dict to `path`, whole or not at all; nothing but tensors is in the file."""
    atomic_save(_snapshot(net), path)


def load_weights(net, path):
    """Load a state dict from `path` into `net`, in place, on the net's device; return the net.

    A float checkpoint also loads into layers with a learned step or levels, which are then fitted to the weights.
    Raises FileNotFoundError if there is no such file, and ValueError if it is truncated, no state dict of
    this architecture, or holds NaN or infinite values; the net is unchanged then. Pickled code never runs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint of weights: {error}") from error
    expected = net.state_dict()
    steps = {name for name in expected if name.endswith((".step", ".levels"))}
    fit_anew = isinstance(state, dict) and bool(steps) and not steps & state.keys()
    if fit_anew:
        expected = {name: tensor for name, tensor in expected.items() if name not in steps}
    if not isinstance(state, dict) or state.keys() != expected.keys():
        amiss = sorted(map(str, expected.keys() ^ state.keys()))[:4] if isinstance(state, dict) else type(state)
        raise ValueError(f"{path} is a checkpoint of another architecture; names not shared: {amiss}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    net.load_state_dict(state, strict=not fit_anew)
    if fit_anew:
        fit_steps(net)
    return net


def fit_steps(net):
    """Set every learned step and level in `net`, in place, to what fits its weights (see FP_layers)."""
    for module in net.modules():
        if isinstance(module, (FP_Conv, FP_Linear)):
            module.reset_step()


def _snapshot(net):
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.state_dict().items()}


def _device_of(net):
    return next(net.parameters()).device


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(net, data=None, batch_size=None):
    """Return (mean cross entropy, accuracy as a fraction) of `net` on the 10,000 test images, in float32.

    The net is evaluated with running BatchNorm statistics and left in the modes it was in; weights are quantized
    and BatchNorms folded once (see inference.for_evaluation). data: a cifar10.CIFAR10 on the net's device, fetched
    if None. batch_size changes the speed, not the result; None: 50 on a CPU, whose caches hold that much, else 1000.
    """
    device = _device_of(net)
    data = get_data(device) if data is None else data
    if batch_size is None:
        batch_size = 50 if device.type == "cpu" else 1000
    modes = {module: module.training for module in net.modules()}
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.long)
    try:
        twin = for_evaluation(net.eval())
        for x, y in cifar10.Batches(data.test_images, data.test_labels, batch_size):
            logits = twin(x.contiguous(memory_format=torch.channels_last))
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return loss.item() / len(data.test_labels), correct.item() / len(data.test_labels)


_tested = {}  # fingerprint of a net: the data it was tested on, and what evaluate returned


def test(net, verbose=True):
    """Print, if verbose, the net's loss and accuracy on CIFAR-10's test set and return the accuracy, a fraction.

    A net that computes what an earlier one did (same quantized weights, see inference.fingerprint) is not
    evaluated again in the same process.
    """
    data, key = get_data(_device_of(net)), fingerprint(net)
    if key is None or key not in _tested or _tested[key][0] is not data:
        _tested[key] = data, evaluate(net)
    loss, accuracy = _tested[key][1]
    if verbose:
        print(f"Test Loss={loss:.4f}, Test accuracy={accuracy:.4f}")
    return accuracy


# ---------------------------------------------------------------- the loop


def learning_rate(schedule, peak, progress, warmup=0.0):
    """Return the learning rate at `progress`, the fraction of all steps done, in [0, 1).

    schedule: "constant"; "step", divided by 10 at 50 % and at 75 %; "cosine", to zero. With warmup > 0 the
    rate first rises linearly from zero over that fraction. Raises ValueError for another schedule, and if progress
    or warmup is no fraction.
    """
    if schedule not in ("constant", "step", "cosine"):
        raise ValueError(f"schedule must be 'constant', 'step' or 'cosine', got {schedule!r}")
    _check(progress=progress, warmup=warmup)
    if progress < warmup:
        return peak * progress / warmup
    if schedule == "constant":
        return peak
    if schedule == "step":
        return peak * (1 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class SoftTargets:
    """Batches whose labels are mixed with what a teacher says: y becomes (1 - weight) * one-hot + weight * teacher(x).

    batches: pairs of images (B, 3, 32, 32) and labels (B,); teacher: a net, moved to evaluation mode; yields
    images and probabilities (B, classes). Cross entropy against them is (1 - weight) times the one against the
    labels plus weight times the one against the teacher, at temperature 1.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Mishra and Marr, "Apprentice",
    ICLR 2018, for low-precision students.
    """

    def __init__(self, batches, teacher, weight, bf16=False):
        _check(weight=weight)
        self.batches, self.teacher, self.weight, self.bf16 = batches, teacher.eval(), weight, bf16

    def __iter__(self):
        for x, y in self.batches:
            with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                logits = self.teacher(x.contiguous(memory_format=torch.channels_last))
            taught = logits.float().softmax(1)
            yield x, torch.lerp(F.one_hot(y, taught.shape[1]).float(), taught, self.weight)


class CompiledForOneSize(torch.nn.Module):
    """A net compiled for batches of the size that comes first; others, as the last of an epoch, it takes uncompiled.

    A second size would cost as much compilation as the first, and there is one such batch an epoch.
    """

    def __init__(self, net):
        super().__init__()
        self.net, self.size = net, None
        self.compiled = torch.compile(net, dynamic=False)

    def forward(self, x):
        self.size = self.size or len(x)
        return self.compiled(x) if len(x) == self.size else self.net(x)


def train_epoch(net, batches, optimizer, criterion, *, hold_zeros, bf16=False, forward=None,
                on_step=lambda step: None):
    """Train `net`, in place, on one pass over `batches`; return (mean loss, accuracy) of the training batches.

    batches: pairs of images (B, 3, 32, 32) and labels (B,), or probabilities (B, classes) to be matched, on any
    device. hold_zeros keeps the weights at
    zero that are zero at the start. on_step(i) is called before step i; nothing here waits for the device
    before the epoch's end. With bf16 the forward pass runs under bfloat16 autocast, weights stay float32.
    forward: the compiled net, if it was compiled.
    """
    device = _device_of(net)
    forward = net if forward is None else forward
    net.train()
    masks = weight_masks(net) if hold_zeros else None
    total_loss = torch.zeros((), device=device)
    correct, seen = torch.zeros((), device=device, dtype=torch.long), 0
    for step, (x, y) in enumerate(batches):
        on_step(step)
        x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        y = y.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = forward(x)
        logits = logits.float()
        loss = criterion(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if masks is not None:
            apply_masks(net, masks)
        with torch.no_grad():
            total_loss += loss.detach() * len(y)
            correct += (logits.argmax(1) == (y if y.dim() == 1 else y.argmax(1))).sum()
        seen += len(y)
    if not seen:
        raise ValueError("batches must hold at least one batch, got none")
    return total_loss.item() / seen, correct.item() / seen


def fit(net, *, epochs, batch_size, lr, weight_decay, momentum=0.875, nesterov=False, schedule="constant",
        warmup=0.0, label_smoothing=0.0, teacher=None, distill=0.0, average=0.0, bf16=False, compile=False, seed=0,
        before_epoch=None, after_step=None, hold_zeros_from=1, test_every=1, best_from=1, data=None, state_path=None,
        state_tag=None, name="training", log_every_n=50):
    """Train `net`, in place, with SGD on CIFAR-10; return (history, best_state).

    epochs, batch_size (images), lr (peak) and weight_decay (per step, on all parameters) as in torch.optim.SGD;
    schedule and warmup as in learning_rate. before_epoch(epoch, net) may prune before epoch 1, 2, ....
    From epoch hold_zeros_from on (None: never) weights that are zero stay zero. history has a dict
    an epoch: epoch, lr (at its start), train_loss, train_accuracy, seconds and, each `test_every` epochs and
    at the end, test_loss and test_accuracy (fractions). best_state is the state dict of the best
    epoch tested, from epoch best_from on (before it, an iteratively pruned net is not sparse enough to count).

    teacher: a net on the same device from which to distill with weight `distill`, 0 to 1 (see SoftTargets).
    average: above 0, the net that is tested, and that `net` ends as, is an exponential moving average, with this
    decay a step, of weights and BatchNorm statistics. after_step(optimizer, args, kwargs) is called after each
    step, see torch.optim.Optimizer.register_step_post_hook; what it puts into optimizer.state is kept with the state.
    bf16 and compile make it faster (see execution): bfloat16 autocast, and torch.compile.

    With state_path the whole state is kept there after each epoch, and a later call goes on from it, bit for
    bit on the same machine; the caller removes the file. state_tag (plain data) is kept with it and must be
    the same then. Epoch e draws order and augmentation from seed and e.

    Raises ValueError for arguments out of range or a state that is damaged or has another tag, and
    FloatingPointError if loss or weights become NaN or infinite, torch.OutOfMemoryError if batch_size is too large
    for the GPU. Whatever ends it early, Ctrl-C too, the net then holds the last whole epoch.
    OSError if state_path cannot be written, before any training.
    """
    _check(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, momentum=momentum, warmup=warmup,
           label_smoothing=label_smoothing, distill=distill, average=average, seed=seed, test_every=test_every,
           best_from=best_from, log_every_n=log_every_n)
    if hold_zeros_from is not None:
        _check(hold_zeros_from=hold_zeros_from)
    if bool(distill) != (teacher is not None):
        raise ValueError(f"distill must be above 0 with a teacher and 0 without one, got {distill!r} and "
                         f"teacher={type(teacher).__name__}")
    learning_rate(schedule, lr, 0.5)  # refuse an unknown schedule before the work, not after
    if state_path is not None:
        check_writable(state_path)
    device = _device_of(net)
    data = get_data(device) if data is None else data
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, nesterov=nesterov,
                                weight_decay=weight_decay, fused=True if device.type == "cuda" else None)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    history, best, averaged = [], {"accuracy": -1.0, "state": None}, None
    if average:
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(average), use_buffers=True)
    if state_path is not None and Path(state_path).exists():
        history, best = _resume(state_path, state_tag, net, optimizer, averaged)
    if after_step is not None:
        optimizer.register_step_post_hook(after_step)
    if averaged is not None:
        optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(net))
    tested = net if averaged is None else averaged.module

    forward = CompiledForOneSize(net) if compile else net
    if teacher is not None:
        teacher.to(memory_format=torch.channels_last).eval()
        teacher = CompiledForOneSize(teacher) if compile else teacher
    steps = -(-len(data.train_images) // batch_size)
    with tqdm(total=epochs * steps, initial=len(history) * steps, desc=name, unit="step", mininterval=2.0) as bar, \
            _LastWholeEpoch(net) as whole:
        for epoch in range(len(history) + 1, epochs + 1):
            started = time.perf_counter()
            if before_epoch is not None:
                before_epoch(epoch, net)

            def on_step(step):
                rate = learning_rate(schedule, lr, (epoch - 1 + step / steps) / epochs, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                if step and step % log_every_n == 0:
                    bar.update(log_every_n)

            hold = hold_zeros_from is not None and epoch >= hold_zeros_from
            batches = cifar10.Batches(data.train_images, data.train_labels, batch_size,
                                      seed=seed * 100_003 + epoch, augment=True)
            if teacher is not None:
                batches = SoftTargets(batches, teacher, distill, bf16)
            try:
                loss, accuracy = train_epoch(net, batches, optimizer, criterion, hold_zeros=hold, bf16=bf16,
                                             forward=forward, on_step=on_step)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{name}: {device} ran out of memory in epoch {epoch} with batch_size={batch_size}; try "
                    f"batch_size={max(batch_size // 2, 1)}. The net holds the last whole epoch. ({error})") from error
            except ValueError:
                if _is_finite(net):
                    raise
                loss = math.nan  # a quantizer met the broken weights before the loss did
            if not (math.isfinite(loss) and _is_finite(net)):
                raise FloatingPointError(f"{name}: loss or weights became NaN or infinite in epoch {epoch}; lr={lr} "
                                         "may be too large. The net holds the last whole epoch.")
            entry = {"epoch": epoch, "lr": learning_rate(schedule, lr, (epoch - 1) / epochs, warmup),
                     "train_loss": loss, "train_accuracy": accuracy}
            if epoch % test_every == 0 or epoch == epochs:
                if hold and averaged is not None:  # what was pruned on the way was averaged with what it had been
                    apply_masks(tested, weight_masks(net))
                entry["test_loss"], entry["test_accuracy"] = evaluate(tested, data)
                entry["sparsity"] = sparsity(tested)
                if epoch >= best_from and entry["test_accuracy"] > best["accuracy"]:
                    best = {"accuracy": entry["test_accuracy"], "state": _snapshot(tested)}
            entry["seconds"] = time.perf_counter() - started
            history.append(entry)
            whole.keep()
            if state_path is not None:
                atomic_save({"net": whole.state, "optimizer": optimizer.state_dict(), "history": history,
                             "best": best, "tag": state_tag, "average": averaged and averaged.state_dict()}, state_path)
            bar.update(epoch * steps - bar.n)
            bar.set_postfix(epoch=epoch, loss=f"{loss:.4f}",
                            accuracy=f"{100 * entry.get('test_accuracy', accuracy):.2f}%")
    if averaged is not None:
        net.load_state_dict(tested.state_dict())
    return history, best["state"]


class _LastWholeEpoch:
    """A context in which `net` is trained: left by an error or Ctrl-C, the net gets back the state last kept."""

    def __init__(self, net):
        self.net = net
        self.keep()

    def keep(self):
        self.state = _snapshot(self.net)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.net.load_state_dict(self.state)


def _is_finite(net):
    return all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())


def _resume(state_path, tag, net, optimizer, averaged):
    try:
        state = torch.load(state_path, map_location=_device_of(net), weights_only=True)
        if state["tag"] != tag:
            raise ValueError("it was written by a run with another config")
        with _LastWholeEpoch(net):  # what fits of another architecture would be loaded before it is refused
            net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        if averaged is not None:
            averaged.load_state_dict(state["average"])
        return state["history"], state["best"]
    except Exception as error:
        raise ValueError(f"{state_path} cannot be resumed from ({error}); delete it to start over") from error


def training_speed(net, batch_size=256, steps=4):
    """Return how many images a second `net` trains on, from a few eager steps timed after two others.

    The rate is zero, but the net's BatchNorm statistics move.
    """
    _check(batch_size=batch_size, steps=steps)
    device = _device_of(net)
    images, labels = get_data(device)[:2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    for n in (2, steps):
        batches = cifar10.Batches(images[: n * batch_size], labels[: n * batch_size], batch_size, augment=True)
        started = time.perf_counter()
        train_epoch(net, batches, optimizer, F.cross_entropy, hold_zeros=False, bf16=execution(device)["bf16"])
    return len(batches.images) / (time.perf_counter() - started)


def execution(device, steps=math.inf):
    """Return {"bf16": bool, "compile": bool}, how fit trains fastest on `device`; weights stay float32.

    bfloat16 autocast where the hardware multiplies it: a GPU, or a CPU with AMX; elsewhere float32 is up to
    twice as fast. torch.compile from about a thousand steps on, when it has won back the minute it takes; on
    the CPU it writes C++, so it needs a compiler.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return {"bf16": torch.cuda.is_bf16_supported(), "compile": steps >= 1000}
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return {"bf16": torch.cpu._is_amx_tile_supported(), "compile": steps >= 1000 and compiler is not None}


_ALLOWED = [  # arguments, what they must be, and what a number that is that fulfils
    ("epochs batch_size test_every best_from hold_zeros_from log_every_n steps", "a positive integer",
     lambda n: isinstance(n, numbers.Integral) and n >= 1),
    ("seed", "an integer >= 0", lambda n: isinstance(n, numbers.Integral) and n >= 0),
    ("lr weight_decay reg", "a finite number >= 0", lambda x: 0 <= x < math.inf),
    ("momentum warmup average", "a number from 0 to below 1", lambda x: 0 <= x < 1),
    ("label_smoothing distill weight progress", "a number from 0 to 1", lambda x: 0 <= x <= 1),
]


def _check(**arguments):
    """Raise ValueError for the first of the arguments, by name, that is not what _ALLOWED says."""
    for argument, value in arguments.items():
        allowed, fulfils = next(rule[1:] for rule in _ALLOWED if argument in rule[0].split())
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fulfils(value):
            raise ValueError(f"{argument} must be {allowed}, got {value!r}")


# ---------------------------------------------------------------- the homework's entry points


def _fit_into(checkpoint, net, reg, **options):
    """Return the history of fit with weight decay `reg`, its best epoch's weights written to `checkpoint` if any."""
    _check(reg=reg)
    if checkpoint is not None:
        check_writable(checkpoint)
    history, best = fit(net, weight_decay=reg, **options)
    if checkpoint is not None:
        atomic_save(best, checkpoint)
    return history


def train(net, epochs, batch_size, lr, reg, log_every_n=50, checkpoint="net_after_train.pt", seed=0):
    """Train `net` from where it stands, in place, with the assigned pre-training recipe; return its history.

    SGD, momentum 0.875, weight decay `reg`, lr divided by 10 at 50 % and 75 % of the epochs; the net ends in
    its last epoch, and its best test epoch is written to `checkpoint` (None: nowhere). The progress bar moves
    each log_every_n steps. Raises as fit does.
    """
    return _fit_into(checkpoint, net, reg, epochs=epochs, batch_size=batch_size, lr=lr, schedule="step",
                     hold_zeros_from=None, seed=seed, name="train", log_every_n=log_every_n)


def finetune(net, epochs, batch_size, lr, reg, log_every_n=50, checkpoint="quantized_net_after_finetune.pt",
             hold_zeros=True, seed=0):
    """Fine-tune `net`, in place, with the assigned recipe at constant lr; return its history.

    SGD, momentum 0.875, weight decay `reg`. Weights that are zero at the start stay zero unless
    hold_zeros=False. The net ends in its last epoch; its best test epoch is written to `checkpoint`
    (None: nowhere). The progress bar moves each log_every_n steps. Raises as fit does.
    """
    return _fit_into(checkpoint, net, reg, epochs=epochs, batch_size=batch_size, lr=lr,
                     hold_zeros_from=1 if hold_zeros else None, seed=seed, name="finetune", log_every_n=log_every_n)


def finetune_after_prune(net, trainloader, criterion, optimizer, prune=True):
    """Train `net` for one epoch, in place, pruned weights held at zero if `prune`; return (loss, accuracy).

    trainloader: any iterable of (images, labels) batches; criterion(logits, labels) returns a scalar loss;
    optimizer: over the net's parameters. Weights that are zero when the epoch starts count as pruned; with
    prune=False they may grow back.
    """
    return train_epoch(net, trainloader, optimizer, criterion, hold_zeros=prune)
