"""Our training and evaluation against the assigned pipeline, interleaved on one device: `make bench`.

The assigned pipeline is what the homework's own notebook does: torchvision transforms on PIL images, a DataLoader with
worker processes, a float32 NCHW net without compilation, loss and accuracy read back in each step. Ours is what
experiments.py does: images on the device, train_utils.train_epoch, channels_last, and on long runs torch.compile.
Both train the same float ResNet-20 with the same SGD. Each has a process of its own, so that the allocator settings
of `make train` are ours alone. Warm-up steps and compilation are not in the images/s.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

import cifar10
import train_utils
from experiments import weights_path
from files import atomic_write, replace_section
from resnet20 import ResNetCIFAR

RESULTS = Path(__file__).with_name("throughput.json")
BATCH_SIZE = 256  # the assigned one
SECTION = "<!-- speed: written by `make bench` -->", "<!-- end of speed -->"  # of README.md
COMPILED_AT = (128, BATCH_SIZE)  # what experiments.py trains with
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")  # as in Makefile


# ---------------------------------------------------------------- the assigned pipeline


class AsTorchvision(TorchvisionCIFAR10):
    """torchvision's CIFAR10, whose __getitem__ is the assigned one, around images (N, 3, 32, 32) already read."""

    def __init__(self, images, labels, transform):
        self.data = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.targets = labels.tolist()
        self.transform, self.target_transform = transform, None


TO_NORMALIZED = [transforms.ToTensor(), transforms.Normalize(cifar10.MEAN, cifar10.STD)]
AUGMENTATION = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]


def assigned_loader(images, labels, batch_size, workers, train):
    """Return the assigned DataLoader: augmented and shuffled for training, in order for testing."""
    transform = transforms.Compose([*AUGMENTATION, *TO_NORMALIZED] if train else TO_NORMALIZED)
    return DataLoader(AsTorchvision(images, labels, transform), batch_size, shuffle=train, num_workers=workers)


def assigned_net(device):
    """Return the assigned ResNet-20 on `device`: its activations, unlike ours, do not overwrite what they read."""
    net = ResNetCIFAR(num_layers=20).to(device)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    return net


def assigned_epoch(net, loader, optimizer, criterion, forward=None):
    """Train `net` as assigned on what `loader` yields; return (mean loss, accuracy). Arguments as in train_epoch."""
    device = next(net.parameters()).device
    forward = net if forward is None else forward
    net.train()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        logits = forward(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(y)
        correct += logits.argmax(1).eq(y).sum().item()
        seen += len(y)
    return total_loss / seen, correct / seen


@torch.no_grad()
def assigned_evaluation(net, loader):
    """Evaluate `net` as assigned on what `loader` yields; return (mean loss, accuracy)."""
    device, criterion = next(net.parameters()).device, torch.nn.CrossEntropyLoss()
    net.eval()
    total_loss, correct, seen = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        logits = net(x)
        total_loss += criterion(logits, y).item() * len(y)
        correct += logits.argmax(1).eq(y).sum().item()
        seen += len(y)
    return total_loss / seen, correct / seen


# ---------------------------------------------------------------- timing


def now(device):
    """Return the time in seconds, after the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Times a training loop from its step `warmup` on; with split=True also what its parts take, on the way.

    The parts are data, forward, backward (with the loss) and optimizer; what is left of a step is the rest.
    """

    PARTS = ("data", "forward", "backward", "optimizer")

    def __init__(self, device, optimizer, warmup, split):
        self.device, self.warmup, self.split = device, warmup, split
        self.started, self.last, self.seconds, self.hooks = None, None, dict.fromkeys(self.PARTS, 0.0), []
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
        """Return the seconds since the start, or with split=True {part: seconds} that add up to them."""
        total = now(self.device) - self.started
        for hook in self.hooks:
            hook.remove()
        return self.seconds | {"rest": total - sum(self.seconds.values())} if self.split else total


class Pipeline:
    """One way to train: a net of its own, its optimizer, and what a section of training on it costs."""

    def __init__(self, kind, data, batch_size, workers):
        self.kind, self.data, self.batch_size, self.workers = kind, data, batch_size, workers
        self.device = data.train_images.device
        torch.manual_seed(0)
        if kind == "assigned":
            self.net = assigned_net(self.device)
        else:
            self.net = ResNetCIFAR(num_layers=20).to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.002, momentum=0.875, weight_decay=1e-4)
        self.forward = train_utils.CompiledForOneSize(self.net) if kind == "compiled" else self.net
        self.bf16 = train_utils.execution(self.device)["bf16"]

    def train(self, steps, warmup, split=False):
        """Train for `warmup` steps and `steps` more; return the seconds of the latter, whole or split into parts."""
        n = (warmup + steps) * self.batch_size
        images, labels = self.data.train_images[:n], self.data.train_labels[:n]
        if len(images) < n:
            raise ValueError(f"steps must be at most {len(images) // self.batch_size - warmup}, got {steps}")
        if self.kind == "assigned":
            batches = assigned_loader(images, labels, self.batch_size, self.workers, train=True)
            epoch, options = assigned_epoch, {}
        else:
            batches = cifar10.Batches(images, labels, self.batch_size, augment=True)
            epoch, options = train_utils.train_epoch, {"hold_zeros": False, "bf16": self.bf16}
        clock = Clock(self.device, self.optimizer, warmup, split)
        epoch(self.net, clock.batches(batches), self.optimizer, torch.nn.CrossEntropyLoss(),
              forward=clock.forward(self.forward), **options)
        return clock.stop()


