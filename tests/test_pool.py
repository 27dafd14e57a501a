"""Several runs at once: in what order, how many, and what becomes of them when one fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_utils
from conftest import REPOSITORY
from experiments import __main__ as commands
from experiments import pool, records, run, runs
from tiny_runs import TINY, redefine
from training.checkpoints import read_state

pytest_plugins = ["tiny_runs"]


# ---------------------------------------------------------------- scheduled, with processes that
# only count


class Trainings:
    """In place of pool's processes: each takes as many looks as `durations` says, and may fail.

    At each moment that the pool waits, `moments` notes the slots of what is running, and what has
    been done and started so far.
    """

    def __init__(self, durations=(), failing=()):
        self.durations, self.failing = dict(durations), set(failing)
        self.started, self.running, self.done, self.moments = [], {}, [], []
        self.interrupted, self.joined = [], []

    def start(self, name, folder, as_recorded, slot):
        child = SimpleNamespace(slot=slot, left=self.durations.get(name, 1))
        child.poll = lambda: self.poll(name, child)
        child.interrupt = lambda: self.interrupted.append(name)
        child.join = lambda: self.joined.append([*self.interrupted])
        self.started.append(name)
        self.running[name] = child
        return child

    def poll(self, name, child):
        if child.left:
            child.left -= 1
            return None
        if name in self.running:
            del self.running[name]
            self.done.append(name)
        return 1 if name in self.failing else 0

    def sleep(self, seconds):
        slots = {name: child.slot for name, child in self.running.items()}
        self.moments.append((slots, set(self.done), set(self.started)))


@contextlib.contextmanager
def scheduled(trainings, tree):
    """Have pool.run train the runs in `tree`, {name: (parent, teacher)}, as `trainings` does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", {
            name: replace(TINY["quantized"], name=name, start_from=parent, teacher=teacher)
            for name, (parent, teacher) in tree.items()})
        patch.setattr(pool, "announce", lambda names: None)
        patch.setattr(pool, "_Child", trainings.start)
        patch.setattr(pool, "_Here", trainings.start)
        patch.setattr(pool, "time", SimpleNamespace(sleep=trainings.sleep))
        yield


FAMILY = {  # run: what it starts from, what it learns from
    "teacher": (None, None),
    "parent": (None, None),
    "taught": ("parent", "teacher"),
    "child": ("parent", None),
    "grandchild": ("taught", None),
    "other": (None, None),
}


@pytest.mark.parametrize("jobs, first", [(2, 2), (3, 3), (10, 3), (None, 3)])
def test_as_many_run_at_once_as_there_are_jobs_and_ready_runs(monkeypatch, jobs, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pool, "cores", lambda: 64)
    trainings = Trainings(dict.fromkeys(FAMILY, 3))
    with scheduled(trainings, FAMILY):
        assert pool.run(list(FAMILY), Path("folder"), jobs) == 0
    assert len(trainings.moments[0][0]) == first
    assert sorted(trainings.done) == sorted(FAMILY)


