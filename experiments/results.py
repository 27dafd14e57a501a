"""Our results beside the reference's and the goals, from the records alone."""

import argparse
import statistics
import sys

from arguments import check
from experiments.records import SHIPPED, read_record, record_path
from experiments.runs import REFERENCE, RUNS, get
from files import replace_section

HEADER = ["Question", "Reference (%)", "Assigned, best (%)", "Assigned, last (%)",
          "Improved, last (%)"]

# What we set out for: {run: (required, goal)}, fractions, of the epoch that the run ships.
GOALS = {"pretrain": (0.926, 0.933),
         "lab2c_oneshot": (0.914, 0.918), "lab2d_iterative": (0.914, 0.918),
         "lab2e_global": (0.916, 0.922), "lab2e_global_improved": (0.924, 0.930),
         "lab3c_4bit": (0.922, 0.928), "lab3c_4bit_improved": (0.925, 0.931),
         "lab3c_3bit": (0.914, 0.920), "lab3c_3bit_improved": (0.924, 0.930),
         "lab3c_2bit": (0.865, 0.880), "lab3c_2bit_improved": (0.920, 0.925),
         "lab3d_4bit": (0.916, 0.920), "lab3d_4bit_improved": (0.923, 0.929),
         "lab3d_3bit": (0.912, 0.917), "lab3d_3bit_improved": (0.923, 0.928),
         "lab3d_2bit": (0.880, 0.890), "lab3d_2bit_improved": (0.919, 0.924)}
GOAL_HEADER = ["Run", "Required (%)", "Goal (%)", "Ours (%)", "To required (points)",
               "To goal (points)"]

_BEGIN = "<!-- results: written by `python -m experiments.results --write README.md` -->"
_END = "<!-- end of results -->"


def accuracies(name, which, folder=SHIPPED):
    """Return the test accuracies, fractions, of run `name`, one a recorded seed.

    which: "best" or "last", the epoch. Raises ValueError if it is neither.
    """
    check(("best", "last"), which=which)
    place = record_path(name, folder).parent
    seeds = [path.stem.partition("@")[2] for path in place.glob(f"{name}@*.json")]
    seeds = sorted(int(seed) for seed in seeds if seed.isdecimal())  # not "1 copy"
    records = [read_record(run, folder) for run in (name, *(f"{name}@{seed}" for seed in seeds))]
    return [record[which]["test_accuracy"] for record in records if record is not None]


def shown(values, unit=""):
    """Return accuracies as text in %: their mean and, of several, deviation and number of seeds.

    unit: what follows the numbers; none in a table, whose header says it. "" if there are none.
    """
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean + unit
    return f"{mean} ± {100 * statistics.stdev(values):.2f}{unit} ({len(values)} seeds)"


def rows(names=tuple(REFERENCE)):
    """Return a row of cells (see HEADER) for each run in `names`."""
    table = []
    for name in names:
        last, improved = accuracies(name, "last"), f"{name}_improved"
        if get(name).keep == "last":  # the float model's recipe is ours: no epoch was chosen
            cells = ["", "", shown(last)]
        else:
            cells = [shown(accuracies(name, "best")), shown(last),
                     shown(accuracies(improved, "last")) if improved in RUNS else ""]
        table.append([get(name).question, f"{100 * REFERENCE[name]:.2f}", *cells])
    return table


def goal_rows():
    """Return a row of cells (see GOAL_HEADER) for each run in GOALS."""
    table = []
    for name, goals in GOALS.items():
        ours = accuracies(name, get(name).keep)
        gaps = [f"{100 * (statistics.mean(ours) - goal):+.2f}" if ours else "" for goal in goals]
        table.append([name, *(f"{100 * goal:.2f}" for goal in goals), shown(ours), *gaps])
    return table


def write(path):
    """Replace the results table of the Markdown file at `path`, between its two marker lines.

    Raises ValueError if the lines are not there; the file is unchanged then.
    """
    lines = [HEADER, [":--", *["--:"] * (len(HEADER) - 1)], *rows()]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    replace_section(path, _BEGIN, _END, text)


def main(arguments=None):
    """Command line: print the tables, or --write FILE. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.results", description=__doc__)
    parser.add_argument("--write", metavar="FILE",
                        help="write the results into a Markdown file's results section")
    options = parser.parse_args(arguments)
    try:
        if options.write:
            write(options.write)
            return 0
        for row in [HEADER, *rows()]:
            print("{:72} {:>13} {:>24} {:>24} {:>24}".format(*row))
        print()
        for row in [GOAL_HEADER, *goal_rows()]:
            print("{:24} {:>13} {:>9} {:>24} {:>21} {:>17}".format(*row))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
