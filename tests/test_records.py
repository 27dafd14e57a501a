"""Where a run's files lie, and records that are refused since they do not fit."""

import ast
import functools
import json

import pytest

from experiments import records, run
from tiny_runs import files_in, redefine

pytest_plugins = ["tiny_runs"]


def test_an_untrained_run_says_what_to_type():
    assert (
        records.not_trained("lab3c_2bit")
        == "not trained yet: python -m experiments run lab3c_2bit"
    )


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("name, weights, record", [
    ("pretrain", "pretrained_model.pt", "checkpoints/pretrain.json"),
    ("pretrain@1", "checkpoints/pretrain@1.pt", "checkpoints/pretrain@1.json"),
    ("lab3c_2bit", "checkpoints/lab3c_2bit.pt", "checkpoints/lab3c_2bit.json"),
    ("ablation_float_wide", "checkpoints/ablation/ablation_float_wide.pt",
     "checkpoints/ablation/ablation_float_wide.json"),
    ("ablation_long_2bit_step@3", "checkpoints/ablation/ablation_long_2bit_step@3.pt",
     "checkpoints/ablation/ablation_long_2bit_step@3.json"),
])
def test_shipped_files_lie_where_a_reader_looks_for_them(name, weights, record):
    assert records.weights_path(name) == records.ROOT / weights
    assert records.record_path(name) == records.ROOT / record


@pytest.mark.parametrize("name", ["pretrain", "lab3c_2bit", "ablation_float_wide@1"])
def test_in_a_folder_of_its_own_a_run_lies_at_the_top(name, tmp_path):
    assert records.weights_path(name, tmp_path) == tmp_path / f"{name}.pt"
    assert records.record_path(name, tmp_path) == tmp_path / f"{name}.json"


def test_a_run_on_held_out_images_is_trained_into_the_ablations_folder(pretrained, tmp_path):
    redefine("quantized", start_from="pretrain", held_out=28)
    before = files_in(tmp_path)
    record = run.train_run("quantized")
    assert files_in(tmp_path) - before == {
        "checkpoints/ablation/quantized.pt", "checkpoints/ablation/quantized.json"}
    assert records.read_record("quantized") == record
    records.weights_path("quantized").unlink()  # not shipped
    assert records.read_record("quantized") == record


# ---------------------------------------------------------------- records that do not fit


def alter_weights():
    path = records.weights_path("pretrain")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def alter_record(text):
    records.record_path("pretrain").write_text(text)


def without(key):
    record = json.loads(records.record_path("pretrain").read_text())
    del record[key]
    alter_record(json.dumps(record))


def test_what_does_not_fit_in_a_folder_is_trained_again_in_it(tiny_runs, tmp_path):
    folder = tmp_path / "into"
    run.train_run("pretrain", folder)
    redefine("pretrain", recipe={"lr": 0.5})
    with pytest.raises(records.RecordError, match=f"run pretrain --force --into {folder}$"):
        records.read_record("pretrain", folder)


@pytest.mark.parametrize("damage, complaint", [
    (lambda: redefine("pretrain", recipe={"lr": 0.5}),
     r"another config .*: \{'recipe.lr': \(0.01, 0.5\)\}; train it again: .* run pretrain --force"),
    (lambda: redefine("pretrain", Nbits=4), r"another config .*: \{'Nbits': \(None, 4\)\};"),
    (alter_weights, "pretrained_model.pt is not the file"),
    (lambda: records.weights_path("pretrain").unlink(), "pretrained_model.pt is not the file"),
    (lambda: alter_record('{"config"'), "pretrain.json is damaged"),
    (lambda: alter_record("{}"), "pretrain.json is damaged"),
    (lambda: alter_record('{"config": []}'), "pretrain.json is damaged"),
    (lambda: alter_record("[]"), "pretrain.json is damaged"),
    *((functools.partial(without, key), f"pretrain.json is damaged .*KeyError.*{key}")
      for key in ("weights_sha256", "best", "execution")),
], ids=["recipe", "run", "weights altered", "weights missing", "record cut off", "record empty",
        "config a list", "record a list", "no SHA-256", "no best", "no execution"])
@pytest.mark.parametrize("use", ["read_record", "load_or_train", "train a child"])
def test_a_record_that_does_not_fit_is_never_used(pretrained, use, damage, complaint):
    damage()
    with pytest.raises(records.RecordError, match=complaint):
        if use == "train a child":
            run.train_run("iterative")
        else:
            (records.read_record if use == "read_record" else run.load_or_train)("pretrain")


def test_a_setting_that_is_gone_is_another_config(pretrained):
    path = records.record_path("pretrain")
    record = json.loads(path.read_text())
    record["config"]["recipe"]["smoothing"] = 0.1
    path.write_text(json.dumps(record))
    with pytest.raises(records.RecordError, match=r"'recipe.smoothing': \(0.1, None\)"):
        records.read_record("pretrain")


def test_all_settings_that_differ_are_named_with_their_place(pretrained):
    redefine("pretrain", recipe={"lr": 0.5, "cutout": 8}, pruning={"hold_zeros": False}, seed=4)
    with pytest.raises(records.RecordError) as caught:
        records.read_record("pretrain")
    named = str(caught.value).partition("(recorded, now): ")[2].partition(";")[0]
    assert ast.literal_eval(named) == {
        "recipe.lr": (0.01, 0.5), "recipe.cutout": (0, 8),
        "pruning.hold_zeros": (True, False), "seed": (0, 4)}


def test_another_wording_of_the_question_is_no_other_config(pretrained):
    redefine("pretrain", question="the float model")
    assert records.read_record("pretrain")["config"]["question"] == "the start"


@pytest.mark.parametrize("place, name, default, other", [
    ("recipe", "distill", 0.0, 0.5), ("pruning", "hold_zeros", True, False), ("", "Nbits", None, 4),
    ("", "symmetric", False, True)])
def test_a_setting_that_came_later_counts_as_its_default(pretrained, place, name, default, other):
    path = records.record_path("pretrain")
    record = json.loads(path.read_text())
    settings = record["config"][place] if place else record["config"]
    assert settings.pop(name) == default
    path.write_text(json.dumps(record))
    assert records.read_record("pretrain")["config"] == record["config"]
    redefine("pretrain", **({place: {name: other}} if place else {name: other}))
    with pytest.raises(records.RecordError, match="another config") as caught:
        records.read_record("pretrain")
    assert f"'{place}{'.' * bool(place)}{name}': ({default}, {other})" in str(caught.value)


def test_a_run_whose_parent_was_trained_again_does_not_count(pretrained, tmp_path):
    folder = tmp_path / "into"
    for place in (None, folder):  # both from the shipped parent
        run.train_run("iterative", place or records.SHIPPED)
    alter_weights()
    path = records.record_path("pretrain")
    record = json.loads(path.read_text())
    record["weights_sha256"] = records.sha256(records.weights_path("pretrain"))
    path.write_text(json.dumps(record))
    for place in (None, folder):
        with pytest.raises(records.RecordError, match="trained from another pretrain; train it"):
            records.read_record("iterative", place)
    records.record_path("pretrain").unlink()  # gone, it speaks against nothing
    assert records.read_record("iterative", folder)["name"] == "iterative"
