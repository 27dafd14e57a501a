"""Why does the test accuracy of 2-bit runs jump from epoch to epoch?

`python -m benchmarks.jumps` trains one again and tests it twice after each epoch: with the
BatchNorm statistics that it has then, running averages over its last steps, and with statistics
estimated anew.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import train_utils
from experiments.controls import reestimate_statistics
from experiments.records import ROOT
from experiments.run import train_run
from files import write_json
from training.journal import Journal

RESULTS = Path(__file__).with_name("jumps.json")
RUN = "lab3c_2bit"
INTO = ROOT / "build" / "jumps"  # where it is trained, and an interrupted training goes on


class Twice(Journal):
    """A Journal whose entries have "anew_accuracy", too: with statistics estimated on the first
    `n_images` training images.
    """

    def __init__(self, name, state_path, tag, n_images):
        super().__init__(name, state_path, tag | {"images": n_images})
        self.n_images = n_images

    def epoch_done(self, epoch, entry, may_be_best):
        """Test a copy of the net with statistics anew, then keep net and entry as a Journal does.
        """
        data = train_utils.get_data(next(self.net.parameters()).device)
        anew = reestimate_statistics(copy.deepcopy(self.net), data.train_images[:self.n_images])
        accuracy = train_utils.evaluate(anew, data)[1]
        super().epoch_done(epoch, entry | {"anew_accuracy": accuracy}, may_be_best)


def compare(name, n_images):
    """Train run `name` again; return {"running": accuracies, "anew": accuracies}, one an epoch.

    n_images: training images that statistics are estimated on. Raises as train_run does.
    """
    journal = functools.partial(Twice, n_images=n_images)
    history = train_run(name, INTO, make_journal=journal)["history"]
    return {"running": [entry["test_accuracy"] for entry in history],
            "anew": [entry["anew_accuracy"] for entry in history]}


def main(arguments=None):
    """Command line; an interrupted training goes on. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jumps",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000,
                        help="training images that statistics are estimated on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not 1 <= options.images <= 50_000:
        parser.error(f"--images must be from 1 to 50000, got {options.images}")
    write_json(options.out, {"run": RUN, "images": options.images}
               | compare(RUN, options.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
