"""The benchmark: its assigned pipeline is the assigned one, its numbers add up, and it runs in
seconds with --quick.
"""

import copy
import itertools
import json
import multiprocessing
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import RandomSampler
from torchvision import transforms

from benchmarks import assigned, throughput, timing
from cifar10 import CIFAR10
from conftest import REPOSITORY
from train_utils import train_epoch
from training.execution import Execution


def test_the_assigned_loader_is_the_assigned_one(small_cifar):
    loader = assigned.assigned_loader(
        small_cifar.train_images, small_cifar.train_labels, 100, 2, train=True
    )
    crop, flip, to_tensor, normalize = loader.dataset.transform.transforms
    assert isinstance(crop, transforms.RandomCrop) and (crop.size, crop.padding) == ((32, 32), 4)
    assert isinstance(flip, transforms.RandomHorizontalFlip) and flip.p == 0.5
    assert isinstance(to_tensor, transforms.ToTensor)
    assert (normalize.mean, normalize.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert isinstance(loader.sampler, RandomSampler) and loader.num_workers == 2
    seen = []
    loader.dataset.transform = lambda image: seen.append(image) or to_tensor(image)
    loader.dataset[7]
    assert isinstance(seen[0], Image.Image)


def test_the_assigned_test_loader_yields_the_test_set_in_order(small_cifar):
    loader = assigned.assigned_loader(
        small_cifar.test_images, small_cifar.test_labels, 64, 0, train=False
    )
    xs, ys = zip(*loader)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    )
    torch.testing.assert_close(
        torch.cat(xs), (small_cifar.test_images / 255 - mean) / std, rtol=0, atol=1e-5
    )
    assert torch.equal(torch.cat(ys), small_cifar.test_labels)


def test_the_assigned_net_is_ours_with_plain_activations():
    torch.manual_seed(0)
    data = SimpleNamespace(train_images=torch.zeros(1))
    theirs, ours = (timing.Pipeline(way, data, 1, 0).net for way in (None, Execution()))
    inplace = [
        [m.inplace for m in net.modules() if isinstance(m, nn.ReLU)] for net in (theirs, ours)
    ]
    assert inplace == [[False] * 19, [True] * 19]
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items()):
        assert name == other and torch.equal(a, b)


SETTINGS = (
    (REPOSITORY / "Makefile").read_text().partition("ALLOCATOR := ")[2].splitlines()[0].split()
)


@pytest.fixture(scope="module")
def process(small_cifar):
    """The assigned process of --quick, started from one that has our allocator settings."""
    data = CIFAR10(*(tensor[:200] for tensor in small_cifar))
    with pytest.MonkeyPatch.context() as patch:
        for setting in SETTINGS:
            patch.setenv(*setting.split("=", 1))
        with timing.AssignedProcess(data, workers=1) as process:
            assert all(name in os.environ for name in timing.ALLOCATOR)
            yield process


@pytest.mark.slow
def test_the_assigned_process_has_none_of_our_allocator_settings(process):
    assert tuple(setting.partition("=")[0] for setting in SETTINGS) == timing.ALLOCATOR
    there = [process.pool.submit(os.getenv, name).result() for name in timing.ALLOCATOR]
    assert there == [None] * 4


def start_method():
    return multiprocessing.get_start_method()


@pytest.mark.slow
def test_the_assigned_workers_start_as_in_a_process_of_the_readers_own(process):
    """Else each of its evaluations would wait for workers that import PyTorch anew."""
    assert process.pool.submit(start_method).result() == multiprocessing.get_start_method()


@pytest.mark.slow
def test_the_assigned_process_times_what_it_is_told(process):
    with pytest.raises(ValueError, match="steps must be at most"):
        process.train(16, 10**6, 0)
    parts = process.train(16, 1, 0, split=True)
    assert set(parts) == {*timing.Clock.PARTS, "rest"}


