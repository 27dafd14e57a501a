"""What the notebooks show: plots that take data and an Axes, Markdown tables, and source code."""

import inspect
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib import ticker

SIZE = (5, 3)  # inches
DPI = 150  # pixels an inch, enough for print

# Okabe and Ito's colours, darkest first; each comes with its own line style and marker, for
# greyscale.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")


def style(i):
    """Return the plot keywords of the i-th series: a colour with its own line style and marker."""
    return {"color": COLORS[i % 5],
            "linestyle": LINES[i % 5],
            "marker": MARKERS[i % 8],
            "markersize": 4}


def axes(columns=1):
    """Return one 5 x 3 inch Axes, or a row of `columns` of them."""
    _, made = plt.subplots(
        1, columns, figsize=(SIZE[0] * columns, SIZE[1]), dpi=DPI, layout="constrained"
    )
    return made


def percent(fraction):
    """Return a fraction as a percentage with two decimals: 0.9151 gives '91.51'."""
    return f"{100 * float(fraction):.2f}"


def signed(difference):
    """Return a difference of fractions in points, with its sign: 0.0012 gives '+0.12'."""
    return f"{100 * float(difference):+.2f}"


def points(difference):
    """Return a difference of two fractions as words: 0.0012 gives '+0.12 points'."""
    return f"{signed(difference)} points"


# ---------------------------------------------------------------- tables and source


def answer(text, in_short=None):
    """Display an answer, Markdown of any line breaks; in_short: its numbers, for the cover's table.
    """
    display(Markdown(f"**Answer.** {' '.join(text.split())}"),
            metadata={"in_short": in_short} if in_short else None)


def open_place():
    """Hold a place for what a later cell finds; return its handle, for `update` or show_in."""
    return display(Markdown("*Shown when all cells have run.*"), display_id=True)


def show_in(place, ax):
    """Show the figure of `ax` in `place`, from open_place, and not below the cell that draws it."""
    place.update(ax.figure)
    plt.close(ax.figure)


def paragraph(text):
    """Display a paragraph, Markdown of any line breaks."""
    display(Markdown(" ".join(text.split())))


