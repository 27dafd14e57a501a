"""Plots draw the numbers that they are given, where they belong."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from report import figures


@pytest.fixture
def ax():
    made = figures.axes()
    yield made
    plt.close("all")


def test_curves_are_drawn_in_the_order_of_x_each_in_its_own_style(ax):
    figures.plot_curves({"a": {3: 30.0, 1: 10.0, 2: 5.0}, "b": {1: 0.0}}, ax, "x", "y")
    first, second = ax.get_lines()
    assert first.get_xydata().tolist() == [[1, 10], [2, 5], [3, 30]]
    assert (
        first.get_linestyle() != second.get_linestyle()
        and first.get_marker() != second.get_marker()
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_accuracy_is_a_fraction_outside_and_a_percentage_in_the_figure(ax):
    figures.plot_accuracy({"net": {4: 0.5, 2: 0.25}}, ax, "bits", baseline=0.75)
    curve, baseline = ax.get_lines()
    assert curve.get_xydata().tolist() == [[2, 25], [4, 50]]
    assert set(baseline.get_ydata()) == {75} and baseline.get_linestyle() == "--"


def test_a_group_has_crosses_exactly_where_it_is_zero(ax):
    W = np.array([[0.0, -2.0, 1e-300], [0.5, 0.0, 0.0]])
    figures.plot_groups(W, ax, largest=4)
    (image,), (crosses,) = ax.get_images(), ax.collections
    assert np.array_equal(image.get_array(), np.abs(W)) and image.get_clim() == (0, 4)
    assert {(row, column) for column, row in crosses.get_offsets()} == {(0, 0), (1, 1), (1, 2)}


def test_sizes_stand_at_their_bytes_and_each_model_is_named_once():
    methods = {
        "range": {"a": (3000, 0.5), "b": (9000, 0.9)},
        "context": {"a": (2000, 0.5), "b": (8000, 0.8)},
    }
    with_c = methods | {"range": methods["range"] | {"c": (7000, 0.9)}}
    assert (
        figures.plot_size(with_c, figures.broken_axes(), 0.7)[0].texts[-1].get_text()
        == "1  a\n2  b\n3  c"
    )
    upper, lower = figures.plot_size(methods, figures.broken_axes(), 0.7, 0.95, 2500)
    drawn = [{line.get_label(): line for line in ax.get_lines()} for ax in (upper, lower)]
    assert [[lines[method].get_xydata().tolist() for method in methods] for lines in drawn] == [
        [[[9000, 90]], [[8000, 80]]], [[[3000, 50]], [[2000, 50]]]]
    assert set(drawn[0]["float"].get_ydata()) == {95} and "float" not in drawn[1]
    assert all(set(lines["2.5 kB"].get_xdata()) == {2500} for lines in drawn)
    assert [text.get_text() for text in upper.texts] == ["2", "1  a\n2  b"]
    assert [text.get_text() for text in lower.texts] == ["1"]
    assert (
        upper.get_xscale() == lower.get_xscale() == "log" and upper.get_xlim() == lower.get_xlim()
    )
