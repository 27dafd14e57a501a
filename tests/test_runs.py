"""Every run as data: the assigned recipe, seeds, improved runs, the ablation."""

import dataclasses

import pytest
import torch
from torch import nn

from experiments.runs import REFERENCE, RUNS, get
from pruning import layer_sparsity, prune_before_epoch, sparsity
from training.recipe import Pruning

ASSIGNED = dict(
    symmetric=False,
    quantizer="minmax",
    teacher=None,
    keep="best",
    held_out=0,
    seed=0,
)
ASSIGNED_RECIPE = dict(
    epochs=20,
    batch_size=256,
    lr=0.002,
    schedule="constant",
    warmup=0.0,
    momentum=0.875,
    nesterov=False,
    weight_decay=1e-4,
    cutout=0,
    distill=0.0,
    test_every=1,
)
UNPRUNED = dict(method=None, hold_zeros=True)
PRUNED = dict(UNPRUNED, q=70.0)
EXPECTED = {  # start_from, Nbits, pruning
    "lab2c_oneshot": ("pretrain", None, dict(PRUNED, method="layer", epochs=0)),
    "lab2d_iterative": ("pretrain", None, dict(PRUNED, method="layer", epochs=10)),
    "lab2e_global": ("pretrain", None, dict(PRUNED, method="global", epochs=10)),
    **{f"lab3c_{n}bit": ("pretrain", n, UNPRUNED) for n in (6, 5, 4, 3, 2)},
    **{f"lab3d_{n}bit": ("lab2e_global", n, UNPRUNED) for n in (4, 3, 2)},
}


def config(name):
    return dataclasses.asdict(get(name))


def different(config, other):
    """Return the dotted names of the settings in which two configs differ."""
    names = set()
    for key in config:
        if isinstance(config[key], dict):
            names |= {f"{key}.{inner}" for inner in different(config[key], other[key])}
        elif config[key] != other[key]:
            names.add(key)
    return names


@pytest.mark.parametrize("name", EXPECTED)
def test_the_assigned_runs_have_the_assigned_recipe(name):
    found, (start_from, n_bits, pruning) = config(name), EXPECTED[name]
    expected = ASSIGNED | {"name": name, "start_from": start_from, "Nbits": n_bits}
    assert {key: found[key] for key in expected} == expected
    assert {key: found["recipe"][key] for key in ASSIGNED_RECIPE} == ASSIGNED_RECIPE
    assert {key: found["pruning"][key] for key in pruning} == pruning


def test_the_float_model_and_its_teacher_are_made_from_nothing_and_ship_their_last_epoch():
    for name, origin in {"teacher": (None, None, 32), "pretrain": (None, "teacher", 16)}.items():
        run = get(name)
        assert (run.start_from, run.teacher, run.width) == origin
        assert (run.Nbits, run.pruning.method, run.keep, run.held_out) == (None, None, "last", 0)
        assert bool(run.recipe.distill) == (run.teacher is not None)
    assert {run.width for name, run in RUNS.items() if "teacher" not in name} == {16}


def test_the_smallest_files_prune_further_step_by_step():
    for percent, q, parent in ((80, 80.0, "improved"), (82, 82.4, 80), (84, 84.0, 80),
                               (85, 85.2, 84)):
        name = f"lab3d_2bit_{percent}"
        assert config(name) == config("lab3d_2bit_improved") | {
            "name": name, "question": get(name).question, "start_from": f"lab3d_2bit_{parent}",
            "pruning": dataclasses.asdict(Pruning("global", q))}


def test_the_unmasked_run_is_the_assigned_one_but_for_its_masks():
    assert different(config("lab3d_2bit_unmasked"), config("lab3d_2bit")) == {
        "name", "question", "pruning.hold_zeros"}


def test_every_run_comes_after_the_runs_it_starts_and_learns_from():
    names = list(RUNS)
    pairs = [(run, parent) for run in RUNS.values() for parent in (run.start_from, run.teacher)
             if parent is not None]
    assert pairs and all(names.index(parent) < names.index(run.name) for run, parent in pairs)
    assert all(name == run.name for name, run in RUNS.items())


def test_a_teacher_is_named_where_a_recipe_distills_and_only_there():
    assert all((run.teacher is not None) == (run.recipe.distill > 0) for run in RUNS.values())


def test_every_reference_has_its_run():
    assert REFERENCE.keys() == {"pretrain", *EXPECTED} - {"lab3c_5bit", "lab3c_6bit"}
    assert REFERENCE.keys() <= RUNS.keys()


def test_an_unknown_run_is_refused_with_the_names_there_are():
    names = "teacher, pretrain, lab2c_oneshot, .*"
    with pytest.raises(ValueError, match=f"name must be one of {names}got 'lab2f'"):
        get("lab2f")


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
        prune_before_epoch(wide_net, get(name).pruning, epoch)
        seen.append(sparsity(wide_net))
        by_layer = list(layer_sparsity(wide_net).values())
        if epoch <= 10:
            assert (abs(by_layer[0] - by_layer[1]) < 0.002) == (name == "lab2d_iterative")
    assert seen == pytest.approx([0.07 * epoch for epoch in range(1, 11)] + [0.0] * 10, abs=0.002)


