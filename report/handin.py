"""The hand-in: exactly the three files that the assignment asks for, in a folder of their own."""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from report.cells import ReportError
from report.export import ROOT, export

NOTEBOOKS = ("lab1_sparse_linear.ipynb", "hw4.ipynb")  # Lab 1, and Labs 2 and 3


def check_names(student, netid):
    """Raise ReportError, saying what to do, if one of them is empty."""
    if not student.strip() or not netid.strip():
        raise ReportError('a hand-in needs your name and NetID: make handin STUDENT="Ada '
                          'Lovelace" NETID=al1815')


def hand_in(source, out, student, netid):
    """Write the report and two executed notebooks from the folder `source` into the folder `out`.

    An earlier hand-in there is replaced, once all three are there. Returns the names of the files.
    Raises ReportError without a name or a NetID, for a notebook that is not executed, if `out`
    holds anything else, and if it cannot be written.
    """
    check_names(student, netid)
    out = Path(out)
    try:
        found = {path.name for path in out.iterdir()} if out.exists() else set()
        strange = sorted(found - {"report.pdf", *NOTEBOOKS, ".DS_Store"})  # Finder puts that
        if strange:
            raise ReportError(f"{out} holds {strange[0]}, which is not of a hand-in; move it, or "
                              "name another folder with --out")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".handin-") as folder:
            new, old = Path(folder) / "new", Path(folder) / "old"
            new.mkdir()
            export("report.pdf", source, new / "report.pdf", student=student, netid=netid)
            for name in NOTEBOOKS:
                shutil.copyfile(Path(source) / name, new / name)
            if out.exists():
                out.rename(old)
            try:
                new.rename(out)
            except BaseException:  # Ctrl-C, too
                if old.exists():
                    old.rename(out)
                raise
    except OSError as error:
        raise ReportError(f"{out} cannot be written ({error})") from error
    return sorted(path.name for path in out.iterdir())


def main(arguments=None):
    """Command line; STUDENT and NETID are read from the environment. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m report.handin", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "build", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "handin", metavar="DIR")
    parser.add_argument("--check", action="store_true", help="only check name and NetID")
    options = parser.parse_args(arguments)
    student, netid = os.environ.get("STUDENT", ""), os.environ.get("NETID", "")
    try:
        if options.check:
            check_names(student, netid)
            return 0
        for name in hand_in(options.source, options.out, student, netid):
            print(options.out / name)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("Hand these in as three single files: a zip costs 20 % of the grade.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
