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


def test_losses_are_drawn_as_their_logarithm_also_where_they_are_zero(ax):
    figures.plot_loss({"a": np.array([100.0, 1e-3, 0.0]), "b": np.array([1.0])}, ax)
    first, second = ax.get_lines()
    assert first.get_ydata().tolist() == [2, -3, -32] and second.get_ydata().tolist() == [0]


def test_layers_are_bars_in_percent_beside_each_other(ax):
    layers = {"head_conv.0": 0.25, "body_op.0.conv1.0": 0.5, "final_fc": 1.0}
    figures.plot_layers({"a": layers, "b": dict.fromkeys(layers, 0.1)}, ax, "zeros (%)", (0, 100))
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[25, 50, 100], [10, 10, 10]]
    edges = sorted(bar.get_x() for bars in ax.containers for bar in bars)
    assert np.diff(edges).min() == pytest.approx(0.4)  # the width of a bar: none covers another
    names = [text.get_text() for text in ax.get_xticklabels()]
    assert names == ["head_conv", "0.conv1", "final_fc"]


def test_a_row_of_axes_is_as_wide_as_its_plots_together():
    assert figures.axes().figure.get_size_inches().tolist() == [5, 3]
    pair = figures.axes(2)
    assert len(pair) == 2 and pair[0].figure.get_size_inches().tolist() == [10, 3]
    plt.close("all")


def test_fractions_are_shown_as_percentages_and_differences_as_points():
    assert figures.percent(0.91514) == "91.51" and figures.percent(np.float32(1)) == "100.00"
    assert (figures.signed(0.0012), figures.signed(-0.5)) == ("+0.12", "-50.00")
    assert figures.points(-0.0012) == "-0.12 points"


def test_a_table_has_its_text_at_the_left_and_its_numbers_at_the_right():
    rows = [["a", "b", 1], ["c", "d", 0.5]]
    assert figures.table(["run", "what", "%"], rows).data == (
        "| run | what | % |\n| :-- | --: | --: |\n| a | b | 1 |\n| c | d | 0.5 |")
    assert "\n| :-- | :-- | --: |\n" in figures.table(["run", "what", "%"], rows, 2).data


class Shown:
    """A class whose source is shown."""

    def method(self):
        return 1


def test_source_is_shown_as_its_module_holds_it_one_after_another(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda markdown: shown.append(markdown.data))
    figures.show_source(Shown, Shown.method)
    assert shown == [
        '```python\nclass Shown:\n    """A class whose source is shown."""\n\n'
        '    def method(self):\n        return 1\n```',
        '```python\ndef method(self):\n    return 1\n```']


def test_an_answer_says_so_and_carries_its_short_form(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda md, metadata: shown.append((md.data, metadata)))
    figures.answer("True, as measured.", in_short="true")
    figures.answer("It is.")
    assert shown == [("**Answer.** True, as measured.", {"in_short": "true"}),
                     ("**Answer.** It is.", None)]


def test_the_frontier_is_what_no_other_point_beats_in_both(ax):
    points = {"a": (3000, 0.9), "b": (2000, 0.85), "c": (2500, 0.8), "d": (4000, 0.9),
              "e": (5000, 0.95), "f": (2000, 0.7)}
    assert figures.frontier(points) == ["b", "a", "e"]
    by_hand = {n for n, (size, acc) in points.items()
               if not any((s <= size and q >= acc) and (s, q) != (size, acc)
                          for s, q in points.values())}
    assert set(figures.frontier(points)) == by_hand
    figures.plot_frontier(points, ax, 0.93)
    others, frontier, baseline = ax.lines
    assert sorted(others.get_xdata()) == [2000, 2500, 4000]
    assert list(frontier.get_xdata()) == [2000, 3000, 5000]
    assert list(frontier.get_ydata()) == pytest.approx([85, 90, 95])
    assert set(baseline.get_ydata()) == {93} and ax.get_xscale() == "log"
    *numbers, key = ax.texts
    assert [(text.get_text(), *text.xy) for text in numbers] == [
        ("1", 2000, 85), ("2", 3000, 90), ("3", 5000, 95)]
    assert key.get_text() == "1  b\n2  a\n3  e"


def test_what_others_report_is_a_point_of_its_own(ax):
    """It has its own marker and its name in the legend, and no part in our frontier."""
    figures.plot_frontier({"a": (3000, 0.9), "b": (2000, 0.85)}, ax, None,
                          {"X": (1000, 0.99), "Y": (1500, 0.5)})
    ours, *others = ax.lines
    assert list(ours.get_xdata()) == [2000, 3000]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in others] == [
        (1000, pytest.approx(99)), (1500, pytest.approx(50))]
    assert len({line.get_marker() for line in ax.lines}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["frontier", "X", "Y"]


def test_a_figure_is_shown_where_its_place_was_opened_and_not_where_it_is_drawn(monkeypatch, ax):
    shown = []

    class Place:
        update = staticmethod(shown.append)

    monkeypatch.setattr(figures, "display", lambda content, display_id: Place)
    figures.show_in(figures.open_place(), ax)
    assert shown == [ax.figure] and ax.figure.number not in plt.get_fignums()