@pytest.mark.parametrize("bf16, right, compiler, expected", [
    (False, True, False, {"float32": Execution()}),
    (True, False, False, {"float32": Execution()}),
    (True, True, False, {"float32": Execution(), "bfloat16": Execution(bf16=True)}),
    (False, True, True, {"float32": Execution(), "compiled": Execution(compile=True)}),
    (True, True, True, {"float32": Execution(), "bfloat16": Execution(bf16=True),
                        "compiled": Execution(bf16=True, compile=True)}),
])
def test_what_the_hardware_cannot_do_or_does_wrong_is_not_timed(
    monkeypatch, bf16, right, compiler, expected
):
    monkeypatch.setattr(throughput, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(throughput, "bf16_is_right", lambda net: right)
    monkeypatch.setattr(throughput, "has_compiler", lambda: compiler)
    cpu = torch.device("cpu")
    assert throughput.candidates(cpu) == expected
    uncompiled = {name: way for name, way in expected.items() if not way.compile}
    assert throughput.candidates(cpu, eager=True) == uncompiled


def test_on_a_gpu_a_graph_is_timed(monkeypatch):
    monkeypatch.setattr(throughput, "has_bf16", lambda device: False)
    expected = {"float32": Execution(), "graph": Execution(graph=True)}
    assert throughput.candidates(torch.device("cuda")) == expected


def test_both_pipelines_train_the_same_net(net, small_cifar):
    """On the same batches they are the same computation, so that only speed is compared."""
    loader = assigned.assigned_loader(
        small_cifar.test_images, small_cifar.test_labels, 50, 0, train=False
    )
    other = copy.deepcopy(net)

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    theirs = assigned.assigned_epoch(net, loader, sgd(net), nn.CrossEntropyLoss())
    ours = train_epoch(other, loader, sgd(other), nn.CrossEntropyLoss())
    assert theirs == pytest.approx(ours, rel=1e-4)
    for a, b in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_clock_starts_after_the_warm_up_and_the_parts_fill_it(monkeypatch, small_cifar):
    """With a clock that advances by one at each look, every part of a step takes as many looks as
    it has.
    """
    clock = itertools.count()
    monkeypatch.setattr(timing, "now", lambda device: float(next(clock)))
    pipeline = timing.Pipeline(Execution(), small_cifar, 16, workers=0)
    assert pipeline.train(steps=5, warmup=3) == 1  # looked at twice, whatever the number of steps
    parts = pipeline.train(steps=5, warmup=3, split=True)
    assert [parts[name] for name in timing.Clock.PARTS] == [5, 5, 5, 5]
    assert parts["rest"] > 0 and not pipeline.optimizer._optimizer_step_pre_hooks
    order = []
    batches = timing.Clock("cpu", None, 1, split=False).batches(map(order.append, range(3)))
    monkeypatch.setattr(timing, "now", lambda device: order.append("start"))
    assert len(list(batches)) == 3 and order == [0, "start", 1, 2]  # a batch's own time is timed


def test_ratios_are_of_pairs_of_a_round():
    rows = timing.compared({"assigned": [4.0, 2.0, 8.0], "ours": [1.0, 1.0, 4.0]}, images=100)
    assert rows["ours"]["ratio"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert rows["ours"]["images_per_second"] == {"median": 100.0, "min": 25.0, "max": 100.0}
    assert rows["assigned"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_too_many_images_are_refused(small_cifar):
    pipeline = timing.Pipeline(None, small_cifar, 64, workers=0)
    with pytest.raises(ValueError, match="steps must be at most 3, got 4"):
        pipeline.train(steps=4, warmup=1)


def test_two_evaluations_that_disagree_are_an_error(monkeypatch, small_cifar):
    monkeypatch.setattr(throughput.train_utils, "evaluate", lambda net, data: (1.0, 0.5))
    process = SimpleNamespace(evaluate=lambda: (0.6, 1.0))
    with pytest.raises(RuntimeError, match="one accuracy"):
        throughput.evaluation(small_cifar, process, SimpleNamespace(rounds=1))


@pytest.mark.slow
def test_quick_measures_everything_and_shows_what_it_wrote(
    monkeypatch, small_cifar, process, tmp_path, capsys
):
    asked = []

    def assigned_process(data, workers):
        asked.append(workers)
        assert all(map(torch.equal, data, [tensor[:200] for tensor in small_cifar]))
        return nullcontext(process)  # a second one takes seconds to start

    monkeypatch.setattr(throughput, "AssignedProcess", assigned_process)
    monkeypatch.setattr(throughput.cifar10, "load", lambda device: small_cifar)
    out = tmp_path / "speed.json"
    assert throughput.main(["--quick", "--device", "cpu", "--workers", "1", "--out", str(out)]) == 0
    assert asked == [1]
    printed, results = capsys.readouterr().out, json.loads(out.read_text())
    assert set(results["training"]) == {"8", "16"}
    for rows in (*results["training"].values(), results["evaluation"]):
        for name, row in rows.items():
            if name != "compile_seconds":
                assert 0 < row["images_per_second"]["min"] <= row["images_per_second"]["median"]
    ways = throughput.candidates(torch.device("cpu"), eager=True)
    assert results["epoch_seconds"].keys() == {"assigned", *ways}
    assert f"{results['evaluation']['ours']['ratio']['median']:.2f} (" in printed
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "\nold\n".join(throughput.SECTIONS["cpu"]) + "\nafter\n")
    assert throughput.main(
        ["--show", "--device", "cpu", "--out", str(out), "--write", str(readme)]) == 0
    assert capsys.readouterr().out == printed
    begin, end = throughput.SECTIONS["cpu"]
    assert readme.read_text() == f"before\n{begin}\n\n{printed}\n{end}\nafter\n"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_readme_shows_what_was_measured(kind):
    begin, end = throughput.SECTIONS[kind]
    section = (REPOSITORY / "README.md").read_text().partition(begin)[2].partition(end)[0]
    assert section.strip() == throughput.markdown(json.loads(throughput.RESULTS[kind].read_text()))


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--batch-sizes", "256", "0"]], ids=str)
def test_nothing_to_time_is_refused_before_it_starts(option, capsys):
    with pytest.raises(SystemExit):
        throughput.main(option)
    assert "must be at least 1, got" in capsys.readouterr().err