@pytest.mark.parametrize(
    "name, expected", [("lab2c_oneshot", 0.7), ("lab3c_4bit", 0.0), ("pretrain", 0.0)]
)
def test_other_runs_prune_once_or_not_at_all(name, expected, wide_net):
    prune_before_epoch(wide_net, get(name).pruning, 1)
    assert sparsity(wide_net) == pytest.approx(expected, abs=0.002)
    wide_net[0].weight.data.fill_(1)
    prune_before_epoch(wide_net, get(name).pruning, 2)
    assert layer_sparsity(wide_net)["0"] == 0


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("name", ["lab3d_2bit", "pretrain", "ablation_float_same"])
def test_a_seed_changes_nothing_else(name):
    """Its parents are those of the run itself, so that seeds differ in the fine-tuning alone."""
    other = {"name": f"{name}@2", "seed": RUNS[name].seed + 2}
    assert config(f"{name}@2") == config(name) | other


@pytest.mark.parametrize(
    "name", ["lab3d_2bit@", "lab3d_2bit@0", "lab3d_2bit@-1", "lab3d_2bit@x", "x@1",
             "lab3d_2bit@01", "lab3d_2bit@\u0663"]  # the same number, written otherwise
)
def test_a_seed_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"NAME@SEED, seed >= 1.*got '{name}'"):
        get(name)


# ---------------------------------------------------------------- improved runs and the ablation


IMPROVED = [name for name in RUNS if name.endswith("_improved")]


@pytest.mark.parametrize("name", IMPROVED)
def test_improved_runs_have_the_assigned_budget_and_choose_no_epoch(name):
    run, assigned = get(name), get(name.removesuffix("_improved"))
    assert (run.recipe.epochs, run.keep, run.held_out) == (assigned.recipe.epochs, "last", 0)
    assert (run.Nbits, run.pruning) == (assigned.Nbits, assigned.pruning)


def test_improved_runs_have_one_recipe_and_one_teacher():
    assert len(IMPROVED) > 1
    assert len({(get(name).recipe, get(name).teacher) for name in IMPROVED}) == 1


@pytest.mark.parametrize("lab", ["lab3c", "lab3d"])
def test_the_halves_of_the_improved_recipe_are_rate_and_step(lab):
    """Each is the assigned run but for its half; together, with distillation, the improved one."""
    named = {"name", "question", "keep"}
    rate, step, assigned = (config(f"{lab}_2bit{part}") for part in ("_rate", "_step", ""))
    improved = get(f"{lab}_2bit_improved")
    assert different(step, assigned) == named | {"quantizer"}
    assert all(setting.startswith("recipe.") for setting in different(rate, assigned) - named)
    assert rate["recipe"] == dataclasses.asdict(improved.recipe) | {"distill": 0.0}
    assert step["quantizer"] == improved.quantizer


ABLATION = [name for name in RUNS if name.startswith("ablation_")]


def test_the_float_ablation_takes_one_part_at_a_time():
    alone, same, wide = (config(f"ablation_float_{part}") for part in ("alone", "same", "wide"))
    named = {"name", "question"}
    assert different(same, alone) == named | {"recipe.distill", "teacher"}
    assert different(wide, same) == named | {"teacher"}
    assert (same["teacher"], wide["teacher"]) == ("ablation_float_alone", "ablation_teacher")
    assert different(config("ablation_teacher_uncut"), config("ablation_teacher")) == named | {
        "recipe.cutout"}
    uncut = config("ablation_float_uncut")
    assert different(uncut, wide) == named | {"teacher"}
    assert uncut["teacher"] == "ablation_teacher_uncut"
    shorter = named | {"held_out", "recipe.epochs"}
    assert different(wide, config("pretrain")) == shorter | {"teacher"}
    assert different(config("ablation_teacher"), config("teacher")) == shorter


@pytest.mark.parametrize("with_it, without, improved", [
    ("2bit_distill", "2bit_step", "lab3c_2bit_improved"),
    ("global_distill", "global_rate", "lab2e_global_improved"),
])
def test_the_ablation_has_the_improved_recipe_with_and_without_distillation(
    with_it, without, improved
):
    a, b = config(f"ablation_long_{with_it}"), config(f"ablation_long_{without}")
    assert different(a, b) == {"name", "question", "recipe.distill", "teacher"}
    assert b["recipe"]["distill"] == 0
    assert different(a, config(improved)) == {
        "name", "question", "held_out", "start_from", "teacher"}


def test_nothing_in_the_ablation_has_seen_the_images_that_it_is_tested_on():
    for run in map(get, ABLATION):
        assert (run.held_out, run.seed, run.keep) == (5000, 0, "last")
        seen = {run.start_from, run.teacher} - {None}
        assert all(get(parent).held_out == 5000 for parent in seen)
