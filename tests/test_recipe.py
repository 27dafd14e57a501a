"""Recipes and prunings are data: rates and percentages by hand, and what is out of range refused.
"""

import dataclasses

import pytest

from training.recipe import Pruning, Recipe


@pytest.mark.parametrize(
    "schedule, progress, warmup, expected",
    [
        ("constant", 0.0, 0.0, 0.4),
        ("constant", 0.99, 0.0, 0.4),
        ("constant", 0.05, 0.2, 0.1),
        ("step", 0.0, 0.0, 0.4),
        ("step", 0.4999, 0.0, 0.4),
        ("step", 0.5, 0.0, 0.04),
        ("step", 0.7499, 0.0, 0.04),
        ("step", 0.75, 0.0, 0.004),
        ("step", 0.99, 0.0, 0.004),
        ("cosine", 0.0, 0.0, 0.4),
        ("cosine", 0.5, 0.0, 0.2),
        ("cosine", 1 / 3, 0.0, 0.3),
        ("cosine", 1.0, 0.0, 0.0),
        ("cosine", 0.0, 0.1, 0.0),
        ("cosine", 0.05, 0.1, 0.2),
        ("cosine", 0.1, 0.1, 0.4),
        ("cosine", 0.55, 0.1, 0.2),
    ],
)
def test_learning_rate(schedule, progress, warmup, expected):
    recipe = Recipe(lr=0.4, schedule=schedule, warmup=warmup)
    assert recipe.lr * recipe.rate(progress) == pytest.approx(expected, abs=1e-12)


def test_the_defaults_are_the_assigned_fine_tuning():
    """From the assignment, not from the code: 20 epochs of SGD at a constant rate."""
    recipe, pruning = Recipe(), Pruning()
    assert dataclasses.asdict(recipe) == dict(
        epochs=20, batch_size=256, lr=0.002, schedule="constant", warmup=0.0, momentum=0.875,
        nesterov=False, weight_decay=1e-4, cutout=0, distill=0.0, temperature=1.0, test_every=1)
    assert Recipe(nesterov=True).nesterov and not Recipe(nesterov=False).nesterov
    assert recipe.rate(0.0) == recipe.rate(1.0) == 1
    assert [pruning.percentage(epoch) for epoch in (1, 2)] == [None, None] and pruning.holds(1)


def test_a_percentage_needs_a_method():
    with pytest.raises(ValueError, match="^method must be 'layer' or 'global', got None"):
        Pruning(q=70.0)
    with pytest.raises(ValueError, match="epochs must be 0 where method is None, got 2"):
        Pruning(epochs=2)
    assert Pruning("layer", 70.0)


@pytest.mark.parametrize("pruning, percentages, held", [
    (Pruning("layer", 70.0), [70, None, None, None], [1, 1, 1, 1]),
    (Pruning("global", 60.0, epochs=1), [60, None, None, None], [1, 1, 1, 1]),
    (Pruning("global", 60.0, epochs=3), [20, 40, 60, None], [0, 0, 1, 1]),
    (Pruning("global", 60.0, epochs=3, hold_zeros=False), [20, 40, 60, None], [0, 0, 0, 0]),
    (Pruning(hold_zeros=False), [None] * 4, [0] * 4),
], ids=str)
def test_a_pruning_reaches_its_percentage_in_equal_parts_and_holds_from_then_on(
    pruning, percentages, held
):
    epochs = range(1, 5)
    assert [pruning.percentage(epoch) for epoch in epochs] == [
        value if value is None else pytest.approx(value) for value in percentages]
    assert [pruning.holds(epoch) for epoch in epochs] == [bool(value) for value in held]


@pytest.mark.parametrize("data", [Recipe(), Pruning()])
def test_a_recipe_and_a_pruning_cannot_be_changed(data):
    for field in dataclasses.fields(data):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(data, field.name, getattr(data, field.name))


def test_percentages_need_not_be_whole():
    assert [Pruning("layer", 75.0, 10).percentage(e) for e in (1, 3, 10)] == [7.5, 22.5, 75.0]


@pytest.mark.parametrize("n_images, steps", [(50_000, 196), (256, 1), (257, 2), (1, 1)])
def test_the_last_batch_of_an_epoch_may_be_smaller(n_images, steps):
    assert Recipe(batch_size=256).steps(n_images) == steps
