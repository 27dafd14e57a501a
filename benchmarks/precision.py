"""Does bfloat16 cost accuracy? Short trainings on held-out images, alike but for the precision.

`python -m benchmarks.precision` trains the float ResNet-20 on 45,000 of the training images, in
float32 and in bfloat16, with a few seeds, and tests on the other 5,000.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

import train_utils
from cifar10 import hold_out
from experiments.runs import FROM_SCRATCH
from files import replace_section, write_json
from resnet20 import ResNetCIFAR
from training.execution import Execution, bf16_is_right, has_bf16
from training.journal import Journal

RESULTS = Path(__file__).with_name("precision.json")
SECTION = "<!-- precision: written by `make bench` -->", "<!-- end of precision -->"  # of README.md
EPOCHS, HELD_OUT = 3, 5000


def compare(seeds, device="cpu"):
    """Return {precision: held-out accuracies, fractions, one a seed} after EPOCHS."""
    data = hold_out(train_utils.get_data(torch.device(device)), HELD_OUT)
    found = {"float32": [], "bfloat16": []}
    for seed in range(seeds):
        for name, execution in (("float32", Execution()), ("bfloat16", Execution(bf16=True))):
            torch.manual_seed(seed)
            net = ResNetCIFAR(20).to(device)
            history = train_utils.fit(net, replace(FROM_SCRATCH, epochs=EPOCHS), data, seed=seed,
                                      execution=execution, journal=Journal(f"{name}, {seed}"))
            found[name].append(history[-1]["test_accuracy"])
    return found


def difference(results):
    """Return (mean, standard error) of bfloat16's accuracies less float32's, seed by seed."""
    gaps = [b - a for a, b in zip(results["float32"], results["bfloat16"])]
    return statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5


def sentence(results):
    """Return what was found, in one sentence."""
    a, b = (", ".join(f"{100 * accuracy:.2f}" for accuracy in results[name])
            for name in ("float32", "bfloat16"))
    mean, error = difference(results)
    return (f"After {results['epochs']} epochs float32 has {a} % and bfloat16 {b} % on "
            f"{results['held_out']:,} held-out images, with the same seeds; the mean difference is "
            f"{100 * mean:+.2f} points, with a standard error of {100 * error:.2f}.")


def main(arguments=None):
    """Command line. A machine that does not multiply bfloat16, or not rightly, has nothing to
    compare.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.seeds < 2:  # before hours of training, not after
        parser.error(f"--seeds must be at least 2, got {options.seeds}")
    net = ResNetCIFAR(20).to(options.device)
    if not (has_bf16(torch.device(options.device)) and bf16_is_right(net)):
        print("This machine does not multiply bfloat16, or not rightly: nothing to compare.")
        return
    found = compare(options.seeds, options.device)
    results = found | {"epochs": EPOCHS, "held_out": HELD_OUT}
    write_json(options.out, results)
    print(sentence(results))
    if options.write:
        replace_section(options.write, *SECTION, sentence(results))


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="2 or more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", metavar="FILE", help="write the sentence into a Markdown file")
    return parser


if __name__ == "__main__":
    main()
