"""What becomes of a run: trained, resumed to the same bits, loaded, retrained."""

import json
from dataclasses import replace

import pytest
import torch

import train_utils
from conftest import same
from experiments import records, run
from experiments.run import seconds_needed
from pruning import layer_sparsity, sparsity
from tiny_runs import TINY, files_in, redefine
from training.checkpoints import load_weights
from training.execution import Execution

pytest_plugins = ["tiny_runs"]


def test_building_is_reproducible_and_leaves_the_global_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    net = run.build("lab3c_3bit", "cpu")
    assert torch.equal(torch.rand(1), expected)
    again = run.build("lab3c_3bit", "cpu")
    assert (net.Nbits, net.num_layers) == (3, 20) and all(
        torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters())
    )


def same_weights(net, other):
    return same(net.state_dict(), other.state_dict())


# ---------------------------------------------------------------- trained and recorded


def test_a_chain_of_runs_is_trained_recorded_and_loaded(tiny_runs, tmp_path):
    for name in TINY:
        run.train_run(name)
    assert files_in(tmp_path) == {
        "pretrained_model.pt",
        "checkpoints/pretrain.json",
        "checkpoints/iterative.pt",
        "checkpoints/iterative.json",
        "checkpoints/quantized.pt",
        "checkpoints/quantized.json",
    }
    pretrained, iterative, quantized = map(records.read_record, TINY)
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
    assert iterative["images_per_second"] == pytest.approx(3 * 64 / iterative["seconds"])
    assert iterative["environment"]["torch"] == torch.__version__

    net, record = run.load_or_train("quantized")
    assert record == quantized and net.Nbits == 3
    loss, accuracy = train_utils.evaluate(net)
    assert (loss, accuracy) == pytest.approx(
        (record["test_loss"], record["test_accuracy"]), rel=1e-4
    )
    assert sparsity(net) == record["sparsity"] and layer_sparsity(net) == record["layer_sparsity"]


def test_a_run_starts_from_the_weights_of_its_parent(pretrained):
    redefine("quantized", start_from="pretrain", recipe={"lr": 0.0, "weight_decay": 0.0})
    run.train_run("quantized")
    parent, child = (
        dict(run.load_or_train(name)[0].named_parameters()) for name in ("pretrain", "quantized")
    )
    for name in parent:
        torch.testing.assert_close(child[name], parent[name], rtol=0, atol=1e-9)


def test_weights_recover_until_the_last_pruning_and_are_held_from_then_on(pretrained, monkeypatch):
    seen, train_epoch = [], train_utils.train_epoch

    def watched(net, *args, **kwargs):
        before = sparsity(net)
        result = train_epoch(net, *args, **kwargs)
        seen.append((before, sparsity(net)))
        return result

    monkeypatch.setattr(train_utils, "train_epoch", watched)
    run.train_run("iterative")
    assert [pytest.approx(before, abs=1e-4) for before, _ in seen] == [0.35, 0.7, 0.7]
    assert seen[0][1] < 0.05
    assert [after for _, after in seen[1:]] == [before for before, _ in seen[1:]]


def evaluations(monkeypatch, *accuracies):
    """Have evaluate return these accuracies, one a call, and the last of them ever after."""
    calls = iter(accuracies)
    monkeypatch.setattr(
        train_utils, "evaluate", lambda net, data=None: (1.0, next(calls, accuracies[-1]))
    )


