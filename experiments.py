"""Every training run of the homework as data, and how a run is trained, recorded, resumed and loaded."""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from files import atomic_write

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "checkpoints"
RETRAINED = ROOT / "build" / "retrained"  # RETRAIN=1 trains into here, so that shipped files stay as they are


@dataclass(frozen=True)
class Run:
    """One training run; what is not said here is as in train_utils.fit."""

    name: str
    question: str  # what the run answers
    start_from: str | None = "pretrain"  # run whose weights it starts from; None: random initialization
    Nbits: int | None = None  # bits per weight in the residual stages; None: float32
    narrow_from: int | None = None  # bits to start with; each width above Nbits has a quarter of the epochs
    symmetric: bool = False  # levels symmetric around zero
    quantizer: str = "minmax"  # as assigned; "learned", a trained step for each channel; "ternary": see FP_layers
    prune: str | None = None  # "layer" (a threshold for each layer), "global" (one for all) or None
    q: float = 0.0  # percentage of the weights pruned, final
    prune_epochs: int = 0  # 0: prune once, before epoch 1; n: to q*e/n before epoch e = 1..n
    hold_zeros: bool = True  # pruned weights stay zero (iterative runs: from the last pruning on)
    regrow: bool = False  # pruned weights are trained out of sight and may come back, see pruning.DynamicPruning
    epochs: int = 20
    batch_size: int = 256  # images a step
    lr: float = 0.002  # peak learning rate
    schedule: str = "constant"  # see train_utils.learning_rate
    warmup: float = 0.0  # fraction of all steps over which lr rises from 0
    momentum: float = 0.875
    nesterov: bool = False
    weight_decay: float = 1e-4  # on all parameters, in each step
    label_smoothing: float = 0.0
    distill: float = 0.0  # weight of what the teacher says beside the labels, 0 to 1
    teacher: str = "pretrain"  # run of the float model that is distilled from
    average: float = 0.0  # decay, each step, of the moving average that is tested and kept; 0: none
    keep: str = "best"  # which epoch is shipped: "best" on the test set, as assigned, or "last"
    test_every: int = 1  # epochs between evaluations
    held_out: int = 0  # training images kept for testing in place of the test set, to choose a recipe by
    seed: int = 0  # of initialization, data order and augmentation


FLOAT = dict(start_from=None, batch_size=128, lr=0.2, schedule="cosine", warmup=0.1, momentum=0.9, nesterov=True,
             weight_decay=5e-4, keep="last", test_every=5)

# The improved runs: as many epochs as assigned. What their parts are worth is measured by the ablation runs, on
# 45,000 of the training images, tested on the others, from a float model that never saw those: in a fifth of the
# epochs, and distillation in all of them.
RATE = dict(lr=0.05, schedule="cosine", warmup=0.05, momentum=0.9, nesterov=True, batch_size=128)
STEP = dict(quantizer="learned")
DISTILL = dict(distill=0.5)
IMPROVED = RATE | DISTILL | dict(keep="last")
ABLATION = dict(start_from="ablation_float", teacher="ablation_float", epochs=4, held_out=5000, keep="last")
LONG = dict(start_from="ablation_long_float", teacher="ablation_long_float", held_out=5000, keep="last")

