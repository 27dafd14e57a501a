"""Our training and evaluation against the assigned pipeline, in turns on one device: `make bench`.

Both train the same float ResNet-20 with the same SGD. Ours is what `make train` does: images on the
device, train_utils.train_epoch, channels_last; compiled, or as a CUDA graph, in bfloat16 where that
is right (see training.execution). Each side has a process of its own, so that the allocator
settings of `make train` are ours alone. Warm-up steps and compilation are not in the images/s.
"""

import argparse
import functools
import json
import platform
import sys
from pathlib import Path

import torch

import cifar10
import train_utils
from benchmarks.timing import AssignedProcess, Clock, Pipeline, compared, now
from experiments.pool import cores
from experiments.records import weights_path
from files import replace_section, write_json
from resnet20 import ResNetCIFAR
from training.execution import Execution, bf16_is_right, has_bf16, has_compiler

RESULTS = {"cpu": Path(__file__).with_name("throughput.json"),
           "cuda": Path(__file__).with_name("throughput_gpu.json")}
BATCH_SIZE = 256  # the assigned one
SECTIONS = {  # of README.md
    "cpu": ("<!-- speed: written by `make bench` -->", "<!-- end of speed -->"),
    "cuda": ("<!-- speed of a GPU: written by `make bench` -->", "<!-- end of speed of a GPU -->")}
NAMES = {"assigned": "assigned", "float32": "ours, float32", "bfloat16": "ours, bfloat16",
         "compiled": "ours, compiled", "graph": "ours, as a CUDA graph", "ours": "ours"}


# ---------------------------------------------------------------- what is measured


def candidates(device, eager=False):
    """Return {name: Execution} of ways to train on `device` that execution.fastest may take.

    Compiled, or as a CUDA graph, in bfloat16 where that is right. eager: the uncompiled ones.
    """
    bf16 = has_bf16(device) and bf16_is_right(ResNetCIFAR(20).to(device))
    ways = {"float32": Execution()} | ({"bfloat16": Execution(bf16=True)} if bf16 else {})
    if device.type == "cuda":
        ways["graph"] = Execution(bf16=bf16, graph=True)
    elif has_compiler() and not eager:
        ways["compiled"] = Execution(bf16=bf16, compile=True)
    return ways


