"""Where weights and records of runs are, and that they belong to the runs as they are defined."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from experiments.runs import Run, get

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "checkpoints"
# RETRAIN=1 trains into here; shipped files stay as they are
RETRAINED = ROOT / "build" / "retrained"
# without one of these a record is damaged
USED = {"test_accuracy", "best", "last", "history", "execution", "environment"}


class RecordError(RuntimeError):
    """A run's record or checkpoint does not belong to the run as it is defined."""


def retraining():
    """Return whether the environment has RETRAIN=1."""
    return os.environ.get("RETRAIN") == "1"


def _place(name, folder):
    """Return the folder of a run's files: the ablation's have their own among the shipped ones."""
    inside = folder == SHIPPED and get(name).held_out
    return folder / "ablation" if inside else folder


def weights_path(name, folder=None):
    """Return where the weights of run `name` are; the shipped float model lies at the top level."""
    folder = SHIPPED if folder is None else folder
    if (name, folder) == ("pretrain", SHIPPED):
        return ROOT / "pretrained_model.pt"
    return _place(name, folder) / f"{name}.pt"


def record_path(name, folder=None):
    """Return where the record of run `name` is."""
    return _place(name, SHIPPED if folder is None else folder) / f"{name}.json"


def sha256(path):
    """Return the SHA-256 of a file as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _differences(recorded, now, default, prefix=""):
    """Return {setting: (recorded, now)}; a setting that came later is recorded as its default."""
    differ = {}
    for key in recorded.keys() | now.keys():
        a, b = recorded.get(key, default.get(key)), now.get(key)
        if isinstance(b, dict):
            differ |= _differences(a, b, default[key], f"{prefix}{key}.")
        elif a != b and key != "question":  # a text, not a setting
            differ[prefix + key] = (a, b)
    return differ


def read_record(name, folder=None):
    """Return the record of run `name` as a dict, or None if it is not trained yet.

    Raises RecordError if the record's config is not the run's, if a parent was trained again since,
    or if the weights beside it are missing or not those that the run wrote. Weights of other seeds
    and of runs on held-out images are not shipped, so they may be missing.
    """
    run, path, weights = get(name), record_path(name, folder), weights_path(name, folder)
    into = "" if folder in (None, SHIPPED) else f" --into {folder}"
    again = f"train it again: python -m experiments run {name} --force{into}"
    try:
        record = json.loads(path.read_text())
        differ = _differences(record["config"], asdict(run), asdict(Run("", "")))
        written = record["weights_sha256"]
        parents = {run.start_from: record["start_from_sha256"],
                   run.teacher: record["teacher_sha256"]}
        if missing := USED - record.keys():
            raise KeyError(*sorted(missing))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is damaged ({error!r}); restore it, or {again}") from error
    if differ:
        raise RecordError(
            f"{path} was trained with another config (recorded, now): {differ}; {again}"
        )
    for parent, had in parents.items():
        if parent is not None and not _is_still(parent, had, folder):
            raise RecordError(f"{path} was trained from another {parent}; {again}")
    optional = "@" in name or run.held_out
    if sha256(weights) != written if weights.exists() else not optional:
        raise RecordError(f"{weights} is not the file that the run in {path} wrote; restore it, "
                          f"or {again}")
    return record


def _is_still(parent, weights_sha256, folder):
    """Return whether a child's parent, in `folder` or shipped, has these weights; so if it is gone.
    """
    gone = True
    for place in (folder, SHIPPED):
        record = read_record(parent, place)
        if record is not None and record["weights_sha256"] == weights_sha256:
            return True
        gone = gone and record is None
    return gone


def not_trained(name):
    """Return the sentence that stands where the result of an untrained run would."""
    return f"not trained yet: python -m experiments run {get(name).name}"
