"""The assigned runs, and what becomes of a run's files: trained, recorded, resumed, refused."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import experiments
import train_utils
from conftest import REPOSITORY
from FP_layers import code_range, fit_step
from pruning import DynamicPruning, layer_sparsity, sparsity
from resnet20 import ResNetCIFAR
from train_utils import load_weights

ASSIGNED = dict(
    epochs=20,
    batch_size=256,
    lr=0.002,
    schedule="constant",
    warmup=0.0,
    momentum=0.875,
    nesterov=False,
    weight_decay=1e-4,
    label_smoothing=0.0,
    symmetric=False,
    hold_zeros=True,
    keep="best",
    test_every=1,
)
PRUNED = dict(start_from="pretrain", Nbits=None, q=70.0)
EXPECTED = {
    "lab2c_oneshot": dict(PRUNED, prune="layer", prune_epochs=0),
    "lab2d_iterative": dict(PRUNED, prune="layer", prune_epochs=10),
    "lab2e_global": dict(PRUNED, prune="global", prune_epochs=10),
    **{f"lab3c_{n}bit": dict(start_from="pretrain", Nbits=n, prune=None) for n in (4, 3, 2)},
    **{f"lab3d_{n}bit": dict(start_from="lab2e_global", Nbits=n, prune=None) for n in (4, 3, 2)},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_assigned_runs_have_the_assigned_recipe(name):
    config = dataclasses.asdict(experiments.get(name))
    expected = ASSIGNED | EXPECTED[name] | {"name": name}
    assert {key: config[key] for key in expected} == expected


def test_pretraining_starts_from_scratch_and_ships_its_last_epoch():
    run = experiments.get("pretrain")
    assert (run.start_from, run.Nbits, run.prune, run.keep) == (None, None, None, "last")


def test_every_run_comes_after_the_run_it_starts_from():
    names = list(experiments.RUNS)
    children = [run for run in experiments.RUNS.values() if run.start_from]
    assert children and all(names.index(run.start_from) < names.index(run.name) for run in children)
    assert all(name == run.name for name, run in experiments.RUNS.items())


def test_an_unknown_run_is_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError, match="name must be one of pretrain, lab2c_oneshot.*got 'lab2f'"
    ):
        experiments.get("lab2f")


def test_an_untrained_run_says_what_to_type():
    assert (
        experiments.not_trained("lab3c_2bit")
        == "not trained yet: python experiments.py run lab3c_2bit"
    )


def test_building_is_reproducible_and_leaves_the_global_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    net = experiments.build("lab3c_3bit", "cpu")
    assert torch.equal(torch.rand(1), expected)
    again = experiments.build("lab3c_3bit", "cpu")
    assert net.Nbits == 3 and all(
        torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters())
    )


# ---------------------------------------------------------------- the pruning schedule


@pytest.fixture
def wide_net():
    """One layer with small weights, one with large ones; distinct magnitudes."""
    net = nn.Sequential(nn.Linear(100, 10), nn.Linear(100, 10))
    for layer, scale in zip(net, (1, 3)):
        magnitudes = torch.randperm(1000, generator=torch.Generator().manual_seed(scale)) + 1.0
        layer.weight.data = magnitudes.view(10, 100) * scale
    return net


@pytest.mark.parametrize("name", ["lab2d_iterative", "lab2e_global"])
def test_iterative_runs_prune_to_7e_percent_in_ten_epochs_and_no_more(name, wide_net):
    original = [layer.weight.clone() for layer in wide_net]
    seen = []
    for epoch in range(1, 21):
        for layer, weight in zip(wide_net, original):  # as if every weight had recovered
            layer.weight.data.copy_(weight)
        experiments.prune_before_epoch(experiments.get(name), epoch, wide_net)
        seen.append(sparsity(wide_net))
        by_layer = list(layer_sparsity(wide_net).values())
        if epoch <= 10:
            assert (abs(by_layer[0] - by_layer[1]) < 0.002) == (name == "lab2d_iterative")
    assert seen == pytest.approx([0.07 * epoch for epoch in range(1, 11)] + [0.0] * 10, abs=0.002)


@pytest.mark.parametrize(
    "name, expected", [("lab2c_oneshot", 0.7), ("lab3c_4bit", 0.0), ("pretrain", 0.0)]
)
def test_other_runs_prune_once_or_not_at_all(name, expected, wide_net):
    experiments.prune_before_epoch(experiments.get(name), 1, wide_net)
    assert sparsity(wide_net) == pytest.approx(expected, abs=0.002)
    wide_net[0].weight.data.fill_(1)
    experiments.prune_before_epoch(experiments.get(name), 2, wide_net)
    assert layer_sparsity(wide_net)["0"] == 0


def test_bits_go_down_a_quarter_of_the_epochs_at_each_width():
    run = experiments.Run("narrow", "", Nbits=2, narrow_from=4, quantizer="learned", epochs=8)
    net = ResNetCIFAR(num_layers=8, Nbits=2, quantizer="learned")
    layer, widths = net.body_op[0].conv1[0], []
    for epoch in range(1, 9):
        layer.step.data.mul_(1.01)  # as if trained
        before = layer.step.detach().clone()
        experiments.set_width_before_epoch(run, epoch, net)
        widths.append(layer.Nbits)
        # fitted anew where the width changes
        assert torch.equal(layer.step, before) == (epoch not in (1, 3, 5))
        if epoch in (1, 3, 5):
            assert torch.equal(layer.step, fit_step(layer.weight, *code_range(layer.Nbits)))
    assert widths == [4, 4, 3, 3, 2, 2, 2, 2] and net.head_conv[0].Nbits is None


def test_a_run_that_regrows_tells_its_pruner_how_much_to_prune():
    run = experiments.get("ablation_global_regrow")
    net = ResNetCIFAR(num_layers=8)
    dynamic, told = DynamicPruning(net), []
    for epoch in range(1, 5):
        dynamic.steps = 5
        experiments.prune_before_epoch(run, epoch, net, dynamic)
        told.append((dynamic.q, dynamic.steps))
    assert told == [(35.0, 0), (70.0, 0), (70.0, 0), (70.0, 0)] and sparsity(net) == 0
    assert run.regrow and not run.hold_zeros


# ---------------------------------------------------------------- a laboratory with tiny runs in a
# folder of its own


@pytest.fixture
def lab(monkeypatch, tmp_path, small_cifar):
    """experiments.py copied into an empty folder, which is thereby its ROOT, with runs of a few
    steps.
    """
    shutil.copy(experiments.__file__, tmp_path / "experiments.py")
    spec = importlib.util.spec_from_file_location("experiments", tmp_path / "experiments.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments", module)
    spec.loader.exec_module(module)
    tiny = type(small_cifar)(*(tensor[:n] for tensor, n in zip(small_cifar, (128, 128, 50, 50))))
    monkeypatch.setattr(train_utils, "get_data", lambda device: tiny)
    monkeypatch.delenv("RETRAIN", raising=False)
    fast = dict(batch_size=64, lr=0.01)
    module.RUNS = {
        run.name: run
        for run in [
            module.Run("pretrain", "the start", start_from=None, epochs=1, keep="last", **fast),
            module.Run(
                "iterative",
                "pruned in two steps",
                prune="global",
                q=70.0,
                prune_epochs=2,
                epochs=3,
                **fast,
            ),
            module.Run("quantized", "3 bits", start_from="iterative", Nbits=3, epochs=1, **fast),
        ]
    }
    return module


def redefine(lab, name, **changes):
    lab.RUNS[name] = dataclasses.replace(lab.RUNS[name], **changes)


def files_in(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_a_chain_of_runs_is_trained_recorded_and_loaded(lab, tmp_path):
    for name in lab.RUNS:
        lab.train_run(name)
    assert files_in(tmp_path) == {
        "experiments.py",
        "pretrained_model.pt",
        "checkpoints/pretrain.json",
        "checkpoints/iterative.pt",
        "checkpoints/iterative.json",
        "checkpoints/quantized.pt",
        "checkpoints/quantized.json",
    }
    pretrained, iterative, quantized = map(lab.read_record, lab.RUNS)
    assert iterative["start_from_sha256"] == pretrained["weights_sha256"]
    assert quantized["start_from_sha256"] == iterative["weights_sha256"]
    assert (
        iterative["sparsity"] == pytest.approx(0.7, abs=1e-4)
        and quantized["sparsity"] >= iterative["sparsity"]
    )
    assert [entry["epoch"] for entry in iterative["history"]] == [1, 2, 3]
    assert iterative["seconds"] == pytest.approx(
        sum(entry["seconds"] for entry in iterative["history"])
    )

    net, record = lab.load_or_train("quantized")
    assert record == quantized and net.Nbits == 3
    loss, accuracy = train_utils.evaluate(net)
    assert (loss, accuracy) == pytest.approx(
        (record["test_loss"], record["test_accuracy"]), rel=1e-4
    )
    assert sparsity(net) == record["sparsity"] and layer_sparsity(net) == record["layer_sparsity"]


def test_a_run_starts_from_the_weights_of_its_parent(lab):
    lab.train_run("pretrain")
    redefine(lab, "quantized", start_from="pretrain", lr=0.0, weight_decay=0.0)
    lab.train_run("quantized")
    parent, child = (
        dict(lab.load_or_train(name)[0].named_parameters()) for name in ("pretrain", "quantized")
    )
    for name in parent:
        torch.testing.assert_close(child[name], parent[name], rtol=0, atol=1e-9)


def test_weights_recover_until_the_last_pruning_and_are_held_from_then_on(lab, monkeypatch):
    seen, train_epoch = [], train_utils.train_epoch

    def watched(net, *args, **kwargs):
        before = sparsity(net)
        result = train_epoch(net, *args, **kwargs)
        seen.append((before, sparsity(net)))
        return result

    monkeypatch.setattr(train_utils, "train_epoch", watched)
    lab.train_run("pretrain")
    seen.clear()
    lab.train_run("iterative")
    assert [pytest.approx(before, abs=1e-4) for before, _ in seen] == [0.35, 0.7, 0.7]
    assert seen[0][1] < 0.05
    assert [after for _, after in seen[1:]] == [before for before, _ in seen[1:]]


def evaluations(monkeypatch, *accuracies):
    """Have evaluate return these accuracies, one a call, and the last of them ever after."""
    calls = iter(accuracies)
    monkeypatch.setattr(
        train_utils, "evaluate", lambda net, data=None: (1.0, next(calls, accuracies[-1]))
    )


def test_no_epoch_before_the_final_sparsity_is_shipped(lab, monkeypatch):
    lab.train_run("pretrain")
    evaluations(monkeypatch, 0.9, 0.5, 0.4)
    record = lab.train_run("iterative")
    assert record["best"]["epoch"] == 2 and record["last"]["epoch"] == 3
    assert record["sparsity"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_to_keep_is_kept(lab, monkeypatch, keep):
    """A cut-off second epoch has the same steps in epoch 1 as a whole run at constant rate."""
    redefine(lab, "pretrain", keep="last", epochs=1 if keep == "best" else 2)
    evaluations(monkeypatch, 0.5, 0.3)
    expected = lab.train_run("pretrain")
    lab._record_path("pretrain", lab.SHIPPED).unlink()
    redefine(lab, "pretrain", keep=keep, epochs=2)
    evaluations(monkeypatch, 0.5, 0.3)
    record = lab.train_run("pretrain")
    assert record["weights_sha256"] == expected["weights_sha256"]
    assert (record["best"]["test_accuracy"], record["last"]["test_accuracy"]) == (0.5, 0.3)


# ---------------------------------------------------------------- interrupted


@pytest.fixture
def break_in_epoch(monkeypatch):
    """Returns a function that makes training fail in that epoch, and one that mends it."""
    train_epoch = train_utils.train_epoch

    def set_up(epoch):
        calls = []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == epoch:
                raise KeyboardInterrupt
            return train_epoch(*args, **kwargs)

        monkeypatch.setattr(train_utils, "train_epoch", failing)

    return set_up, lambda: monkeypatch.setattr(train_utils, "train_epoch", train_epoch)


def test_an_interrupted_run_goes_on_to_the_same_bytes(lab, break_in_epoch, tmp_path):
    break_in, mend = break_in_epoch
    lab.train_run("pretrain")
    unbroken = lab.train_run("iterative", tmp_path / "other")
    for epoch in (3, 1):  # in epoch 3, and at once when it is started again
        break_in(epoch)
        with pytest.raises(KeyboardInterrupt):
            lab.train_run("iterative")
        assert lab.read_record("iterative") is None
    mend()
    record = lab.train_run("iterative")
    assert record["weights_sha256"] == unbroken["weights_sha256"]
    assert [e["train_loss"] for e in record["history"]] == [
        e["train_loss"] for e in unbroken["history"]
    ]
    assert not list(tmp_path.rglob("*.resume.pt")) and not list(tmp_path.rglob("*.part"))


def test_a_run_interrupted_under_another_config_is_not_gone_on_with(lab, break_in_epoch):
    break_in, mend = break_in_epoch
    redefine(lab, "pretrain", epochs=2)
    break_in(2)
    with pytest.raises(KeyboardInterrupt):
        lab.train_run("pretrain")
    mend()
    redefine(lab, "pretrain", lr=0.02)
    with pytest.raises((lab.RecordError, ValueError), match="pretrain.resume.pt"):
        lab.train_run("pretrain")


# ---------------------------------------------------------------- records that do not fit


def alter_weights(lab):
    path = lab.weights_path("pretrain")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def alter_record(lab, text):
    (lab.SHIPPED / "pretrain.json").write_text(text)


@pytest.mark.parametrize("damage, complaint", [
    (lambda lab: redefine(lab, "pretrain", lr=0.5), r"another config.*'lr': \(0.01, 0.5\)"),
    (alter_weights, "pretrained_model.pt is not the file"),
    (lambda lab: lab.weights_path("pretrain").unlink(), "pretrained_model.pt is not the file"),
    (lambda lab: alter_record(lab, '{"config"'), "pretrain.json"),
    (lambda lab: alter_record(lab, "{}"), "pretrain.json"),
], ids=["config", "weights altered", "weights missing", "record cut off", "record empty"])
@pytest.mark.parametrize("use", ["read_record", "load_or_train", "train a child"])
def test_a_record_that_does_not_fit_is_never_used(lab, trained_once, use, damage, complaint):
    damage(lab)
    with pytest.raises(lab.RecordError, match=complaint):
        lab.train_run("iterative") if use == "train a child" else getattr(lab, use)("pretrain")


@pytest.fixture(scope="module")
def trained_files(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained_once(lab, trained_files, tmp_path):
    """The tiny pretraining, trained for the first test that wants it and copied for the others."""
    if not list(trained_files.iterdir()):
        lab.train_run("pretrain", trained_files)
    shutil.copy(trained_files / "pretrain.pt", lab.weights_path("pretrain"))
    lab.SHIPPED.mkdir()
    shutil.copy(trained_files / "pretrain.json", lab.SHIPPED)


def test_a_run_without_its_parent_says_what_to_train_first(lab):
    with pytest.raises(
        lab.RecordError, match="iterative starts from pretrain.*python experiments.py run pretrain"
    ):
        lab.train_run("iterative")


def test_a_run_whose_parents_weights_are_not_shipped_says_how_to_make_them(lab, trained_once):
    redefine(lab, "pretrain", held_out=28)
    lab.main(["run", "pretrain", "--force"])
    lab.weights_path("pretrain").unlink()
    with pytest.raises(
        lab.RecordError, match="iterative starts from pretrain, whose .*run pretrain --force"
    ):
        lab.train_run("iterative")
    assert lab.main(["run", "pretrain", "--force"]) == 0 and lab.train_run("iterative")


def test_a_setting_that_came_later_counts_as_its_default(lab, trained_once):
    path = lab.SHIPPED / "pretrain.json"
    record = json.loads(path.read_text())
    del record["config"]["distill"]
    path.write_text(json.dumps(record))
    assert lab.read_record("pretrain")["config"] == record["config"]
    redefine(lab, "pretrain", distill=0.5)
    with pytest.raises(lab.RecordError, match=r"another config.*'distill': \(0.0, 0.5\)"):
        lab.read_record("pretrain")


# ---------------------------------------------------------------- seeds, held-out images, improved
# runs


def test_a_seed_is_a_run_of_its_own_with_its_parents_of_that_seed():
    run, base = experiments.get("lab3d_2bit@2"), experiments.get("lab3d_2bit")
    assert dataclasses.asdict(run) == dataclasses.asdict(base) | {
        "name": "lab3d_2bit@2", "start_from": "lab2e_global@2", "seed": 2}
    assert experiments.get("pretrain@1").start_from is None


@pytest.mark.parametrize(
    "name", ["lab3d_2bit@", "lab3d_2bit@0", "lab3d_2bit@-1", "lab3d_2bit@x", "x@1"]
)
def test_a_seed_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"NAME@SEED, seed >= 1.*got '{name}'"):
        experiments.get(name)


def test_seeds_differ_and_their_record_needs_no_weights(lab, trained_once):
    first, other = lab.read_record("pretrain"), lab.train_run("pretrain@1")
    assert other["weights_sha256"] != first["weights_sha256"] and other["config"]["seed"] == 1
    assert lab.train_run("iterative@1")["start_from_sha256"] == other["weights_sha256"]
    lab.weights_path("pretrain@1").unlink()
    assert lab.read_record("pretrain@1") == other
    with pytest.raises(lab.RecordError, match="iterative@1 starts from pretrain@1"):
        lab.train_run("iterative@1")


def test_run_all_with_seeds_trains_each_chain_in_order(lab, trained_once, monkeypatch, capsys):
    trained, record = [], lab.read_record("pretrain")
    monkeypatch.setattr(lab, "train_run", lambda name, folder: trained.append(name) or record)
    assert lab.main(["run", "all", "--seeds", "2"]) == 0
    assert trained == ["iterative", "quantized", "pretrain@1", "iterative@1", "quantized@1"]
    assert "at most about" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", ["0", "-1", "1.5", "two"])
def test_seeds_out_of_range_are_refused_before_any_training(lab, monkeypatch, capsys, seeds):
    monkeypatch.setattr(lab, "train_run", None)
    with pytest.raises(SystemExit):
        lab.main(["run", "all", "--seeds", seeds])
    assert f"--seeds: must be an integer >= 1, got '{seeds}'" in capsys.readouterr().err


def test_a_reader_that_closes_the_list_is_no_error():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "experiments.py", "list"],
        cwd=REPOSITORY,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert process.stderr == b"" and process.returncode == 0


def test_a_run_on_held_out_images_never_sees_the_test_set(lab, monkeypatch):
    tested = []
    evaluate = train_utils.evaluate
    monkeypatch.setattr(
        train_utils, "evaluate", lambda net, data=None: tested.append(data) or evaluate(net, data)
    )
    redefine(lab, "pretrain", held_out=28)
    record = lab.train_run("pretrain")
    everything = train_utils.get_data("cpu")
    for data in tested:
        assert len(data.train_images) == 100 and len(data.test_images) == 28
        images = {image.numpy().tobytes() for image in everything.train_images}
        assert all(image.numpy().tobytes() in images for image in data.test_images)
    assert record["config"]["held_out"] == 28 and tested


def test_a_child_with_a_learned_step_fits_it_to_its_own_width(lab, trained_once, monkeypatch):
    """With a rate of zero nothing else moves it."""
    frozen = dict(quantizer="learned", lr=0.0, weight_decay=0.0)
    redefine(lab, "iterative", prune=None, q=0.0, prune_epochs=0, epochs=1, Nbits=4, **frozen)
    redefine(lab, "quantized", Nbits=2, **frozen)
    lab.train_run("iterative")
    lab.train_run("quantized")
    layer = lab.load_or_train("quantized")[0].body_op[0].conv1[0]
    fitted = layer.step.detach().clone()
    layer.reset_step()
    assert torch.equal(layer.step, fitted)
    assert not torch.equal(lab.load_or_train("iterative")[0].body_op[0].conv1[0].step, fitted)


def test_a_run_whose_pruned_weights_may_come_back_ends_as_sparse_as_it_should(lab, trained_once):
    redefine(lab, "iterative", regrow=True, hold_zeros=False, keep="last")
    record = lab.train_run("iterative")
    assert [entry["sparsity"] for entry in record["history"]] == pytest.approx(
        [0.35, 0.7, 0.7], abs=1e-3
    )
    assert record["sparsity"] == record["history"][-1]["sparsity"]


def test_distillation_is_from_the_float_model_and_recorded(lab, trained_once):
    redefine(lab, "quantized", start_from="pretrain", distill=0.5)
    record = lab.train_run("quantized")
    assert record["teacher_sha256"] == lab.read_record("pretrain")["weights_sha256"]


IMPROVED = [name for name in experiments.RUNS if name.endswith("_improved")]


@pytest.mark.parametrize("name", IMPROVED)
def test_improved_runs_have_the_assigned_budget_and_choose_no_epoch(name):
    run, assigned = experiments.get(name), experiments.get(name.removesuffix("_improved"))
    assert (run.epochs, run.keep, run.held_out) == (assigned.epochs, "last", 0)
    assert (run.Nbits, run.prune, run.q) == (assigned.Nbits, assigned.prune, assigned.q)


def test_the_last_step_of_each_ablation_is_the_improved_recipe_in_a_fifth_of_the_epochs():
    for ablation, improved in (("ablation_2bit_distill", "lab3c_2bit_improved"),
                               ("ablation_global_distill", "lab2e_global_improved")):
        a, b = (dataclasses.asdict(experiments.get(name)) for name in (ablation, improved))
        assert (5 * a["epochs"], 5 * a["prune_epochs"]) == (b["epochs"], b["prune_epochs"])
        assert {key for key in a if a[key] != b[key]} <= {
            "name", "question", "held_out", "epochs", "prune_epochs", "start_from", "teacher"}


def test_the_long_ablation_is_the_improved_recipe_with_and_without_distillation():
    for with_it, without, improved in (("2bit_distill", "2bit_step", "lab3c_2bit_improved"),
                                       ("global_distill", "global_rate", "lab2e_global_improved")):
        a, b, c = (dataclasses.asdict(experiments.get(name))
                   for name in (f"ablation_long_{with_it}", f"ablation_long_{without}", improved))
        assert {key for key in a if a[key] != b[key]} == {"name", "question", "distill"} and b[
            "distill"
        ] == 0
        assert {key for key in a if a[key] != c[key]} == {
            "name",
            "question",
            "held_out",
            "start_from",
            "teacher",
        }


def test_nothing_in_the_ablation_has_seen_the_images_that_it_is_tested_on():
    ablation = [run for name, run in experiments.RUNS.items() if name.startswith("ablation_")]
    for run in ablation:
        seen = {run.start_from, run.teacher} if run.start_from else set()
        assert run.held_out == 5000 and run.seed == 0
        assert all(experiments.get(name).held_out == 5000 for name in seen)


def test_time_needed_grows_with_the_work(lab):
    one, both = (
        lab.seconds_needed(["iterative"], "cpu"),
        lab.seconds_needed(["iterative"] * 40, "cpu"),
    )
    assert 0 < one < both


# ---------------------------------------------------------------- load_or_train


def test_load_or_train_trains_what_is_missing_and_loads_it_the_next_time(lab, monkeypatch):
    net, record = lab.load_or_train("pretrain")
    monkeypatch.setattr(lab, "train_run", None)
    again, same_record = lab.load_or_train("pretrain")
    assert same_record == record
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values())
    )


def test_load_or_train_loads_into_a_net_in_place(lab, trained_once):
    net = lab.build("pretrain")
    assert lab.load_or_train("pretrain", net)[0] is net
    expected = load_weights(lab.build("pretrain"), lab.weights_path("pretrain"))
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), expected.state_dict().values())
    )


@pytest.mark.parametrize("value", ["0", ""])
def test_without_retrain_nothing_is_trained(lab, trained_once, monkeypatch, value):
    monkeypatch.setenv("RETRAIN", value)
    monkeypatch.setattr(lab, "train_run", None)
    assert lab.load_or_train("pretrain")[1] == lab.read_record("pretrain")


def test_retrain_trains_into_build_once_and_touches_nothing_shipped(
    lab, trained_once, monkeypatch, tmp_path
):
    shipped = {path: (tmp_path / path).read_bytes() for path in files_in(tmp_path)}
    trained, train_run = [], lab.train_run
    monkeypatch.setattr(
        lab, "train_run", lambda name, folder: trained.append(name) or train_run(name, folder)
    )
    monkeypatch.setenv("RETRAIN", "1")
    for _ in range(2):
        lab.load_or_train("pretrain")
    assert trained == ["pretrain"]
    assert files_in(tmp_path) == set(shipped) | {
        "build/retrained/pretrain.pt",
        "build/retrained/pretrain.json",
    }
    assert all((tmp_path / path).read_bytes() == content for path, content in shipped.items())


def test_retrain_starts_a_run_from_its_retrained_parent(lab, monkeypatch):
    """Nothing is shipped here, so that there is no other parent."""
    monkeypatch.setenv("RETRAIN", "1")
    _, parent = lab.load_or_train("pretrain")
    redefine(lab, "quantized", start_from="pretrain")
    assert lab.load_or_train("quantized")[1]["start_from_sha256"] == parent["weights_sha256"]
    assert not lab.SHIPPED.exists() and not lab.weights_path("pretrain").exists()


# ---------------------------------------------------------------- command line


def test_list_names_every_run_with_its_result(lab, trained_once, capsys):
    assert lab.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = lab.read_record("pretrain")["test_accuracy"]
    assert [line.split()[0] for line in lines] == list(lab.RUNS)
    assert f"{100 * accuracy:.2f} %" in lines[0] and "not trained" in lines[1]


def test_run_trains_what_is_not_trained_and_force_trains_it_again(
    lab, trained_once, monkeypatch, capsys
):
    trained, record = [], lab.read_record("pretrain")
    monkeypatch.setattr(lab, "train_run", lambda name, folder: trained.append(name) or record)
    assert lab.main(["run", "all"]) == 0 and trained == ["iterative", "quantized"]
    assert "pretrain: trained already" in capsys.readouterr().out
    assert lab.main(["run", "pretrain", "--force"]) == 0 and trained[2:] == ["pretrain"]


def test_run_into_another_folder_trains_from_nothing_and_goes_on_there(
    lab, trained_once, tmp_path, capsys
):
    shipped = files_in(tmp_path)
    into = ["--into", str(tmp_path / "again")]
    assert (
        lab.main(["run", "pretrain", *into]) == 0
        and lab.main(["run", "pretrain", "iterative", *into]) == 0
    )
    assert "pretrain: trained already" in capsys.readouterr().out
    expected = {
        f"again/{name}.{end}" for name in ("pretrain", "iterative") for end in ("pt", "json")
    }
    assert files_in(tmp_path) - shipped == expected
    again = lab.read_record("iterative", tmp_path / "again")
    assert (
        again["start_from_sha256"]
        == lab.read_record("pretrain", tmp_path / "again")["weights_sha256"]
    )


@pytest.mark.parametrize(
    "names, complaint",
    [
        (
            ["lab2f"],
            "error: name must be one of pretrain, iterative, quantized (or NAME@SEED, seed >= 1), got 'lab2f'",
        ),
        (
            ["quantized"],
            "error: quantized starts from iterative, which is not trained yet: "
            "python experiments.py run iterative",
        ),
    ],
)
def test_run_reports_an_error_in_one_line(lab, capsys, names, complaint):
    assert lab.main(["run", *names]) == 1
    assert capsys.readouterr().err.splitlines() == [complaint]


def test_ctrl_c_says_how_to_go_on(lab, monkeypatch, capsys):
    def interrupted(name, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "train_run", interrupted)
    assert lab.main(["run", "pretrain"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk"]])
def test_bad_usage_is_refused(lab, arguments):
    with pytest.raises(SystemExit) as caught:
        lab.main(arguments)
    assert caught.value.code == 2
