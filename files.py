"""Files are written whole or not at all."""

import errno
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path):
    """Open a binary file that takes the place of `path` when the block ends without an error.

    Until then `path` is what it was, also if the process is killed; missing parent folders are
    made. Raises OSError naming `path` if it cannot be written (full disk, read-only folder).
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            error.errno, f"cannot write {path} ({reason}); what was there before is intact"
        ) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the error that led here is the one to report


def write_json(path, value):
    """Write plain data as JSON to `path`, whole or not at all. Raises as atomic_write does."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def check_writable(path):
    """Raise OSError naming `path` if it could not be written now."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path} ({error.strerror or error})") from error


def replace_section(path, begin, end, text):
    """Replace what stands between the lines `begin` and `end` of the text file at `path`.

    Raises ValueError if the lines are not there; the file is unchanged then.
    """
    path = Path(path)
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} must hold the lines {begin!r} and {end!r}")
    with atomic_write(path) as file:
        file.write(f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