@pytest.mark.parametrize("gpu, at_once", [(False, 2), (True, 1)])
def test_without_jobs_there_are_as_many_as_cores_and_one_on_a_gpu(monkeypatch, gpu, at_once):
    monkeypatch.setattr(pool, "cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    trainings = Trainings(dict.fromkeys(FAMILY, 3))
    with scheduled(trainings, FAMILY):
        pool.run(list(FAMILY), Path("folder"))
    assert max(len(slots) for slots, _, _ in trainings.moments) == at_once


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    assert pool.cores() == 3
    monkeypatch.delattr(pool.os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 7)
    assert pool.cores() == 7


def test_a_run_that_was_killed_is_named_with_the_signal(monkeypatch, capsys):
    trainings = Trainings()
    trainings.poll = lambda name, child: -9 if name == "other" else 0
    with scheduled(trainings, FAMILY):
        assert pool.run(list(FAMILY), Path("folder"), 2) == 1
    assert capsys.readouterr().out == "other: ended by signal 9\n"


def test_a_run_waits_for_its_parent_and_its_teacher():
    """The teacher takes longest: nothing that learns from it has begun before."""
    trainings = Trainings({"teacher": 9})
    with scheduled(trainings, FAMILY):
        assert pool.run(["grandchild", "taught", "child", "parent", "teacher"], Path(), 4) == 0
    assert trainings.started.index("taught") == 3 and trainings.done.index("teacher") == 2
    assert trainings.started == ["parent", "teacher", "child", "taught", "grandchild"]


def test_a_parent_that_is_not_asked_for_is_not_waited_for():
    trainings = Trainings()
    with scheduled(trainings, FAMILY):
        assert pool.run(["taught", "grandchild"], Path(), 2) == 0
    assert trainings.started == ["taught", "grandchild"]


def test_what_depends_on_a_failed_run_is_left_out_and_the_others_go_on(capsys):
    trainings = Trainings(failing={"teacher"})
    with scheduled(trainings, FAMILY):
        assert pool.run(list(FAMILY), Path(), 2) == 1
    assert sorted(trainings.started) == ["child", "other", "parent", "teacher"]
    assert capsys.readouterr().out.splitlines() == [
        "taught: left out, as teacher failed", "grandchild: left out, as taught failed"]


def test_ctrl_c_stops_all_that_is_running(monkeypatch):
    trainings = Trainings(dict.fromkeys(FAMILY, 9))

    def interrupted(seconds):
        raise KeyboardInterrupt

    trainings.sleep = interrupted
    with scheduled(trainings, FAMILY), pytest.raises(KeyboardInterrupt):
        pool.run(list(FAMILY), Path(), 2)
    assert trainings.interrupted == trainings.started == ["teacher", "parent"]
    assert trainings.joined == [trainings.started] * 2  # none trains on while another ends


def test_sigterm_stops_all_that_is_running(monkeypatch):
    """As a batch system or `timeout` sends it: no child trains on alone."""
    trainings, before = Trainings(dict.fromkeys(FAMILY, 9)), signal.getsignal(signal.SIGTERM)
    trainings.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
    with scheduled(trainings, FAMILY), pytest.raises(SystemExit, match="143"):
        pool.run(list(FAMILY), Path(), 2)
    assert trainings.interrupted == trainings.started == ["teacher", "parent"]
    assert signal.getsignal(signal.SIGTERM) == before


@st.composite
def trees(draw):
    """Draw {name: (parent, teacher)} in which every run is after its parents, or is a root."""
    tree = {}
    for i in range(draw(st.integers(1, 7))):
        before = st.sampled_from([None, *tree])
        tree[f"run{i}"] = draw(before), draw(before)
    return tree


@settings(max_examples=150, database=None)
@given(st.data(), trees(), st.integers(1, 4))
def test_every_order_keeps_the_rules(data, tree, jobs):
    """Against the definition: what must be trained, at most `jobs` at once, never an idle slot."""
    durations = {name: data.draw(st.integers(0, 3), name) for name in tree}
    failing = data.draw(st.sets(st.sampled_from(list(tree))), "failing")
    names = data.draw(st.permutations(list(tree)), "order")
    trainings = Trainings(durations, failing)
    with scheduled(trainings, tree), contextlib.redirect_stdout(None):
        status = pool.run(names, Path(), jobs)
    bad, left_out = set(failing), set()
    for name, parents in tree.items():  # parents come first
        if bad & {*parents}:
            bad.add(name)
            left_out.add(name)
    assert status == bool(bad)
    assert sorted(trainings.started) == sorted(tree.keys() - left_out)
    assert sorted(trainings.done) == sorted(trainings.started)
    done_before = set()
    for slots, done, started in trainings.moments:
        assert len(slots) == len({*slots.values()}) and {*slots.values()} <= {*range(jobs)}
        busy = slots.keys() | done - done_before
        ready = [name for name in tree.keys() - started - left_out
                 if {*tree[name]} - {None} <= done_before]
        assert len(busy) == jobs or (len(busy) < jobs and not ready)
        done_before = done
    for at, name in enumerate(trainings.started):
        assert {*tree[name]} - {None} <= {*trainings.started[:at]}


# ---------------------------------------------------------------- one process, here or of its own


def test_a_run_that_is_alone_is_trained_here(tiny_runs, capsys, tmp_path):
    assert pool.run(["pretrain"], tmp_path / "into", jobs=8) == 0
    assert records.read_record("pretrain", tmp_path / "into")
    assert "pretrain: best" in capsys.readouterr().out


def test_a_run_that_is_named_twice_is_alone(pretrained, monkeypatch):
    monkeypatch.setattr(pool, "_Child", None)
    assert pool.run(["pretrain", "pretrain"], records.SHIPPED, jobs=8) == 0


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_with_one_job_an_error_of_any_kind_stops_no_other(tiny_runs, monkeypatch, capsys, error):
    def train_run(name, *_):
        raise error(name)

    monkeypatch.setattr(pool, "train_run", train_run)
    redefine("iterative", start_from=None)
    assert pool.run(["pretrain", "iterative"], records.SHIPPED, jobs=1) == 1
    assert capsys.readouterr().err.count("error: ") == 2


def test_with_one_job_a_failure_leaves_the_others_to_be_trained(
    pretrained, monkeypatch, tmp_path, capsys
):
    redefine("iterative", start_from="quantized@7")
    assert pool.run(["iterative", "quantized", "pretrain@1"], records.SHIPPED, jobs=1) == 1
    assert records.read_record("pretrain@1")
    lines = capsys.readouterr()
    assert lines.err.count("error: ") == 1 and "quantized: left out" in lines.out


def test_with_one_job_a_training_that_diverges_stops_no_other(tiny_runs, capsys):
    redefine("pretrain", recipe={"lr": 1e20})
    redefine("iterative", start_from=None)
    assert pool.run(["pretrain", "iterative"], records.SHIPPED, jobs=1) == 1
    assert "NaN or infinite; lr=1e+20 may be too large" in capsys.readouterr().err
    assert records.read_record("iterative") and not records.read_record("pretrain")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Python is a script that notes how it is called and waits; returns the path of its note."""
    note, script = tmp_path / "note.json", tmp_path / "python"
    body = tmp_path / "body.py"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{body}" "$@"\n')
    body.write_text(textwrap.dedent(f"""
        import json, os, sys, time
        if "deaf" in sys.argv:
            import signal
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        names = ("OMP_NUM_THREADS", "TQDM_POSITION", "EXPERIMENTS_CHILD", "KEPT")
        note = [sys.argv[1:], [os.environ[name] for name in names], os.getcwd()]
        with open({str(note)!r} + ".part", "w") as file:
            json.dump(note, file)
        os.rename({str(note)!r} + ".part", {str(note)!r})
        time.sleep(60)
    """))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("KEPT", "as it is")
    return note


def wait_for(*paths, seconds=120):
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {paths} after {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("as_recorded", [False, True])
def test_a_process_of_its_own_gets_the_run_the_folder_and_one_thread(
    stub, sigint_is_heard, monkeypatch, tmp_path, as_recorded
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    child = pool._Child("lab3c_2bit@3", Path("into"), as_recorded, slot=5)
    wait_for(stub)
    (dash, module, *arguments), environment, folder = json.loads(stub.read_text())
    assert (dash, module, folder) == ("-m", "experiments", str(REPOSITORY))
    assert str(tmp_path / "into") in arguments  # whole: it starts in another folder
    options = vars(commands._parser().parse_args(arguments))
    assert options == dict(command="run", names=["lab3c_2bit@3"], force=True, jobs=1, seeds=1,
                           into=tmp_path / "into", as_recorded=as_recorded)
    assert environment == ["1", "5", "1", "as it is"] and child.slot == 5
    assert child.poll() is None
    child.interrupt()
    child.join()
    assert child.poll() not in (None, 0)  # an interrupt, by Python's traceback or the signal
    child.interrupt()  # of what has ended: nothing


def test_a_process_that_does_not_hear_the_interrupt_is_killed(
    stub, sigint_is_heard, monkeypatch, tmp_path
):
    child = pool._Child("deaf", tmp_path, False, slot=0)
    wait_for(stub)
    wait = child.process.wait
    monkeypatch.setattr(child.process, "wait", lambda seconds: wait(seconds / 100))
    child.interrupt()
    child.join()
    assert wait(60) == -signal.SIGKILL


# ---------------------------------------------------------------- all of it, with a real Ctrl-C


START = """
import os, sys, time, traceback
try:
    sys.path[:0] = [{repository!r}, {repository!r} + "/tests"]
    import torch
    import tiny_runs, train_utils
    from pathlib import Path
    from cifar10 import CIFAR10

    folder = Path({folder!r})
    tiny_runs.install(CIFAR10(*torch.load(folder / "data.pt", weights_only=True)), folder)
    prune_before_epoch = train_utils.prune_before_epoch

    def pause(net, pruning, epoch):
        if epoch == 3 and (folder / "pausing").exists():
            (folder / f"{{sys.argv[2]}}.paused").touch()
            time.sleep(120)
        prune_before_epoch(net, pruning, epoch)

    train_utils.prune_before_epoch = pause
except BaseException:
    traceback.print_exc()
    os._exit(70)
"""


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_the_same_command_goes_on_to_the_same_bits(
    pretrained, sigint_is_heard, tmp_path
):
    """Two runs are interrupted in their last epoch."""
    names, into = ["iterative", "iterative@1"], tmp_path / "into"
    torch.save(list(train_utils.get_data("cpu")), tmp_path / "data.pt")
    (tmp_path / "sitecustomize.py").write_text(
        START.format(repository=str(REPOSITORY), folder=str(tmp_path)))
    command = [sys.executable, "-m", "experiments", "run", *names, "--jobs", "2", "--into", into]
    log = tmp_path / "log.txt"

    def started():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True,
                                stdout=log.open("a"), stderr=subprocess.STDOUT)

    (tmp_path / "pausing").touch()
    process = started()
    try:
        wait_for(tmp_path / "iterative.paused", tmp_path / "iterative@1.paused")
        process.send_signal(signal.SIGINT)  # to it alone: the others must hear it from there
        assert process.wait(60) == 130, log.read_text()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # nobody is left in its session
        assert not list(into.glob("*.json"))
        begun = {name: read_state(into / f"{name}.resume.pt")["history"] for name in names}
        (tmp_path / "pausing").unlink()
        process = started()
        assert process.wait(300) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for name in names:
            whole = run.train_run(name, tmp_path / "whole")
            resumed = records.read_record(name, into)
            assert resumed["weights_sha256"] == whole["weights_sha256"]
            assert len(begun[name]) == 2 and resumed["history"][:2] == begun[name]  # not anew
    finally:
        torch.set_num_threads(threads)