def test_no_epoch_before_the_final_sparsity_is_shipped(pretrained, monkeypatch):
    evaluations(monkeypatch, 0.9, 0.5, 0.4)
    record = run.train_run("iterative")
    assert record["best"]["epoch"] == 2 and record["last"]["epoch"] == 3
    assert record["sparsity"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_to_keep_is_kept(tiny_runs, monkeypatch, keep):
    """A cut-off second epoch has the same steps in epoch 1 as a whole run at constant rate."""
    redefine("pretrain", keep="last", recipe={"epochs": 1 if keep == "best" else 2})
    evaluations(monkeypatch, 0.5, 0.3)
    expected = run.train_run("pretrain")
    records.record_path("pretrain").unlink()
    redefine("pretrain", keep=keep, recipe={"epochs": 2})
    evaluations(monkeypatch, 0.5, 0.3)
    record = run.train_run("pretrain")
    assert record["weights_sha256"] == expected["weights_sha256"]
    assert (record["best"]["test_accuracy"], record["last"]["test_accuracy"]) == (0.5, 0.3)


def test_seeds_differ_start_alike_and_their_record_needs_no_weights(pretrained):
    first, other = records.read_record("pretrain"), run.train_run("pretrain@1")
    assert other["weights_sha256"] != first["weights_sha256"] and other["config"]["seed"] == 1
    children = [run.train_run(name) for name in ("iterative", "iterative@1")]
    assert {child["start_from_sha256"] for child in children} == {first["weights_sha256"]}
    assert children[0]["weights_sha256"] != children[1]["weights_sha256"]
    records.weights_path("pretrain@1").unlink()
    assert records.read_record("pretrain@1") == other


def test_a_parent_in_the_folder_goes_before_the_shipped_one(pretrained, tmp_path):
    shipped = records.read_record("pretrain")
    own = run.train_run("pretrain@1", tmp_path / "into")  # other bits, now under the same name
    own["config"] |= {"name": "pretrain", "seed": 0}
    (tmp_path / "into" / "pretrain.json").write_text(json.dumps(own))
    (tmp_path / "into" / "pretrain@1.pt").rename(tmp_path / "into" / "pretrain.pt")
    child = run.train_run("iterative", tmp_path / "into")
    assert child["start_from_sha256"] == own["weights_sha256"] != shipped["weights_sha256"]


def test_epochs_without_a_test_are_in_no_result(tiny_runs):
    redefine("pretrain", recipe={"epochs": 3, "test_every": 2})
    record = run.train_run("pretrain")
    assert ["test_accuracy" in entry for entry in record["history"]] == [False, True, True]
    assert record["last"]["epoch"] == 3 and record["best"]["epoch"] in (2, 3)


def test_a_run_on_held_out_images_never_sees_the_test_set(tiny_runs, monkeypatch):
    tested = []
    evaluate = train_utils.evaluate
    monkeypatch.setattr(
        train_utils, "evaluate", lambda net, data=None: tested.append(data) or evaluate(net, data)
    )
    redefine("pretrain", held_out=28)
    record = run.train_run("pretrain")
    everything = train_utils.get_data("cpu")
    for data in tested:
        assert len(data.train_images) == 36 and len(data.test_images) == 28
        images = {image.numpy().tobytes() for image in everything.train_images}
        assert all(image.numpy().tobytes() in images for image in data.test_images)
    assert record["config"]["held_out"] == 28 and tested


@pytest.mark.parametrize("grid", [dict(Nbits=4), dict(Nbits=2, symmetric=True)], ids=str)
def test_a_child_with_a_learned_step_fits_it_to_its_own_grid(pretrained, grid):
    """With a rate of zero nothing else moves it."""
    frozen = dict(quantizer="learned", recipe={"epochs": 1, "lr": 0.0, "weight_decay": 0.0})
    redefine("iterative", pruning={"method": None, "q": 0.0, "epochs": 0}, **grid, **frozen)
    redefine("quantized", Nbits=2, **frozen)
    run.train_run("iterative")
    run.train_run("quantized")
    layer = run.load_or_train("quantized")[0].body_op[0].conv1[0]
    fitted = layer.quantizer.step.detach().clone()
    layer.fit_quantizer()
    assert torch.equal(layer.quantizer.step, fitted)
    parent = run.load_or_train("iterative")[0].body_op[0].conv1[0]
    assert not torch.equal(parent.quantizer.step, fitted)


def test_a_child_of_the_same_width_keeps_its_parents_trained_steps(pretrained):
    """With a rate of zero nothing else moves them."""
    frozen = dict(quantizer="learned", Nbits=2)
    redefine("iterative", **frozen, recipe={"lr": 0.1})
    redefine("quantized", **frozen, recipe={"epochs": 1, "lr": 0.0, "weight_decay": 0.0})
    run.train_run("iterative")
    run.train_run("quantized")
    trained, kept = (run.load_or_train(name)[0].body_op[0].conv1[0]
                     for name in ("iterative", "quantized"))
    step = trained.quantizer.step.detach().clone()
    assert torch.equal(kept.quantizer.step, step)
    trained.fit_quantizer()
    assert not torch.equal(trained.quantizer.step, step)


def test_distillation_is_from_the_teacher_and_recorded(pretrained):
    redefine("iterative", teacher="pretrain", recipe={"distill": 0.5, "epochs": 2})
    record = run.train_run("iterative")
    assert record["teacher_sha256"] == records.read_record("pretrain")["weights_sha256"]
    redefine("iterative", teacher=None, recipe={"distill": 0.0})
    alone = run.train_run("iterative")
    assert alone["teacher_sha256"] is None and alone["weights_sha256"] != record["weights_sha256"]


def test_a_run_without_its_parent_says_what_to_train_first(tiny_runs):
    with pytest.raises(
        records.RecordError,
        match="iterative needs pretrain.*python -m experiments run pretrain",
    ):
        run.train_run("iterative")


def test_a_run_whose_parents_weights_are_not_shipped_says_how_to_make_them(pretrained):
    redefine("pretrain", held_out=28)
    run.train_run("pretrain")
    records.weights_path("pretrain").unlink()
    before = records.record_path("pretrain").read_bytes()
    with pytest.raises(records.RecordError, match="iterative needs pretrain, whose weights are not "
                       "shipped: .*run pretrain iterative --into build/trained"):
        run.train_run("iterative")
    folder = records.ROOT / "build" / "trained"
    with pytest.raises(records.RecordError, match=f"run pretrain iterative --into {folder}"):
        run.train_run("iterative", folder)
    for name in ("pretrain", "iterative"):
        run.train_run(name, folder)
    assert records.record_path("pretrain").read_bytes() == before


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


def test_an_interrupted_run_goes_on_to_the_same_bytes(pretrained, break_in_epoch, tmp_path):
    break_in, mend = break_in_epoch
    unbroken = run.train_run("iterative", tmp_path / "other")
    for epoch in (3, 1):  # in epoch 3, and at once when it is started again
        break_in(epoch)
        with pytest.raises(KeyboardInterrupt):
            run.train_run("iterative")
        assert records.read_record("iterative") is None
    mend()
    record = run.train_run("iterative")
    assert record["weights_sha256"] == unbroken["weights_sha256"]
    assert [e["train_loss"] for e in record["history"]] == [
        e["train_loss"] for e in unbroken["history"]
    ]
    assert not list(tmp_path.rglob("*.resume.pt")) and not list(tmp_path.rglob("*.part"))


def test_a_run_interrupted_under_another_config_is_not_gone_on_with(tiny_runs, break_in_epoch):
    break_in, mend = break_in_epoch
    redefine("pretrain", recipe={"epochs": 2})
    break_in(2)
    with pytest.raises(KeyboardInterrupt):
        run.train_run("pretrain")
    mend()
    redefine("pretrain", recipe={"lr": 0.02})
    with pytest.raises((records.RecordError, ValueError), match="pretrain.resume.pt"):
        run.train_run("pretrain")


# ---------------------------------------------------------------- in which precision


BF16, FLOAT32 = Execution(bf16=True), Execution()


def fastest_is(execution, monkeypatch):
    """Have `execution` be the fastest one; None: nobody may ask."""
    def fastest(net, batch_size, steps):
        assert execution is not None, "asked for the fastest"
        return execution

    monkeypatch.setattr(run, "fastest", fastest)


def test_the_fastest_execution_is_taken_for_all_steps_and_recorded(tiny_runs, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "fastest", lambda *arguments: asked.append(arguments) or BF16)
    redefine("pretrain", recipe={"epochs": 2})
    record = run.train_run("pretrain")
    assert [(batch_size, steps) for _, batch_size, steps in asked] == [(32, 4)]
    threads = torch.get_num_threads()
    assert record["execution"] == vars(Execution(bf16=True, threads=threads))
    fastest_is(FLOAT32, monkeypatch)
    other = run.train_run("pretrain")
    assert other["execution"] == vars(Execution(threads=threads))
    assert other["weights_sha256"] != record["weights_sha256"]


@pytest.fixture
def threads():
    """Afterwards as many as before: two, with which sums are taken otherwise than with three."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_a_resumed_run_keeps_the_execution_it_began_with(
    tiny_runs, break_in_epoch, monkeypatch, tmp_path, threads
):
    break_in, mend = break_in_epoch
    redefine("pretrain", recipe={"epochs": 2})
    fastest_is(BF16, monkeypatch)
    unbroken = run.train_run("pretrain", tmp_path / "other")
    break_in(2)
    with pytest.raises(KeyboardInterrupt):
        run.train_run("pretrain")
    mend()
    fastest_is(FLOAT32, monkeypatch)
    torch.set_num_threads(threads + 1)
    record = run.train_run("pretrain")
    assert torch.get_num_threads() == threads + 1
    assert record["execution"] == unbroken["execution"] == vars(replace(BF16, threads=threads))
    assert record["weights_sha256"] == unbroken["weights_sha256"]


def test_as_recorded_the_same_bytes_come_out_again(tiny_runs, monkeypatch, tmp_path, threads):
    """Whatever is the fastest by then; from the record of the folder, or else the shipped one."""
    fastest_is(BF16, monkeypatch)
    first = run.train_run("pretrain")
    torch.set_num_threads(threads + 1)
    assert run.train_run("pretrain", tmp_path / "b")["weights_sha256"] != first["weights_sha256"]
    fastest_is(None, monkeypatch)
    for folder in (records.SHIPPED, tmp_path / "again"):
        record = run.train_run("pretrain", folder, as_recorded=True)
        assert record["execution"] == first["execution"]
        assert record["weights_sha256"] == first["weights_sha256"]
    weights = [records.weights_path("pretrain", folder).read_bytes()
               for folder in (records.SHIPPED, tmp_path / "again")]
    assert weights[0] == weights[1]
    fastest_is(FLOAT32, monkeypatch)
    own = run.train_run("pretrain", tmp_path / "again")
    fastest_is(None, monkeypatch)
    assert run.train_run("pretrain", tmp_path / "again", True)["execution"] == own["execution"]


def test_what_has_begun_otherwise_cannot_run_as_recorded(tiny_runs, break_in_epoch, monkeypatch):
    break_in, _ = break_in_epoch
    fastest_is(BF16, monkeypatch)
    run.train_run("pretrain")
    fastest_is(FLOAT32, monkeypatch)
    redefine("pretrain", recipe={"epochs": 2})
    break_in(2)
    with pytest.raises(KeyboardInterrupt):
        run.train_run("pretrain")
    redefine("pretrain", recipe={"epochs": 1})
    with pytest.raises(records.RecordError, match="begun as .*bf16=False.*, not as recorded, "
                                                  ".*bf16=True.*remove .*pretrain.resume.pt"):
        run.train_run("pretrain", as_recorded=True)


def test_what_was_recorded_on_another_device_cannot_run_as_recorded(pretrained):
    path = records.record_path("pretrain")
    record = json.loads(path.read_text())
    record["environment"]["device"] = "NVIDIA H100"
    path.write_text(json.dumps(record))
    with pytest.raises(records.RecordError, match="pretrain was recorded on NVIDIA H100: train it"):
        run.train_run("pretrain", as_recorded=True)


def test_what_was_never_recorded_cannot_run_as_recorded(tiny_runs):
    with pytest.raises(records.RecordError, match="pretrain has no record.*run pretrain"):
        run.train_run("pretrain", as_recorded=True)


# ---------------------------------------------------------------- load_or_train


def test_load_or_train_trains_what_is_missing_and_loads_it_the_next_time(tiny_runs, monkeypatch):
    net, record = run.load_or_train("pretrain")
    monkeypatch.setattr(run, "train_run", None)
    again, same_record = run.load_or_train("pretrain")
    assert same_record == record and same_weights(net, again)


@pytest.mark.parametrize("off, agrees", [(0.0009, True), (-0.0011, False), (0.0011, False)])
def test_what_is_measured_is_what_the_record_says(pretrained, monkeypatch, off, agrees):
    record = records.read_record("pretrain")
    monkeypatch.setattr(train_utils, "test",
                        lambda net, verbose: record["test_accuracy"] + off)
    if agrees:
        net, same_record, accuracy = run.measured("pretrain")
        assert same_weights(net, run.load_or_train("pretrain")[0]) and same_record == record
        assert accuracy == record["test_accuracy"] + off
    else:
        with pytest.raises(records.RecordError, match="pretrain has an accuracy of .*recorded is"):
            run.measured("pretrain")


def test_load_or_train_loads_into_a_net_in_place(pretrained):
    net = run.build("pretrain")
    assert run.load_or_train("pretrain", net)[0] is net
    assert same_weights(net, load_weights(run.build("pretrain"), records.weights_path("pretrain")))


@pytest.mark.parametrize("value", ["0", "", "false"])
def test_without_retrain_nothing_is_trained(pretrained, monkeypatch, value):
    monkeypatch.setenv("RETRAIN", value)
    monkeypatch.setattr(run, "train_run", None)
    assert run.load_or_train("pretrain")[1] == records.read_record("pretrain")


def test_retrain_trains_into_build_once_and_touches_nothing_shipped(
    pretrained, monkeypatch, tmp_path
):
    shipped = {path: (tmp_path / path).read_bytes() for path in files_in(tmp_path)}
    trained, train_run = [], run.train_run
    monkeypatch.setattr(
        run, "train_run", lambda name, folder: trained.append(name) or train_run(name, folder)
    )
    monkeypatch.setenv("RETRAIN", "1")
    for _ in range(2):
        run.load_or_train("pretrain")
    assert trained == ["pretrain"]
    assert files_in(tmp_path) == set(shipped) | {
        "build/retrained/pretrain.pt",
        "build/retrained/pretrain.json",
    }
    assert all((tmp_path / path).read_bytes() == content for path, content in shipped.items())


def test_retrain_starts_a_run_from_its_retrained_parent(tiny_runs, monkeypatch):
    """Nothing is shipped here, so that there is no other parent."""
    monkeypatch.setenv("RETRAIN", "1")
    _, parent = run.load_or_train("pretrain")
    redefine("quantized", start_from="pretrain")
    assert run.load_or_train("quantized")[1]["start_from_sha256"] == parent["weights_sha256"]
    assert not records.SHIPPED.exists() and not records.weights_path("pretrain").exists()


# ---------------------------------------------------------------- how long it takes


def test_time_needed_is_that_of_all_steps_and_a_quarter_more_with_a_teacher(
    tiny_runs, monkeypatch
):
    monkeypatch.setattr(run, "seconds_a_step", lambda net, batch_size: batch_size / 64)
    assert seconds_needed(["pretrain"]) == 50_000 / 64
    assert seconds_needed(["pretrain", "iterative"]) == 4 * 50_000 / 64
    redefine("quantized", teacher="pretrain", held_out=10_000)
    assert seconds_needed(["quantized"]) == 40_000 / 64 * 1.25


def test_a_network_twice_as_wide_takes_four_times_as_long(tiny_runs, monkeypatch):
    monkeypatch.setattr(run, "seconds_a_step", lambda net, batch_size: batch_size / 64)
    alone = seconds_needed(["quantized"])
    redefine("iterative", width=32)
    redefine("quantized", teacher="iterative")
    assert seconds_needed(["quantized"]) == 2 * alone
    redefine("quantized", teacher=None, width=32)
    assert seconds_needed(["quantized"]) == 4 * alone


@pytest.mark.parametrize("seconds, shown", [
    (50, "a minute"), (89 * 60, "89 minutes"), (2.5 * 3600, "2.5 hours")])
def test_what_it_takes_is_announced(tiny_runs, monkeypatch, capsys, seconds, shown):
    monkeypatch.setattr(run, "seconds_needed", lambda names: seconds)
    run.announce(["pretrain", "quantized"])
    assert capsys.readouterr().out.startswith(
        f"pretrain, quantized: at most about {shown} of training on ")
