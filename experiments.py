"""Every training run of the homework as data, and how a run is trained, recorded, resumed and loaded."""

import argparse
import dataclasses
import functools
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
    symmetric: bool = False  # symmetric instead of min-max quantizer
    prune: str | None = None  # "layer" (a threshold for each layer), "global" (one for all) or None
    q: float = 0.0  # percentage of the weights pruned, final
    prune_epochs: int = 0  # 0: prune once, before epoch 1; n: to q*e/n before epoch e = 1..n
    hold_zeros: bool = True  # pruned weights stay zero (iterative runs: from the last pruning on)
    epochs: int = 20
    batch_size: int = 256  # images a step
    lr: float = 0.002  # peak learning rate
    schedule: str = "constant"  # see train_utils.learning_rate
    warmup: float = 0.0  # fraction of all steps over which lr rises from 0
    momentum: float = 0.875
    nesterov: bool = False
    weight_decay: float = 1e-4  # on all parameters, in each step
    label_smoothing: float = 0.0
    keep: str = "best"  # which epoch is shipped: "best" on the test set, as assigned, or "last"
    test_every: int = 1  # epochs between evaluations
    seed: int = 0  # of initialization, data order and augmentation


RUNS = {
    run.name: run
    for run in [
        Run("pretrain", "Lab 2 (a): the float model, from scratch", start_from=None, epochs=50, batch_size=128,
            lr=0.2, schedule="cosine", warmup=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4,
            keep="last", test_every=5),
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
    """Return the Run called `name`; raises ValueError that lists the names if there is none."""
    if name not in RUNS:
        raise ValueError(f"name must be one of {', '.join(RUNS)}, got {name!r}")
    return RUNS[name]


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
    or not those that the run wrote.
    """
    run = get(name)
    path = _record_path(name, folder)
    again = f"train it again: python experiments.py run {name} --force"
    try:
        record = json.loads(path.read_text())
        recorded, sha256 = record["config"], record["weights_sha256"]
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
    if not weights.exists() or _sha256(weights) != sha256:
        raise RecordError(f"{weights} is not the file that the run in {path} wrote; restore it, or {again}")
    return record


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def not_trained(name):
    """Return the sentence that stands where the result of an untrained run would."""
    return f"not trained yet: python experiments.py run {get(name).name}"


# ---------------------------------------------------------------- training and loading


def build(name, device=None):
    """Return the untrained net of run `name` (its Nbits and symmetric) on `device`, the GPU if there is one."""
    import torch

    from resnet20 import ResNetCIFAR

    run = get(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        return ResNetCIFAR(num_layers=20, Nbits=run.Nbits, symmetric=run.symmetric).to(device)


def prune_before_epoch(run, epoch, net):
    """Prune `net`, in place, as `run` wants it before `epoch` (from 1); does nothing in other epochs."""
    from pruning import global_prune_by_percentage, prunable_layers, prune_by_percentage

    if run.prune is None or epoch > max(run.prune_epochs, 1):
        return
    q = run.q * epoch / max(run.prune_epochs, 1)
    if run.prune == "global":
        global_prune_by_percentage(net, q)
    else:
        for _, layer in prunable_layers(net):
            prune_by_percentage(layer, q)


def train_run(name, folder=SHIPPED):
    """Train run `name`, or go on with it where it was interrupted; write weights and record; return the record.

    The run it starts from must be trained, in `folder` or among the shipped runs: else RecordError.
    """
    from pruning import layer_sparsity, sparsity
    from train_utils import evaluate, execution, fit, get_data, load_weights, save_weights

    run = get(name)
    net = build(name)
    parent_sha256 = None
    if run.start_from is not None:
        parent = folder if read_record(run.start_from, folder) else SHIPPED
        parent_record = read_record(run.start_from, parent)
        if parent_record is None:
            raise RecordError(f"{name} starts from {run.start_from}, which is {not_trained(run.start_from)}")
        parent_sha256 = parent_record["weights_sha256"]
        load_weights(net, weights_path(run.start_from, parent))

    pruned_from = max(run.prune_epochs, 1)  # first epoch that starts at the final sparsity
    state_path = folder / f"{name}.resume.pt"
    device = next(net.parameters()).device
    n_images = len(get_data(device).train_images)
    how = execution(device, steps=run.epochs * -(-n_images // run.batch_size))
    history, best_state = fit(
        net, epochs=run.epochs, batch_size=run.batch_size, lr=run.lr, weight_decay=run.weight_decay,
        momentum=run.momentum, nesterov=run.nesterov, schedule=run.schedule, warmup=run.warmup,
        label_smoothing=run.label_smoothing, **how, seed=run.seed, test_every=run.test_every,
        before_epoch=functools.partial(prune_before_epoch, run),
        hold_zeros_from=pruned_from if run.hold_zeros else None, best_from=pruned_from,
        state_path=state_path,
        state_tag={"config": dataclasses.asdict(run), "start_from_sha256": parent_sha256, "execution": how},
        name=name,
    )
    tested = [entry for entry in history if "test_accuracy" in entry and entry["epoch"] >= pruned_from]
    best, last = max(tested, key=lambda entry: entry["test_accuracy"]), tested[-1]
    if run.keep == "best":
        net.load_state_dict(best_state)
    loss, accuracy = evaluate(net)
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
        "seconds": seconds,
        "images_per_second": n_images * len(history) / seconds,
        "environment": _environment(net) | how,
        "history": history,
    }
    _write_text(_record_path(name, folder), json.dumps(record, indent=1) + "\n")
    state_path.unlink(missing_ok=True)
    return record


def _environment(net):
    import torch

    device = next(net.parameters()).device
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
    record = read_record(name, folder) or train_run(name, folder)
    if _retraining():
        _retrained_here.add(name)
    return load_weights(build(name) if net is None else net, weights_path(name, folder)), record


def is_available(name):
    """Return whether load_or_train(name) has something to show: a shipped run, or RETRAIN=1 to make one."""
    return _retraining() or read_record(name) is not None


# ---------------------------------------------------------------- results in one place


RESULTS_HEADER = ["Question", "Reference (%)", "Ours, best epoch (%)", "Ours, last epoch (%)"]
_BEGIN = "<!-- results: written by `python experiments.py results --write README.md` -->"
_END = "<!-- end of results -->"


def results_rows(names=tuple(REFERENCE)):
    """Return a row of cells (see RESULTS_HEADER) for each run in `names`, from the shipped records."""
    rows = []
    for name in names:
        record, reference = read_record(name), f"{100 * REFERENCE[name]:.2f}" if name in REFERENCE else "none"
        ours = ["not trained yet", ""]
        if record is not None:
            ours = [f"{100 * record[which]['test_accuracy']:.2f}" for which in ("best", "last")]
            if record["config"]["keep"] == "last":  # no epoch was chosen on the test set
                ours[0] = "not used"
        rows.append([get(name).question, reference, *ours])
    return rows


def write_results(path):
    """Replace the results table of the Markdown file at `path`, between its two marker lines."""
    path = Path(path)
    before, _, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"{path} must hold the lines {_BEGIN!r} and {_END!r}")
    lines = [RESULTS_HEADER, [":--", "--:", "--:", "--:"], *results_rows()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    _write_text(path, f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}")


# ---------------------------------------------------------------- command line


def main(arguments=None):
    """Command line: `list`, `run NAME ... [--force]`, `run all`, `results`. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every run, with its result")
    run = commands.add_parser("run", help="train runs that are not trained yet; an interrupted run goes on")
    run.add_argument("names", nargs="+", metavar="NAME", help="names from `list`, or all")
    run.add_argument("--force", action="store_true", help="train again what is trained already")
    results = commands.add_parser("results", help="print our results beside the reference's")
    results.add_argument("--write", metavar="FILE", help="write them into a Markdown file's results section instead")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for name, run in RUNS.items():
                record = read_record(name)
                result = f"{100 * record['test_accuracy']:6.2f} %" if record else "not trained"
                print(f"{name:18} {result:12} {run.question}")
        elif options.command == "results" and options.write:
            write_results(options.write)
        elif options.command == "results":
            for row in [RESULTS_HEADER, *results_rows()]:
                print("{:62} {:>14} {:>21} {:>21}".format(*row))
        else:
            names = list(RUNS) if options.names == ["all"] else options.names
            for name in map(get, names):
                _run_command(name.name, options.force)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def _run_command(name, force):
    record = None if force else read_record(name)
    if record:
        print(f"{name}: trained already, {100 * record['test_accuracy']:.2f} % (--force trains it again)")
        return
    record = train_run(name)  # the old weights and record stay until the new ones are there
    print(f"{name}: best {100 * record['best']['test_accuracy']:.2f} % in epoch {record['best']['epoch']}, "
          f"last {100 * record['last']['test_accuracy']:.2f} %, {record['seconds'] / 60:.1f} min, "
          f"{record['images_per_second']:.0f} images/s")


if __name__ == "__main__":
    sys.exit(main())