def table(header, rows, text_columns=1):
    """Return a Markdown table to be displayed: `header` of strings, `rows` of cells.

    text_columns: how many columns, from the left, are text and aligned left; the others are
    numbers.
    """
    rule = [":--"] * text_columns + ["--:"] * (len(header) - text_columns)
    lines = ("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *rows])
    return Markdown("\n".join(lines))


def show_source(*objects):
    """Display the source of functions or classes, as their modules hold it, highlighted."""
    for one in objects:
        source = textwrap.dedent(inspect.getsource(one)).rstrip()
        display(Markdown(f"```python\n{source}\n```"))


# ---------------------------------------------------------------- section 1


def plot_loss(losses, ax):
    """Draw log10 of each loss against steps. losses: {label: array of step 0, 1, ...}; returns ax.
    """
    for i, (label, values) in enumerate(losses.items()):
        # an exact 0 has no logarithm; 1e-32 is below any rounding here
        shown = np.maximum(values, 1e-32)
        every = max(len(values) // 8, 1)
        ax.plot(np.log10(shown), label=label, markevery=(i * every // 5, every), **style(i))
    ax.set(xlabel="step", ylabel=r"$\log_{10} L$")
    ax.locator_params(axis="x", integer=True)
    if len(losses) > 1:
        ax.legend(fontsize=8, handlelength=3)
    return ax


def _draw_float(ax, y):
    ax.axhline(y, color="0.4", linestyle="--", linewidth=1, label="float")


def plot_curves(curves, ax, xlabel, ylabel, baseline=None):
    """Draw anything against anything. curves: {label: {x: y}}, at most five; returns ax.

    baseline: the y of the float model, drawn as a dashed line.
    """
    for i, (label, points) in enumerate(curves.items()):
        x = sorted(points)
        ax.plot(x, [points[k] for k in x], label=label, **style(i))
    if baseline is not None:
        _draw_float(ax, baseline)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8, handlelength=3)
    return ax


def plot_groups(W, ax, largest=None):
    """Draw |W|, (groups, elements), as shades of grey, a cross where W is 0; returns ax.

    largest: the magnitude that is black, that of W if None.
    """
    shades = ax.imshow(np.abs(W), cmap="Greys", vmin=0, vmax=largest, aspect="auto")
    group, element = np.nonzero(np.asarray(W) == 0)
    ax.scatter(element, group, marker="x", s=16, linewidth=1, color=COLORS[1])
    ax.set(xlabel="element of the group",
           ylabel="group",
           xticks=range(W.shape[1]),
           yticks=range(W.shape[0]))
    ax.set_xticklabels(range(1, W.shape[1] + 1))
    ax.set_yticklabels(range(1, W.shape[0] + 1))
    ax.figure.colorbar(shades, ax=ax, label="magnitude")
    return ax


# ---------------------------------------------------------------- Labs 2 and 3


def plot_accuracy(curves, ax, xlabel, baseline=None):
    """Draw accuracy in % against anything. curves: {label: {x: fraction}}; returns ax.

    baseline: the float model's accuracy, a fraction, drawn as a dashed line.
    """
    percentages = {
        label: {x: 100 * y for x, y in points.items()} for label, points in curves.items()
    }
    plot_curves(
        percentages, ax, xlabel, "accuracy (%)", None if baseline is None else 100 * baseline
    )
    ax.locator_params(axis="x", integer=True)
    return ax


def plot_layers(series, ax, ylabel, ylim=None):
    """Draw fractions of layers as bars in %; return ax.

    series: {label: {layer: fraction}}; ylim: (lowest, highest), in %.
    """
    width = 0.8 / len(series)
    for i, (label, layers) in enumerate(series.items()):
        x = np.arange(len(layers)) + (i - (len(series) - 1) / 2) * width
        ax.bar(x,
               [100 * value for value in layers.values()],
               width,
               label=label,
               color=COLORS[i % 5],
               alpha=0.85,
               hatch=("", "///", "...")[i % 3],
               edgecolor="white")
    names = [
        name.replace("body_op.", "").removesuffix(".0") for name in next(iter(series.values()))
    ]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set(ylabel=ylabel, ylim=ylim)
    if len(series) > 1:  # above the axes, where no bar is
        ax.legend(
            fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), frameon=False
        )
    return ax


# ---------------------------------------------------------------- files


def frontier(points):
    """Return the names of {name: (bytes, accuracy)} that no other point beats in both, by size."""
    best, names = -1.0, []
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            best = accuracy
            names.append(name)
    return names


def plot_frontier(points, ax, baseline=None, published=None):
    """Draw accuracy in % against bytes, on a log axis, the frontier joined, and numbered in a key
    of its names; returns ax.

    points: {name: (bytes, fraction)}; baseline: the float model's accuracy, a fraction; published:
    a dict as points, of what others report.
    """
    names = frontier(points)
    others = [points[name] for name in points if name not in names]
    if others:
        ax.plot(*zip(*((size, 100 * a) for size, a in others)), label="beaten in both",
                color="0.6", marker="x", linestyle="none", markersize=5)
    best = [(points[name][0], 100 * points[name][1]) for name in names]
    ax.plot(*zip(*best), label="frontier", **style(1))
    for number, point in enumerate(best, 1):
        ax.annotate(str(number), point, (-2, 5), fontsize=7, ha="center",
                    textcoords="offset points")
    ax.text(0.98, 0.03, "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1)),
            fontsize=7, ha="right", va="bottom", multialignment="left", transform=ax.transAxes)
    for i, name in enumerate(published or {}):
        size, accuracy = published[name]
        ax.plot([size], [100 * accuracy], label=name, color=COLORS[2], linestyle="none",
                marker=("*", "P", "X")[i % 3], markersize=9, markerfacecolor="none")
    if baseline is not None:
        _draw_float(ax, 100 * baseline)
    ax.set(xscale="log", xlabel="size of the file (kB)", ylabel="test accuracy (%)")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(lambda size, _: f"{size / 1000:g}")
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.margins(x=0.15)
    ax.legend(fontsize=8)
    return ax