RUNS = {
    run.name: run
    for run in [
        Run("pretrain", "Lab 2 (a): the float model, from scratch", epochs=50, **FLOAT),
        Run("lab2c_oneshot", "Lab 2 (c): 70 % pruned at once, layer by layer", prune="layer", q=70.0),
        Run("lab2d_iterative", "Lab 2 (d): pruned to 70 % over 10 epochs, layer by layer", prune="layer", q=70.0,
            prune_epochs=10),
        Run("lab2e_global", "Lab 2 (e): pruned to 70 % over 10 epochs, one threshold for all layers",
            prune="global", q=70.0, prune_epochs=10),
        *(Run(f"lab3c_{n}bit", f"Lab 3 (c): {n}-bit weights", Nbits=n) for n in (4, 3, 2)),
        *(Run(f"lab3d_{n}bit", f"Lab 3 (d): 70 % pruned and {n}-bit weights", start_from="lab2e_global", Nbits=n)
          for n in (4, 3, 2)),
        # The reference's 35.90 %: its fine-tuning drops the masks.
        Run("lab3d_2bit_unmasked", "Lab 3 (d): 2-bit weights, pruned weights free to grow back",
            start_from="lab2e_global", Nbits=2, hold_zeros=False),
        Run("lab2e_global_improved", "70 % pruned with one threshold, improved",
            prune="global", q=70.0, prune_epochs=10, **IMPROVED),
        *(Run(f"lab3c_{n}bit_improved", f"{n}-bit weights, improved", Nbits=n, **IMPROVED, **STEP) for n in (4, 3, 2)),
        *(Run(f"lab3d_{n}bit_improved", f"70 % pruned and {n}-bit weights, improved",
              start_from="lab2e_global_improved", Nbits=n, symmetric=n == 2, **IMPROVED, **STEP)
          for n in (4, 3, 2)),  # 2 bits: the codes -1, 0, 1
        Run("lab3d_2bit_smallest", "88 % pruned and 2-bit weights, for the smallest file",
            start_from="lab3d_2bit_improved", Nbits=2, symmetric=True, prune="global", q=88.0, prune_epochs=10,
            **IMPROVED, **STEP),
        Run("ablation_float", "float model of the ablation, from scratch", epochs=10, held_out=5000, **FLOAT),
        *(Run(f"ablation_2bit_{part}", f"2-bit weights: {what}", Nbits=2, **ABLATION, **recipe)
          for part, what, recipe in (
              ("assigned", "assigned recipe", {}), ("rate", "higher rate, on a cosine", RATE),
              ("step", "that rate and a learned step", RATE | STEP),
              ("distill", "rate, step and distillation", RATE | STEP | DISTILL),
              ("narrow", "rate and step, from 4 bits over 3 to 2", RATE | STEP | dict(narrow_from=4)),
              ("average", "rate, step and averaged weights", RATE | STEP | dict(average=0.998)))),
        *(Run(f"ablation_global_{part}", f"70 % pruned: {what}", prune="global", q=70.0, prune_epochs=2, **ABLATION,
              **recipe)
          for part, what, recipe in (
              ("assigned", "assigned recipe", {}), ("rate", "higher rate, on a cosine", RATE),
              ("distill", "that rate and distillation", RATE | DISTILL),
              ("regrow", "that rate, and pruned weights may come back", RATE | dict(regrow=True, hold_zeros=False)))),
        *(Run(f"ablation_ternary_{part}", f"70 % pruned and 2-bit weights: the same rate and {what}", prune="global",
              q=70.0, prune_epochs=2, Nbits=2, symmetric=True, **ABLATION, **RATE, **recipe)
          for part, what, recipe in (
              ("step", "a learned step", STEP),
              ("levels", "two trained levels a layer, no step", dict(quantizer="ternary")))),
        # Four epochs hardly begin to overfit, so they cannot tell what a regularizer is worth.
        Run("ablation_long_float", "float model of the ablation over 20 epochs, from scratch", epochs=40, held_out=5000,
            **FLOAT),
        *(Run(f"ablation_long_2bit_{part}", f"2-bit weights, 20 epochs: {what}", Nbits=2, **LONG, **recipe)
          for part, what, recipe in (
              ("step", "higher rate and a learned step", RATE | STEP),
              ("distill", "rate, step and distillation", RATE | STEP | DISTILL))),
        *(Run(f"ablation_long_global_{part}", f"70 % pruned, 20 epochs: {what}", prune="global", q=70.0,
              prune_epochs=10, **LONG, **recipe)
          for part, what, recipe in (
              ("rate", "higher rate, on a cosine", RATE), ("distill", "that rate and distillation", RATE | DISTILL))),
        # Not assigned; for a reader who sets Nbits in hw4.ipynb to a width of Lab 3 (b) that has no run of its own.
        *(Run(f"lab3c_{n}bit", f"Lab 3 (c): {n}-bit weights", Nbits=n) for n in (6, 5)),
    ]
}

# What the course's reference solution reports: best test accuracy, a fraction. Our floor.
REFERENCE = {
    "pretrain": 0.9151,
    "lab2c_oneshot": 0.8941, "lab2d_iterative": 0.8921, "lab2e_global": 0.8984,
    "lab3c_4bit": 0.9148, "lab3c_3bit": 0.9063, "lab3c_2bit": 0.8550,
    "lab3d_4bit": 0.9033, "lab3d_3bit": 0.8839, "lab3d_2bit": 0.3590,
}


