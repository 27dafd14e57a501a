"""Our results beside the reference's and the goals, from the records alone: tables for README, report and notebooks."""

import argparse
import statistics
import sys

from experiments import REFERENCE, RUNS, SHIPPED, get, read_record
from files import replace_section

HEADER = ["Question", "Reference (%)", "Assigned, best (%)", "Assigned, last (%)", "Improved, last (%)"]
NOT_YET = "not trained yet"

# What we set out for, fractions: with the assigned recipe (best epoch), with an improved one (last epoch).
GOALS = {
    "pretrain": (None, 0.9403),
    "lab2c_oneshot": (0.899, None), "lab2d_iterative": (0.899, None), "lab2e_global": (0.905, 0.924),
    "lab3c_4bit": (0.922, 0.925), "lab3c_3bit": (0.914, 0.922), "lab3c_2bit": (0.865, 0.918),
    "lab3d_4bit": (0.908, 0.920), "lab3d_3bit": (0.895, 0.916), "lab3d_2bit": (0.85, 0.910),
}

_BEGIN, _END = "<!-- results: written by `python results.py --write README.md` -->", "<!-- end of results -->"


def accuracies(name, which, folder=SHIPPED):
    """Return the test accuracies, fractions, of run `name` in its "best" or "last" epoch, one a recorded seed."""
    seeds = sorted(int(path.stem.partition("@")[2]) for path in folder.glob(f"{name}@*.json"))
    records = [read_record(run, folder) for run in (name, *(f"{name}@{seed}" for seed in seeds))]
    return [record[which]["test_accuracy"] for record in records if record is not None]


def shown(values):
    """Return accuracies as text in %: their mean, and the sample standard deviation and number if there are several."""
    if not values:
        return NOT_YET
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f} ({len(values)} seeds)"


def rows(names=tuple(REFERENCE)):
    """Return a row of cells (see HEADER) for each run in `names`."""
    table = []
    for name in names:
        best, last = accuracies(name, "best"), accuracies(name, "last")
        if get(name).keep == "last":  # no epoch was chosen on the test set
            best_shown = "" if best else NOT_YET
        else:
            best_shown = shown(best)
        improved = f"{name}_improved"
        table.append([get(name).question, f"{100 * REFERENCE[name]:.2f}", best_shown, shown(last) if last else "",
                      shown(accuracies(improved, "last")) if improved in RUNS else ""])
    return table


def goal_rows():
    """Return [run, goal in %, ours in %, ours less the goal in points] for every goal, assigned and improved."""
    table = []
    for name, goals in GOALS.items():
        for run, goal, which in ((name, goals[0], "best"), (f"{name}_improved", goals[1], "last")):
            if goal is not None:
                run = run if run in RUNS else name
                ours = accuracies(run, which)
                gap = f"{100 * (statistics.mean(ours) - goal):+.2f}" if ours else ""
                table.append([run, f"{100 * goal:.2f}", shown(ours), gap])
    return table


def write(path):
    """Replace the results table of the Markdown file at `path`, between its two marker lines.

    Raises ValueError if the lines are not there; the file is unchanged then.
    """
    lines = [HEADER, [":--", *["--:"] * (len(HEADER) - 1)], *rows()]
    replace_section(path, _BEGIN, _END, "\n".join("| " + " | ".join(line) + " |" for line in lines))


def main(arguments=None):
    """Command line: print the tables, or --write FILE. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="FILE", help="write the results into a Markdown file's results section")
    options = parser.parse_args(arguments)
    try:
        if options.write:
            write(options.write)
            return 0
        for row in [HEADER, *rows()]:
            print("{:72} {:>13} {:>24} {:>24} {:>24}".format(*row))
        print()
        for row in [["Run", "Goal (%)", "Ours (%)", "Ours less goal"], *goal_rows()]:
            print("{:24} {:>9} {:>24} {:>15}".format(*row))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
