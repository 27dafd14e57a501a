"""Several runs at once, each in a process of one thread, as soon as its parents are ready."""

import os
import signal
import subprocess
import sys
import time

import torch

from arguments import COUNT, check
from experiments.records import ROOT
from experiments.run import announce, train_run
from experiments.runs import get

CHILD = "EXPERIMENTS_CHILD"  # variable in the environment of what _Child starts


def run(names, folder, jobs=None, as_recorded=False):
    """Train the runs `names`, `jobs` at once; return the exit status, 1 if any of them failed.

    jobs: None, as many as this process may use cores, and one on a GPU; a run that is alone is
    trained in this process, with all threads. A run waits for its parents among `names`. If one
    fails, those that depend on it are left out and the others go on. Ctrl-C and SIGTERM stop all;
    a call with those that are not done goes on. Raises ValueError if jobs is below 1.
    """
    names = list(dict.fromkeys(names))
    jobs = min(_at_once(jobs), len(names))
    if CHILD not in os.environ:  # what a child trains, its parent has announced
        announce(names)
    start = _Here if jobs == 1 else _Child
    waiting, running, failed = list(names), {}, set()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            for name in [name for name in waiting if get(name).parents & failed]:
                reason = ", ".join(sorted(get(name).parents & failed))
                print(f"{name}: left out, as {reason} failed", flush=True)
                waiting.remove(name)
                failed.add(name)
            ready = [name for name in waiting
                     if not get(name).parents & {*waiting, *running, *failed}]
            for name in ready[:jobs - len(running)]:
                waiting.remove(name)
                slot = min(set(range(jobs)) - {child.slot for child in running.values()})
                running[name] = start(name, folder, as_recorded, slot)
            for name, child in list(running.items()):
                if child.poll() is not None:
                    failed |= {name} if running.pop(name).poll() else set()
                    if child.poll() < 0:  # it could not say so itself
                        print(f"{name}: ended by signal {-child.poll()}", flush=True)
            time.sleep(0.0 if jobs == 1 else 0.2)
    finally:  # also on Ctrl-C and SIGTERM, which the children may not have heard
        _stop(running.values())
        signal.signal(signal.SIGTERM, before)
    return int(bool(failed))


def _at_once(jobs):
    if jobs is None:
        return 1 if torch.cuda.is_available() else cores()
    check(COUNT, jobs=jobs)
    return jobs


def _stop(children):
    for child in children:
        child.interrupt()
    for child in children:
        child.join()


def cores():
    """Return how many CPU cores this process may use; a batch system may leave it a few."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count()


class _Here:
    """A run trained in this process, done when it is made."""

    slot = 0

    def __init__(self, name, folder, as_recorded, slot):
        self.status = 0
        try:
            print_result(train_run(name, folder, as_recorded))
        except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self.status = 1

    def poll(self):
        return self.status

    def interrupt(self):
        pass

    def join(self):
        pass


class _Child:
    """A run trained in a process of its own, whose progress bar is on line `slot`."""

    def __init__(self, name, folder, as_recorded, slot):
        command = [sys.executable, "-m", "experiments", "run", name, "--force", "--jobs", "1",
                   "--into", str(folder.absolute()), *["--as-recorded"] * as_recorded]
        environment = {"OMP_NUM_THREADS": "1", "TQDM_POSITION": str(slot), CHILD: "1"}
        self.slot = slot
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment)

    def poll(self):
        return self.process.poll()

    def interrupt(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def join(self):
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its last whole epoch is on the disk


def print_result(record):
    """Print what a run reached."""
    print(f"{record['name']}: best {100 * record['best']['test_accuracy']:.2f} % in epoch "
          f"{record['best']['epoch']}, last {100 * record['last']['test_accuracy']:.2f} %, "
          f"{record['seconds'] / 60:.1f} min, {record['images_per_second']:.0f} images/s",
          flush=True)