class RecordError(RuntimeError):
    """A run's record or checkpoint does not belong to the run as it is defined here."""


def get(name):
    """Return the Run called `name`; "NAME@K" is the run NAME with seed K, started from its parent with seed K.

    Raises ValueError that lists the names if there is none.
    """
    base, at, seed = name.partition("@")
    if base not in RUNS or (at and not (seed.isdecimal() and int(seed) > 0)):
        raise ValueError(f"name must be one of {', '.join(RUNS)} (or NAME@SEED, seed >= 1), got {name!r}")
    run = RUNS[base]
    if not at:
        return run
    parent = run.start_from and f"{run.start_from}@{seed}"
    return dataclasses.replace(run, name=name, start_from=parent, seed=int(seed))


# ---------------------------------------------------------------- where things are


def _retraining():
    return os.environ.get("RETRAIN", "0") not in ("", "0")


def weights_path(name, folder=SHIPPED):
    """Return where the weights of run `name` are; the shipped float model lies at the top level."""
    return ROOT / "pretrained_model.pt" if (name, folder) == ("pretrain", SHIPPED) else folder / f"{name}.pt"


def _record_path(name, folder):
    return folder / f"{name}.json"


def read_record(name, folder=SHIPPED):
    """Return the record of run `name` as a dict, or None if it is not trained yet.

    Raises RecordError if the record's config is not the one in RUNS, or if the weights beside it are missing
    or not those that the run wrote. Weights of other seeds and of runs on held-out images are not shipped, so
    they may be missing.
    """
    run = get(name)
    path = _record_path(name, folder)
    again = f"train it again: python experiments.py run {name} --force"
    try:
        record = json.loads(path.read_text())
        # A setting that the record does not know came later, with the default that changes nothing.
        recorded, sha256 = _DEFAULTS | record["config"], record["weights_sha256"]
        config = dataclasses.asdict(run)
        differ = {key: (recorded.get(key), config.get(key)) for key in recorded.keys() | config.keys()
                  if recorded.get(key) != config.get(key) and key != "question"}  # a text, not a setting
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is damaged ({error!r}); restore it, or {again}") from error
    if differ:
        raise RecordError(f"{path} was trained with another config (recorded, now): {differ}; {again}")
    weights = weights_path(name, folder)
    optional = "@" in name or run.held_out
    if _sha256(weights) != sha256 if weights.exists() else not optional:
        raise RecordError(f"{weights} is not the file that the run in {path} wrote; restore it, or {again}")
    return record


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING}


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def not_trained(name):
    """Return the sentence that stands where the result of an untrained run would."""
    return f"not trained yet: python experiments.py run {get(name).name}"


# ---------------------------------------------------------------- training and loading