class AssignedProcess:
    """The assigned pipelines, in a process that has the machine's own allocator settings; use it in a `with`."""

    def __init__(self, data, workers):
        ours = {name: os.environ.pop(name) for name in ALLOCATOR if name in os.environ}
        try:  # a process reads them when it starts
            arrays = [tensor.cpu().numpy() for tensor in data]  # shared memory, which tensors take, may be small
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_assigned,
                                            (arrays, data.train_images.device, workers, torch.get_num_threads()))
            self.pool.submit(os.getpid).result()
        finally:
            os.environ.update(ours)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def train(self, batch_size, steps, warmup, split=False):
        """Return what Pipeline("assigned", ...).train does; there is one for each batch size, and it stays."""
        return self.pool.submit(_train_assigned, batch_size, steps, warmup, split).result()

    def evaluate(self):
        """Return (accuracy, seconds) of the float model on all test images."""
        return self.pool.submit(_evaluate_assigned).result()


_assigned = {}  # in that process: "data", "workers", and the pipeline of each batch size


def _start_assigned(arrays, device, workers, threads):
    torch.set_num_threads(threads)
    _assigned.update(data=cifar10.CIFAR10(*(torch.from_numpy(array).to(device) for array in arrays)), workers=workers)


def _train_assigned(batch_size, *section):
    if batch_size not in _assigned:
        _assigned[batch_size] = Pipeline("assigned", _assigned["data"], batch_size, _assigned["workers"])
    return _assigned[batch_size].train(*section)


def _evaluate_assigned():
    data, workers = _assigned["data"], _assigned["workers"]
    device = data.test_images.device
    net = train_utils.load_weights(assigned_net(device), weights_path("pretrain"))
    started = now(device)
    loader = assigned_loader(data.test_images, data.test_labels, BATCH_SIZE, workers, train=False)
    accuracy = assigned_evaluation(net, loader)[1]
    return accuracy, now(device) - started


