"""Command line: `list` the runs, or `run` some of them. See --help."""

import argparse
import os
import sys
from pathlib import Path

from experiments.records import SHIPPED, RecordError, read_record
from experiments.runs import RUNS, get


def main(arguments=None):
    """Run a command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _list() if options.command == "list" else _run(options)
    # a reader such as head has what it wanted; the exit writes nothing more
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m experiments",
                                     description="Every training run of the homework.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every run, with its result")
    run = commands.add_parser(
        "run", help="train runs that are not trained yet; an interrupted one goes on"
    )
    run.add_argument("names", nargs="+", metavar="NAME", help="names from `list`, or all")
    run.add_argument("--force", action="store_true",
                     help="train one run again that is trained already; for more, --into a folder")
    run.add_argument("--into", type=_folder, default=SHIPPED, metavar="FOLDER",
                     help="where weights and records go, and parents are looked for first "
                          "(default: checkpoints)")
    run.add_argument("--seeds", type=_count, default=1, metavar="N",
                     help="train each with N seeds: NAME, NAME@1, ...; the ablation has one")
    run.add_argument("--jobs", type=_count, metavar="N",
                     help="runs at once (default: one for each core, on a GPU one); several take "
                          "one thread each, a single one takes all cores")
    run.add_argument("--as-recorded", action="store_true",
                     help="in the precision of its record, not the fastest: the same bits again")
    return parser


def _count(text):
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _folder(text):
    return Path(text).resolve()  # so that the shipped folder is known by any of its names


def _list():
    errors = []
    for name, run in RUNS.items():
        try:
            record = read_record(name)
            result = f"{100 * record['test_accuracy']:6.2f} %" if record else "not trained"
        except RecordError as error:  # said below; the others are listed
            result, errors = "damaged", [*errors, error]
        print(f"{name:28} {result:12} {run.question}")
    sys.stdout.flush()
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return int(bool(errors))


def _run(options):
    from experiments import pool  # which needs torch, that `list` can do without

    names = list(RUNS) if options.names == ["all"] else options.names
    if options.seeds > 1 and any("@" in name for name in names):
        raise ValueError(f"--seeds must be 1 where a name has a seed, got {options.seeds}")
    seeds = ["", *(f"@{seed}" for seed in range(1, options.seeds))]
    asked = list(dict.fromkeys(
        get(name + seed).name for seed in seeds for name in names
        if not (seed and get(name).held_out)))  # their parents' weights are not shipped
    if options.force and len(asked) > 1:  # interrupted, it could not tell what it has done
        raise ValueError(f"--force takes one run, got {len(asked)}; to train more of them again, "
                         "name an empty folder with --into")
    records = {name: None if options.force else read_record(name, options.into) for name in asked}
    for name, record in records.items():
        if record is not None:
            print(f"{name}: trained already, {100 * record['test_accuracy']:.2f} % "
                  "(--force trains it again)")
    wanted = [name for name in asked if records[name] is None]
    return pool.run(wanted, options.into, options.jobs, options.as_recorded) if wanted else 0


if __name__ == "__main__":
    sys.exit(main())