def build(name, device=None):
    """Return the untrained net of run `name` (its Nbits, symmetric, quantizer) on `device`, the GPU if there is one."""
    import torch

    from resnet20 import ResNetCIFAR

    run = get(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        net = ResNetCIFAR(num_layers=20, Nbits=run.Nbits, symmetric=run.symmetric, quantizer=run.quantizer)
        return net.to(device)


def prune_before_epoch(run, epoch, net, dynamic=None):
    """Prune `net`, in place, as `run` wants it before `epoch` (from 1); does nothing in other epochs.

    dynamic: the pruning.DynamicPruning that is told what to prune instead, if the run has one.
    """
    from pruning import global_prune_by_percentage, prunable_layers, prune_by_percentage

    q = run.q * min(epoch / max(run.prune_epochs, 1), 1)
    if dynamic is not None:
        dynamic.q = q
        dynamic.restart()
    elif run.prune is None or epoch > max(run.prune_epochs, 1):
        return
    elif run.prune == "global":
        global_prune_by_percentage(net, q)
    else:
        for _, layer in prunable_layers(net):
            prune_by_percentage(layer, q)


def set_width_before_epoch(run, epoch, net):
    """Set the bits of `net`, in place, that `run` has in `epoch` (from 1), and fit its steps where they change."""
    from FP_layers import FP_Conv, FP_Linear
    from train_utils import fit_steps

    if run.narrow_from is None:
        return
    widths = [n for n in range(run.narrow_from, run.Nbits, -1) for _ in range(run.epochs // 4)]
    widths += [run.Nbits] * (run.epochs - len(widths))
    for layer in net.modules():
        if isinstance(layer, (FP_Conv, FP_Linear)) and layer.Nbits is not None:
            layer.Nbits = widths[epoch - 1]
    if epoch == 1 or widths[epoch - 2] != widths[epoch - 1]:
        fit_steps(net)


def train_run(name, folder=SHIPPED):
    """Train run `name`, or go on with it where it was interrupted; write weights and record; return the record.

    The run it starts from must be trained, in `folder` or among the shipped runs: else RecordError.
    """
    from cifar10 import hold_out
    from pruning import DynamicPruning, layer_sparsity, sparsity
    from train_utils import evaluate, execution, fit, fit_steps, get_data, save_weights

    run = get(name)
    net, parent_sha256 = build(name), None
    if run.start_from is not None:
        parent_sha256 = _load_parent(run.start_from, net, folder, name)
        fit_steps(net)  # a parent's steps belong to its own width
    teacher, teacher_sha256 = None, None
    if run.distill:
        teacher = build(run.teacher)
        teacher_sha256 = _load_parent(run.teacher, teacher, folder, name)

    dynamic = DynamicPruning(net) if run.regrow else None

    def before_epoch(epoch, net):
        prune_before_epoch(run, epoch, net, dynamic)
        set_width_before_epoch(run, epoch, net)

    pruned_from = max(run.prune_epochs, 1)  # first epoch that starts at the final sparsity
    state_path = folder / f"{name}.resume.pt"
    device = next(net.parameters()).device
    data = hold_out(get_data(device), run.held_out) if run.held_out else get_data(device)
    n_images = len(data.train_images)
    how = execution(device, steps=run.epochs * -(-n_images // run.batch_size))
    history, best_state = fit(
        net, epochs=run.epochs, batch_size=run.batch_size, lr=run.lr, weight_decay=run.weight_decay,
        momentum=run.momentum, nesterov=run.nesterov, schedule=run.schedule, warmup=run.warmup,
        label_smoothing=run.label_smoothing, teacher=teacher, distill=run.distill, average=run.average, **how,
        seed=run.seed, test_every=run.test_every, data=data, before_epoch=before_epoch, after_step=dynamic,
        hold_zeros_from=pruned_from if run.hold_zeros else None, best_from=pruned_from,
        state_path=state_path,
        state_tag={"config": dataclasses.asdict(run), "start_from_sha256": parent_sha256,
                   "teacher_sha256": teacher_sha256, "execution": how},
        name=name,
    )
    tested = [entry for entry in history if "test_accuracy" in entry and entry["epoch"] >= pruned_from]
    best, last = max(tested, key=lambda entry: entry["test_accuracy"]), tested[-1]
    if run.keep == "best":
        net.load_state_dict(best_state)
    loss, accuracy = evaluate(net, data)
    seconds = sum(entry["seconds"] for entry in history)
    save_weights(net, weights_path(name, folder))
    record = {
        "name": name,
        "config": dataclasses.asdict(run),
        "test_loss": loss,
        "test_accuracy": accuracy,
        "best": {key: best[key] for key in ("epoch", "test_loss", "test_accuracy")},
        "last": {key: last[key] for key in ("epoch", "test_loss", "test_accuracy")},
        "sparsity": sparsity(net),
        "layer_sparsity": layer_sparsity(net),
        "weights_sha256": _sha256(weights_path(name, folder)),
        "start_from_sha256": parent_sha256,
        "teacher_sha256": teacher_sha256,
        "seconds": seconds,
        "images_per_second": n_images * len(history) / seconds,
        "environment": _environment(device) | how,
        "history": history,
    }
    _write_text(_record_path(name, folder), json.dumps(record, indent=1) + "\n")
    state_path.unlink(missing_ok=True)
    return record


def _load_parent(name, net, folder, wanted_by):
    """Load run `name`, from `folder` or else from the shipped ones, into `net`; return the SHA-256 of its weights."""
    from train_utils import load_weights

    for place in (folder, SHIPPED):
        record, weights = read_record(name, place), weights_path(name, place)
        if record is not None and weights.exists():
            load_weights(net, weights)
            return record["weights_sha256"]
    if any(read_record(name, place) for place in (folder, SHIPPED)):
        raise RecordError(f"{wanted_by} starts from {name}, whose weights are not shipped: "
                          f"python experiments.py run {name} --force")
    raise RecordError(f"{wanted_by} starts from {name}, which is {not_trained(name)}")


def _environment(device):
    import torch

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": kind, "python": platform.python_version(), "torch": torch.__version__}


def _write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())


_retrained_here = set()  # runs that RETRAIN=1 has trained in this process: once each


def load_or_train(name, net=None):
    """Return (net, record) of run `name`: its shipped weights, or trained now if there are none.

    With RETRAIN=1 in the environment the run is trained, once a process, into build/retrained, and what it
    starts from is taken from there if it is there. Loads into `net`, in place, if one is given. Raises
    RecordError if the shipped record does not belong to the run as defined in RUNS, and as
    train_utils.load_weights does.
    """
    from train_utils import load_weights

    get(name)
    folder = RETRAINED if _retraining() else SHIPPED
    if _retraining() and name not in _retrained_here:
        _record_path(name, folder).unlink(missing_ok=True)
    record = read_record(name, folder)
    if record is None:
        announce([name])
        record = train_run(name, folder)
    if _retraining():
        _retrained_here.add(name)
    return load_weights(build(name) if net is None else net, weights_path(name, folder)), record


def is_available(name):
    """Return whether load_or_train(name) has something to show: a shipped run, or RETRAIN=1 to make one."""
    return _retraining() or read_record(name) is not None


# ---------------------------------------------------------------- how long it takes


def seconds_needed(names, device=None):
    """Return about how many seconds training the runs `names` takes on `device`, from a few steps timed there.

    An upper bound more than a mean: the steps are eager, while long runs are compiled.
    """
    from train_utils import training_speed

    images = sum(run.epochs * (50_000 - run.held_out) * (4 / 3 if run.distill else 1) for run in map(get, names))
    return images / training_speed(build("pretrain", device))


def announce(names):
    """Print how long training the runs `names` will take here, before it starts."""
    import torch

    cpu = f"this CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    minutes = seconds_needed(names) / 60
    time = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes" if minutes >= 1 else "a minute"
    print(f"{', '.join(names)}: at most about {time} of training on {where}", flush=True)


# ---------------------------------------------------------------- command line


def main(arguments=None):
    """Command line: `list`, and `run NAME ...` or `run all` with its options. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every run, with its result")
    run = commands.add_parser("run", help="train runs that are not trained yet; an interrupted run goes on")
    run.add_argument("names", nargs="+", metavar="NAME", help="names from `list`, or all")
    run.add_argument("--force", action="store_true", help="train again what is trained already")
    run.add_argument("--into", type=Path, default=SHIPPED, metavar="FOLDER",
                     help="where weights and records go, and parents are looked for first (default: checkpoints)")
    run.add_argument("--seeds", type=_seeds, default=1, metavar="N", help="train each with N seeds: NAME, NAME@1, ...")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for name, run in RUNS.items():
                record = read_record(name)
                result = f"{100 * record['test_accuracy']:6.2f} %" if record else "not trained"
                print(f"{name:24} {result:12} {run.question}")
            sys.stdout.flush()
        else:
            names = list(RUNS) if options.names == ["all"] else options.names
            seeds = ["", *(f"@{seed}" for seed in range(1, options.seeds))]
            _run_command([get(name + seed).name for seed in seeds for name in names], options.into, options.force)
    except BrokenPipeError:  # a reader such as head has what it wanted; nothing is left for the exit to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def _seeds(text):
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _run_command(names, folder, force):
    wanted = []
    for name in names:
        record = None if force else read_record(name, folder)
        if record is None:
            wanted.append(name)
        else:
            print(f"{name}: trained already, {100 * record['test_accuracy']:.2f} % (--force trains it again)")
    if wanted:
        announce(wanted)
    for name in wanted:
        record = train_run(name, folder)  # the old weights and record stay until the new ones are there
        print(f"{name}: best {100 * record['best']['test_accuracy']:.2f} % in epoch {record['best']['epoch']}, "
              f"last {100 * record['last']['test_accuracy']:.2f} %, {record['seconds'] / 60:.1f} min, "
              f"{record['images_per_second']:.0f} images/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
