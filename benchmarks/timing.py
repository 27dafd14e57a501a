"""Timing of training and evaluation: ours, and the assigned pipeline in a process of its own."""

import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

import train_utils
from benchmarks.assigned import assigned_epoch, assigned_evaluation, assigned_loader, assigned_net
from cifar10 import CIFAR10
from experiments.records import weights_path
from resnet20 import ResNetCIFAR
from training.batches import Batches

EVALUATION_BATCH = 256  # the assigned one
# As in Makefile: ours alone, so the assigned process does without.
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def now(device):
    """Return the time in seconds, after the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Times a training loop from its step `warmup` on; with split=True also its parts.

    The parts are data, forward, backward (with the loss) and optimizer; what is left of a step is
    the rest.
    """

    PARTS = ("data", "forward", "backward", "optimizer")

    def __init__(self, device, optimizer, warmup, split):
        self.device, self.warmup, self.split = device, warmup, split
        self.started, self.last, self.hooks = None, None, []
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        if split:  # only then: on a GPU each look at the clock waits
            self.hooks = [optimizer.register_step_pre_hook(lambda *_: self.mark("backward")),
                          optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))]

    def mark(self, part=None):
        """Count the time since the last mark as `part` (None: as the rest)."""
        if self.split:
            at = now(self.device)
            if part is not None and self.started is not None:
                self.seconds[part] += at - self.last
            self.last = at

    def batches(self, batches):
        """Yield from `batches`; the clock starts when batch number `warmup` is asked for."""
        iterator = iter(batches)
        for step in itertools.count():
            if step == self.warmup:
                self.started = now(self.device)
            self.mark()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.mark("data")
            yield batch

    def forward(self, forward):
        """Return `forward`, timed."""

        def timed(x):
            self.mark()
            logits = forward(x)
            self.mark("forward")
            return logits

        return timed

    def stop(self):
        """Return the seconds since the start; with split=True {part: seconds}."""
        total = now(self.device) - self.started
        for hook in self.hooks:
            hook.remove()
        return self.seconds | {"rest": total - sum(self.seconds.values())} if self.split else total


class Pipeline:
    """One way to train, a net and its optimizer: `execution` of ours, or None, the assigned one."""

    def __init__(self, execution, data, batch_size, workers):
        self.execution, self.data = execution, data
        self.batch_size, self.workers = batch_size, workers
        self.device = data.train_images.device
        torch.manual_seed(0)
        if execution is None:
            self.net = self.forward = assigned_net(self.device)
        else:
            self.net = ResNetCIFAR(20).to(self.device, memory_format=torch.channels_last)
            self.forward = execution.of(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.002, momentum=0.875,
                                         weight_decay=1e-4)

    def train(self, steps, warmup, split=False):
        """Train for `warmup` steps and `steps` more; return what Clock.stop does of the latter.

        Raises ValueError if there are not so many images.
        """
        n = (warmup + steps) * self.batch_size
        images, labels = self.data.train_images[:n], self.data.train_labels[:n]
        if len(images) < n:
            raise ValueError(f"steps must be at most {len(images) // self.batch_size - warmup}, "
                             f"got {steps}")
        if self.execution is None:
            batches = assigned_loader(images, labels, self.batch_size, self.workers, train=True)
            epoch = assigned_epoch
        else:
            batches = Batches(images, labels, self.batch_size, augment=True)
            epoch = train_utils.train_epoch
        clock = Clock(self.device, self.optimizer, warmup, split)
        epoch(self.net, clock.batches(batches), self.optimizer, torch.nn.CrossEntropyLoss(),
              forward=clock.forward(self.forward))
        return clock.stop()


class AssignedProcess:
    """The assigned pipelines, in a process with the machine's own allocator; use it in a `with`."""

    def __init__(self, data, workers):
        ours = {name: os.environ.pop(name) for name in ALLOCATOR if name in os.environ}
        try:  # a process reads them when it starts
            # shared memory, which tensors take, may be small
            arrays = [tensor.cpu().numpy() for tensor in data]
            self.pool = ProcessPoolExecutor(
                1,
                multiprocessing.get_context("spawn"),
                _start_assigned,
                (arrays, data.train_images.device, workers, torch.get_num_threads(),
                 multiprocessing.get_start_method()),
            )
            self.pool.submit(os.getpid).result()
        finally:
            os.environ.update(ours)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def train(self, batch_size, steps, warmup, split=False):
        """Return what Pipeline(None, ...).train does; each batch size has one, and it stays."""
        return self.pool.submit(_train_assigned, batch_size, steps, warmup, split).result()

    def evaluate(self):
        """Return (accuracy, seconds) of the float model on all test images."""
        return self.pool.submit(_evaluate_assigned).result()


_assigned = {}  # in that process: "data", "workers", and the pipeline of each batch size


def _start_assigned(arrays, device, workers, threads, start_method):
    torch.set_num_threads(threads)
    # As in a notebook: workers of a spawned process would import PyTorch anew in each epoch.
    multiprocessing.set_start_method(start_method, force=True)
    _assigned.update(data=CIFAR10(*(torch.from_numpy(array).to(device) for array in arrays)),
                     workers=workers)


def _train_assigned(batch_size, *section):
    if batch_size not in _assigned:
        _assigned[batch_size] = Pipeline(None, _assigned["data"], batch_size, _assigned["workers"])
    return _assigned[batch_size].train(*section)


def _evaluate_assigned():
    data, workers = _assigned["data"], _assigned["workers"]
    device = data.test_images.device
    net = train_utils.load_weights(assigned_net(device), weights_path("pretrain"))
    started = now(device)
    loader = assigned_loader(data.test_images, data.test_labels, EVALUATION_BATCH, workers,
                             train=False)
    accuracy = assigned_evaluation(net, loader)[1]
    return accuracy, now(device) - started


def spread(values):
    """Return {"median", "min", "max"} of a list of numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compared(seconds, images):
    """Return images/s of each pipeline and its ratio to the assigned one, from {name: seconds}."""
    ratios = {name: [a / b for a, b in zip(seconds["assigned"], values)]
              for name, values in seconds.items()}
    return {name: {
                "images_per_second": spread([images / s for s in values]),
                "ratio": spread(ratios[name]),
            }
            for name, values in seconds.items()}