def training(data, assigned, batch_size, options):
    """Return (comparison, seconds to compile or None, {name: train method}) at `batch_size`."""
    ways = candidates(data.train_images.device, options.eager)
    train = {"assigned": functools.partial(assigned.train, batch_size)}
    train |= {name: Pipeline(way, data, batch_size, options.workers).train
              for name, way in ways.items()}
    steps = max(options.images // batch_size, 1)
    compile_seconds = None
    if "compiled" in train:
        first, later = (train["compiled"](1, 0) for _ in range(2))
        compile_seconds = first - later
    seconds = {kind: [] for kind in train}
    for _ in range(options.rounds):
        for kind in train:
            # Workers have batches ready when the clock starts and leave as many when it stops.
            seconds[kind].append(train[kind](steps, options.warmup))
    return compared(seconds, steps * batch_size), compile_seconds, train


def evaluation(data, assigned, options):
    """Return the comparison of both ways to evaluate the same weights on all test images.

    Raises RuntimeError if they find two accuracies.
    """
    device, n = data.test_images.device, len(data.test_labels)
    net = train_utils.load_weights(ResNetCIFAR(20).to(device), weights_path("pretrain"))

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
    # The first round is the warm-up.
    return compared({way: values[1:] for way, values in seconds.items()}, n)


def measure(data, options):
    """Return everything measured as plain data: the JSON's content."""
    device = data.train_images.device
    results = {
        "device": (torch.cuda.get_device_name(device) if device.type == "cuda"
                   else f"CPU, {platform.machine()}"),
        "threads": torch.get_num_threads(), "workers": options.workers, "rounds": options.rounds,
        "torch": torch.__version__, "python": platform.python_version(),
        "epoch_images": len(data.train_images), "training": {},
    }
    with AssignedProcess(data, options.workers) as assigned:
        for batch_size in options.batch_sizes:
            comparison, compile_seconds, train = training(data, assigned, batch_size, options)
            results["training"][str(batch_size)] = comparison | {"compile_seconds": compile_seconds}
            if batch_size == options.batch_sizes[0]:  # split while its compiled net is at hand
                steps = max(options.images // batch_size, 1)
                epoch = len(data.train_images) / (steps * batch_size)
                split = {kind: train[kind](steps, options.warmup, True) for kind in train}
                results["epoch_seconds"] = {
                    kind: {part: seconds * epoch for part, seconds in parts.items()}
                    for kind, parts in split.items()}
        return results | {"evaluation": evaluation(data, assigned, options)}


# ---------------------------------------------------------------- what is shown


def markdown(results):
    """Return the results as two short Markdown tables."""

    def speed(row):
        s, r = row["images_per_second"], row["ratio"]
        return (f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f}) | "
                f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})")

    lines = [f"{results['device']}, {results['threads']} threads, DataLoader with "
             f"{results['workers']} workers, PyTorch {results['torch']}; median (minimum to "
             f"maximum) of {results['rounds']} interleaved rounds.", "",
             "| | Batch | Images/s | Ratio to assigned | Compile (s) |",
             "| :-- | --: | --: | --: | --: |"]
    for batch_size, rows in sorted(results["training"].items(), key=lambda item: int(item[0])):
        for name in (name for name in NAMES if name in rows):
            seconds = f"{rows['compile_seconds']:.0f}" if name == "compiled" else ""
            lines.append(f"| training, {NAMES[name]} | {batch_size} | {speed(rows[name])} | "
                         f"{seconds} |")
    lines += [f"| evaluation, {NAMES[name]} | | {speed(row)} | |"
              for name, row in results["evaluation"].items()]
    parts = [*Clock.PARTS, "rest"]
    first = f"Seconds for {results['epoch_images']:,} images"
    lines += ["", f"| {first} | " + " | ".join([*parts, "sum"]) + " |",
              "| :-- |" + " --: |" * (len(parts) + 1)]
    for name, split in results["epoch_seconds"].items():
        cells = [f"{s:.1f}" for s in [*(split[part] for part in parts), sum(split.values())]]
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    """Command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if min(options.rounds, *options.batch_sizes) < 1:
        parser.error("--rounds and --batch-sizes must be at least 1, got "
                     f"{options.rounds} and {options.batch_sizes}")
    kind = torch.device(options.device).type
    options.out = options.out or RESULTS[kind]
    results = json.loads(options.out.read_text()) if options.show else _measured(options)
    print(markdown(results))
    if options.write:
        replace_section(options.write, *SECTIONS[kind], markdown(results))
    return 0


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[BATCH_SIZE, 128],
                        help="the first one is also split into the parts of a step")
    parser.add_argument("--rounds", type=int, default=4, help="times that each pipeline is timed")
    parser.add_argument("--workers", type=int, default=min(cores(), 16),
                        help="processes of the DataLoader")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file; of the device, beside this, if none")
    parser.add_argument("--show", action="store_true",
                        help="print the tables of what was measured before")
    parser.add_argument("--write", metavar="FILE",
                        help="write the tables into a Markdown file's speed section, too")
    return parser


def _measured(options):
    device = torch.device(options.device)
    data = cifar10.load(device=device)
    # images timed in a round, steps before its clock starts, and whether nothing is compiled
    options.images = 1536 if device.type == "cpu" else 40 * 1024
    options.warmup, options.eager = 4, options.quick
    if options.quick:
        options.batch_sizes, options.rounds, options.images, options.warmup = [16, 8], 2, 32, 1
        data = cifar10.CIFAR10(*(tensor[:200] for tensor in data))
    results = measure(data, options)
    write_json(options.out, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
