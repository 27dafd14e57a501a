"""How a run is trained, recorded, resumed and loaded."""

import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train_utils
from arguments import check
from cifar10 import hold_out
from experiments.records import (
    RETRAINED, SHIPPED, RecordError, not_trained, read_record, record_path, retraining, sha256,
    weights_path,
)
from experiments.runs import Run, get
from files import write_json
from FP_layers import Learned, MinMax
from pruning import layer_sparsity, sparsity
from resnet20 import ResNetCIFAR
from training.checkpoints import fit_quantizers, load_weights, read_state, save_weights
from training.execution import Execution, fastest, seconds_a_step
from training.journal import Journal

QUANTIZERS = {"minmax": MinMax, "learned": Learned}
TOLERANCE = 0.001  # by which an accuracy may differ from its record's on another device


def build(name, device=None):
    """Return the untrained net of run `name` on `device`, the GPU if there is one."""
    run = get(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        net = ResNetCIFAR(20, run.Nbits, run.symmetric, QUANTIZERS[run.quantizer], run.width)
        return net.to(device)


def train_run(name, folder=SHIPPED, as_recorded=False, make_journal=Journal):
    """Train run `name`, or go on with it where it was interrupted; write weights and record.

    It runs in the way that is fastest here (see training.execution); as_recorded: in the way of its
    record, which gives the same bits on the same machine. journal: makes what keeps the training,
    as Journal does. Returns the record. Raises RecordError unless what it starts from and learns
    from is trained, in `folder` or among the shipped runs.
    """
    run = get(name)
    net, teacher, start_sha256, teacher_sha256 = build(name), None, None, None
    device = next(net.parameters()).device
    if run.start_from is not None:
        start_sha256 = _load_parent(run.start_from, net, folder, name)
        if _grid(get(run.start_from)) != _grid(run):
            fit_quantizers(net)  # a parent's steps belong to its own levels
    if run.teacher is not None:
        teacher = build(run.teacher)
        teacher_sha256 = _load_parent(run.teacher, teacher, folder, name)
    data = train_utils.get_data(device)
    data = hold_out(data, run.held_out) if run.held_out else data
    state_path = record_path(name, folder).with_suffix(".resume.pt")
    execution = _execution(run, net, len(data.train_images), state_path, folder, as_recorded)
    tag = {"config": asdict(run), "start_from_sha256": start_sha256,
           "teacher_sha256": teacher_sha256, "execution": vars(execution)}
    journal = make_journal(name, state_path, tag)
    train_utils.fit(net, run.recipe, data, pruning=run.pruning, teacher=teacher, seed=run.seed,
                    execution=execution, journal=journal)
    if run.keep == "best":
        net.load_state_dict(journal.best["state"])
    save_weights(net, weights_path(name, folder))
    record = _record(run, net, data, journal, folder)
    write_json(record_path(name, folder), record)
    state_path.unlink(missing_ok=True)
    return record


def _grid(run):
    return run.Nbits, run.symmetric, run.quantizer


def _execution(run, net, n_images, state_path, folder, as_recorded):
    """Return how to train: as begun, else as recorded, if wished, else as is fastest.

    Raises RecordError if it is wished and has begun in another way.
    """
    begun = recorded = None
    if state_path.exists():
        begun = Execution(**(read_state(state_path)["tag"] or {}).get("execution", {}))
    if as_recorded:
        record = read_record(run.name, folder) or read_record(run.name)
        if record is None:
            raise RecordError(f"{run.name} has no record to run as: it is {not_trained(run.name)}")
        if record["environment"]["device"] != _kind(next(net.parameters()).device):
            raise RecordError(f"{run.name} was recorded on {record['environment']['device']}: "
                              "train it there, or not as recorded")
        recorded = Execution(**record["execution"])
        if begun not in (None, recorded):
            raise RecordError(f"{run.name} has begun as {begun}, not as recorded, {recorded}; "
                              f"remove {state_path}")
    if begun or recorded:
        return begun or recorded
    steps = run.recipe.epochs * run.recipe.steps(n_images)
    on_cpu = next(net.parameters()).device.type == "cpu"
    return replace(fastest(net, run.recipe.batch_size, steps),
                   threads=torch.get_num_threads() if on_cpu else None)


def _record(run, net, data, journal, folder):
    def result(epoch):
        return {key: history[epoch - 1][key] for key in ("epoch", "test_loss", "test_accuracy")}

    history = journal.history
    loss, accuracy = train_utils.evaluate(net, data)
    seconds = sum(entry["seconds"] for entry in history)
    return {"name": run.name,
            **journal.tag,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "best": result(journal.best["epoch"]),
            "last": result(len(history)),
            "sparsity": sparsity(net),
            "layer_sparsity": layer_sparsity(net),
            "weights_sha256": sha256(weights_path(run.name, folder)),
            "seconds": seconds,
            "images_per_second": len(data.train_images) * len(history) / seconds,
            "environment": {"device": _kind(data.train_images.device),
                            "python": platform.python_version(), "torch": torch.__version__},
            "history": history}


def _kind(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _load_parent(name, net, folder, wanted_by):
    """Load run `name`, from `folder` or the shipped ones, into `net`; return its weights' SHA-256.
    """
    for place in (folder, SHIPPED):
        record, weights = read_record(name, place), weights_path(name, place)
        if record is not None and weights.exists():
            load_weights(net, weights)
            return record["weights_sha256"]
    if any(read_record(name, place) for place in (folder, SHIPPED)):
        into = "build/trained" if folder == SHIPPED else folder
        raise RecordError(f"{wanted_by} needs {name}, whose weights are not shipped: python -m "
                          f"experiments run {name} {wanted_by} --into {into}")
    raise RecordError(f"{wanted_by} needs {name}, which is {not_trained(name)}")


def load_or_train(name, net=None):
    """Return (net, record) of run `name`: its shipped weights, or trained now if there are none.

    With RETRAIN=1 in the environment build/retrained takes the place of the shipped runs: what is
    not there is trained, from parents that are there or else shipped. Loads into `net`, in place,
    if one is given. Raises RecordError if the record does not belong to the run as defined, and as
    load_weights does.
    """
    folder = RETRAINED if retraining() else SHIPPED
    record = read_record(name, folder)
    if record is None:
        announce([name])
        record = train_run(name, folder)
    return load_weights(build(name) if net is None else net, weights_path(name, folder)), record


def measured(name):
    """Return (net, record, accuracy) of run `name`, tested now on all test images.

    Raises RecordError if the accuracy is not the recorded one, and as load_or_train does.
    """
    net, record = load_or_train(name)
    accuracy, recorded = train_utils.test(net, verbose=False), record["test_accuracy"]
    if abs(accuracy - recorded) > TOLERANCE:
        raise RecordError(f"{name} has an accuracy of {accuracy:.4f}, recorded is {recorded:.4f}")
    return net, record, accuracy


def load_checkpoint(checkpoint, Nbits=None, symmetric=False, quantizer=None):
    """Return the net, on the CPU, of a checkpoint: a run's name, a run's file, or any other file.

    It is a ResNet-20. A run says what a checkpoint does not: bits of a weight, whether levels are
    symmetric, and the quantizer, "minmax" or "learned". For other files the arguments say it, and
    without them the weights are taken as they are; for a run they say what is to be otherwise,
    though symmetric levels stay symmetric. Raises ValueError for an unknown name or quantizer, and
    as load_weights does.
    """
    if quantizer is not None:
        check(tuple(QUANTIZERS), quantizer=quantizer)
    if Nbits is None and (symmetric or quantizer is not None):
        raise ValueError("Nbits must be given where symmetric or quantizer is, got None")
    name, path = str(checkpoint), Path(checkpoint)
    if path.suffix != ".pt" and not path.is_file():
        path = weights_path(name)
    else:
        name = "pretrain" if path.name == weights_path("pretrain").name else path.stem
    run = get(name) if _is_run(name) else Run("", "")
    Nbits = run.Nbits if Nbits is None else Nbits
    kind = QUANTIZERS[quantizer or run.quantizer]
    net = ResNetCIFAR(20, Nbits, symmetric or run.symmetric, kind, run.width)
    return load_weights(net, path)


def _is_run(name):
    try:
        return bool(get(name))
    except ValueError:
        return False


# ---------------------------------------------------------------- how long it takes


def seconds_needed(names):
    """Return about how many seconds training the runs `names` takes here, one after another.

    From a few steps timed, uncompiled and in float32: an upper bound more than a mean.
    """
    images = sum(run.recipe.epochs * (50_000 - run.held_out) * _steps_alike(run)
                 for run in map(get, names))
    return images / 256 * seconds_a_step(build("pretrain"), 256)


def _steps_alike(run):
    """Return how many steps of the homework's network alone take as long as one of `run`'s."""
    own, teacher = (0 if name is None else (get(name).width / get("pretrain").width) ** 2
                    for name in (run.name, run.teacher))
    return own + teacher / 4  # a step of a teacher is its forward pass, with BatchNorms folded


def announce(names):
    """Print how long training the runs `names` will take here, before it starts."""
    cpu = f"this CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    minutes = seconds_needed(names) / 60
    time = (f"{minutes / 60:.1f} hours" if minutes > 90
            else f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute")
    print(f"{', '.join(names)}: at most about {time} of training on {where}", flush=True)