def spread(values):
    """Return {"median", "min", "max"} of a list of numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compared(seconds, images):
    """Return images/s of each pipeline and its ratio to the assigned one, from {name: seconds of each round}."""
    ratios = {name: [a / b for a, b in zip(seconds["assigned"], values)] for name, values in seconds.items()}
    return {name: {"images_per_second": spread([images / s for s in values]), "ratio": spread(ratios[name])}
            for name, values in seconds.items()}


# ---------------------------------------------------------------- what is measured


def training(data, assigned, batch_size, compile, options):
    """Return (comparison, seconds to compile or None, {name: train method}) of the pipelines at `batch_size`."""
    ours = {kind: Pipeline(kind, data, batch_size, options.workers) for kind in ["eager"] + ["compiled"] * compile}
    train = {"assigned": functools.partial(assigned.train, batch_size)}
    train |= {kind: pipeline.train for kind, pipeline in ours.items()}
    steps = max(options.images // batch_size, 1)
    compile_seconds = None
    if compile:
        first, later = (train["compiled"](1, 0) for _ in range(2))
        compile_seconds = first - later
    seconds = {kind: [] for kind in train}
    for _ in range(options.rounds):
        for kind in train:
            # Workers have batches ready when the clock starts and leave as many when it stops.
            seconds[kind].append(train[kind](steps, options.warmup))
    return compared(seconds, steps * batch_size), compile_seconds, train


def evaluation(data, assigned, options):
    """Return the comparison of both ways to evaluate the same weights on all test images."""
    device, n = data.test_images.device, len(data.test_labels)
    net = train_utils.load_weights(ResNetCIFAR(num_layers=20).to(device), weights_path("pretrain"))

    def ours():
        started = now(device)
        accuracy = train_utils.evaluate(net, data)[1]
        return accuracy, now(device) - started

    seconds, accuracies = {"assigned": [], "ours": []}, set()
    for _ in range(options.rounds + 1):
        for way, evaluate in (("assigned", assigned.evaluate), ("ours", ours)):
            accuracy, taken = evaluate()
            accuracies.add(accuracy)
            seconds[way].append(taken)
    if max(accuracies) - min(accuracies) > 0.001:
        raise RuntimeError(f"both ways must find one accuracy, got {sorted(accuracies)}")
    return compared({way: values[1:] for way, values in seconds.items()}, n)  # the first is the warm-up


def measure(data, options):
    """Return everything measured as plain data: the JSON's content."""
    results = {"device": _device_name(data.train_images.device), "threads": torch.get_num_threads(),
               "workers": options.workers, "rounds": options.rounds, "torch": torch.__version__,
               "python": platform.python_version(), "epoch_images": len(data.train_images), "training": {}}
    with AssignedProcess(data, options.workers) as assigned:
        for batch_size in options.batch_sizes:
            compile = batch_size in COMPILED_AT and not options.eager
            comparison, compile_seconds, train = training(data, assigned, batch_size, compile, options)
            results["training"][str(batch_size)] = comparison | {"compile_seconds": compile_seconds}
            if batch_size == options.batch_sizes[0]:  # the one that is split, while its compiled net is at hand
                steps = max(options.images // batch_size, 1)
                epoch = len(data.train_images) / (steps * batch_size)
                results["epoch_seconds"] = {
                    kind: {part: s * epoch for part, s in train[kind](steps, options.warmup, True).items()}
                    for kind in train}
        return results | {"evaluation": evaluation(data, assigned, options)}


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"


# ---------------------------------------------------------------- what is shown


def markdown(results):
    """Return the results as three short Markdown tables."""
    names = {"assigned": "assigned", "eager": "ours, eager", "compiled": "ours, compiled", "ours": "ours"}

    def speed(row):
        s, r = row["images_per_second"], row["ratio"]
        return (f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f}) | "
                f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})")

    lines = [f"{results['device']}, {results['threads']} threads, DataLoader with {results['workers']} workers, "
             f"PyTorch {results['torch']}; median (minimum to maximum) of {results['rounds']} interleaved rounds.", "",
             "| | Batch | Images/s | Ratio to assigned | Compile (s) |", "| :-- | --: | --: | --: | --: |"]
    for batch_size, rows in sorted(results["training"].items(), key=lambda item: int(item[0])):
        for name in (name for name in names if name in rows):
            compile_seconds = f"{rows['compile_seconds']:.0f}" if name == "compiled" else ""
            lines.append(f"| training, {names[name]} | {batch_size} | {speed(rows[name])} | {compile_seconds} |")
    lines += [f"| evaluation, {names[name]} | | {speed(row)} | |" for name, row in results["evaluation"].items()]
    parts = [*Clock.PARTS, "rest"]
    first = f"Seconds for {results['epoch_images']:,} images"
    lines += ["", f"| {first} | " + " | ".join([*parts, "sum"]) + " |", "| :-- |" + " --: |" * (len(parts) + 1)]
    for name, split in results["epoch_seconds"].items():
        cells = [f"{s:.1f}" for s in [*(split[part] for part in parts), sum(split.values())]]
        lines.append(f"| {names[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[BATCH_SIZE, 64, 128, 512],
                        help="the first one is also split into the parts of a step")
    parser.add_argument("--rounds", type=int, default=5, help="times that each pipeline is timed")
    parser.add_argument("--images", type=int, help="images timed in a round of training")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock starts, in each round")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count(), 16), help="processes of the DataLoader")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run at all?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of what was measured before")
    parser.add_argument("--write", metavar="FILE", help="write the tables into a Markdown file's speed section, too")
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text()) if options.show else _measured(options)
    print(markdown(results))
    if options.write:
        replace_section(options.write, *SECTION, markdown(results))
    return 0


def _measured(options):
    device = torch.device(options.device)
    if options.images is None:
        options.images = 1536 if device.type == "cpu" else 40 * 1024
    data = cifar10.load(device=device)
    if options.quick:
        options.batch_sizes, options.rounds, options.images, options.warmup, options.eager = [16, 8], 2, 32, 1, True
        data = cifar10.CIFAR10(*(tensor[:200] for tensor in data))
    results = measure(data, options)
    with atomic_write(options.out) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    return results


if __name__ == "__main__":
    sys.exit(main())
