"""Why does the test accuracy of 2-bit runs jump from epoch to epoch?

`python -m benchmarks.jumps` trains one again and tests it twice after each epoch: with the
BatchNorm statistics that it has then, running averages over its last steps, and with statistics
estimated anew.
"""

import argparse
import copy
import sys
from pathlib import Path

import train_utils
from experiments.controls import reestimate_statistics
from experiments.run import build, load_or_train
from experiments.runs import get
from files import write_json
from training.execution import fastest
from training.journal import Journal

RESULTS = Path(__file__).with_name("jumps.json")
RUN = "lab3c_2bit"


class Twice(Journal):
    """A Journal whose entries have "anew_accuracy", too: with statistics estimated on `images`."""

    def __init__(self, name, state_path, data, images):
        super().__init__(name, state_path, tag={"images": len(images)})
        self.data, self.images = data, images

    def epoch_done(self, epoch, entry, may_be_best):
        """Test a copy of the net with statistics anew, then keep net and entry as a Journal does.
        """
        anew = reestimate_statistics(copy.deepcopy(self.net), self.images)
        accuracy = train_utils.evaluate(anew, self.data)[1]
        super().epoch_done(epoch, entry | {"anew_accuracy": accuracy}, may_be_best)


def compare(name, n_images, state_path=None):
    """Train run `name` again; return {"running": accuracies, "anew": accuracies}, one an epoch.

    n_images: training images that statistics are estimated on; state_path: as of a Journal.
    """
    run = get(name)
    net = load_or_train(run.start_from, build(name))[0]
    data = train_utils.get_data(next(net.parameters()).device)
    steps = run.recipe.epochs * len(data.train_images) // run.recipe.batch_size
    journal = Twice(name, state_path, data, data.train_images[:n_images])
    history, _ = train_utils.fit(net, run.recipe, data, pruning=run.pruning, seed=run.seed,
                                 execution=fastest(net, run.recipe.batch_size, steps),
                                 journal=journal)
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
    state = options.out.with_suffix(".resume.pt")
    write_json(options.out, {"run": RUN, "images": options.images}
               | compare(RUN, options.images, state))
    state.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
