"""Lab 1's notebook: functions against independent oracles, results against other solvers, stored
outputs.
"""

import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import matplotlib
import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Lasso

ROOT = Path(__file__).resolve().parents[1]
W_STAR = np.array([0.0, -3.0, 0.0, 0.0, 1.0])

vectors = arrays(float, 5, elements=st.floats(-5, 5, allow_subnormal=False))
thresholds = st.floats(0.001, 3)
exhaustive = settings(max_examples=60)


def read():
    return nbformat.read(ROOT / "lab1_sparse_linear.ipynb", as_version=4)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Run the notebook's code cells once, its asserts included; return everything that they define.

    Alone in an empty folder, with nothing of ours to import, as it is handed in. `answers` are the
    texts of its answers, in order.
    """
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    names = {"answers": []}
    place = SimpleNamespace(update=lambda text: names["answers"].append(text.data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setattr(sys, "path", [folder for folder in sys.path
                                    if ROOT not in (Path(folder).resolve(),
                                                    Path(folder).resolve().parent)])
        patch.setattr(IPython.display, "display", lambda *_, **__: place)
        for cell in read().cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"cell {cell.id}", "exec"), names)
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)
    return SimpleNamespace(**names)


def prox_objective(z, v, t, penalized):
    """Return 0.5 |z - v|^2 + t times the L1 norm of the penalized elements."""
    return 0.5 * np.sum((z - v) ** 2) + t * np.sum(np.abs(z[list(penalized)]))


# ---------------------------------------------------------------- data, (a) and (b)


def test_data_is_the_assignments(lab):
    assert lab.X.tolist() == [[1, -2, -1, -1, 1], [2, -1, 2, 0, -2], [-1, 0, 2, 2, 1]]
    assert lab.y.tolist() == [7, 1, 1]
    assert lab.mu == 0.02
    for runs in ({0: lab.plain, 1: lab.projected}, lab.subgradient, lab.proximal, lab.trimmed):
        for run in runs.values():
            assert run.shape == (201, 5) and not run[0].any()
    assert tuple(lab.subgradient) == tuple(lab.proximal) == (0.2, 0.5, 1, 2)
    assert tuple(lab.trimmed) == (1, 2, 5, 10)


def test_loss_is_a_sum_over_the_points(lab):
    W = [0.5, -1.0, 2.0, 0.25, -3.0]
    by_hand = sum((sum(x * w for x, w in zip(row, W)) - t) ** 2 for row, t in zip(lab.X, lab.y))
    assert lab.loss(np.array(W)) == pytest.approx(by_hand, rel=1e-14)


def test_gradient_is_the_central_difference(lab):
    for W in np.random.default_rng(0).normal(0, 3, (20, 5)):
        numeric = [(lab.loss(W + 1e-3 * e) - lab.loss(W - 1e-3 * e)) / 2e-3 for e in np.eye(5)]
        np.testing.assert_allclose(lab.gradient(W), numeric, atol=1e-8)


def test_limit_of_mu_separates_convergence_from_divergence(lab):
    below, above = (
        lab.descend(lambda W: W - m * lab.limit * lab.gradient(W), steps=2000)[-1]
        for m in (0.99, 1.01)
    )
    assert lab.loss(below) < 1e-20 and lab.loss(above) > 1e6


def test_plain_descent_reaches_the_minimum_norm_solution(lab):
    by_lstsq = np.linalg.lstsq(lab.X, lab.y, rcond=None)[0]  # of minimum norm by its documentation
    np.testing.assert_allclose(lab.plain[-1], by_lstsq, atol=1e-10)
    np.testing.assert_allclose(lab.plain[-1], [0.7476, -2.3894, 0.1226, -0.0312, 1.5649], atol=1e-4)
    assert lab.loss(lab.plain[-1]) < 1e-25


# ---------------------------------------------------------------- (c)


@exhaustive
@given(v=vectors, k=st.integers(0, 5))
def test_keep_largest_is_the_nearest_sparse_vector(lab, v, k):
    kept = lab.keep_largest(v, k)
    nearest = min(np.sum(np.delete(v, s) ** 2) for s in itertools.combinations(range(5), k))
    assert np.count_nonzero(kept) <= k
    assert np.all((kept == v) | (kept == 0))
    assert np.sum((v - kept) ** 2) == pytest.approx(nearest, abs=1e-12)


def test_keep_largest_breaks_ties_by_position(lab):
    assert lab.keep_largest(np.array([1.0, -2.0, 2.0, -2.0, 0.0])).tolist() == [0, -2, 2, 0, 0]


def test_only_one_sparse_solution_is_exact(lab):
    exact = []
    for size in range(3):
        for s in itertools.combinations(range(5), size):
            A = lab.X[:, list(s)]
            residual = lab.y - A @ np.linalg.pinv(A) @ lab.y
            if residual @ residual < 1e-12:
                exact.append(s)
    assert exact == [(1, 4)]
    np.testing.assert_allclose(lab.X @ W_STAR, lab.y, atol=1e-14)
    np.testing.assert_allclose(lab.W_star, W_STAR, atol=1e-12)
    np.testing.assert_allclose(lab.projected[-1], W_STAR, atol=1e-12)


# ---------------------------------------------------------------- (d) and (e)


@exhaustive
@given(v=vectors, t=thresholds)
def test_soft_threshold_is_the_numerical_prox(lab, v, t):
    ours = lab.soft_threshold(v, t)
    for value, z in zip(v, ours):
        found = minimize_scalar(
            lambda z: 0.5 * (z - value) ** 2 + t * abs(z),
            bounds=(-6, 6),
            method="bounded",
            options={"xatol": 1e-10},
        ).x
        assert z == pytest.approx(found, abs=1e-5)
    assert np.all((ours == 0) == (np.abs(v) <= t))  # exact zeros, the tie included


@pytest.mark.parametrize("lam", [0.2, 0.5, 1.0, 2.0])
def test_closed_form_is_what_lasso_finds(lab, lam):
    lasso = Lasso(alpha=lam / (2 * len(lab.y)), fit_intercept=False, tol=1e-14, max_iter=200_000)
    found = lasso.fit(lab.X, lab.y).coef_
    np.testing.assert_allclose(lab.closed_form(lam), found, atol=1e-6)
    np.testing.assert_allclose(
        lab.descend(lab.proximal_step(lam), steps=1000)[-1], found, atol=1e-6
    )


def test_proximal_runs_after_200_steps(lab):
    np.testing.assert_allclose(lab.proximal[2.0][-1], [0, -2.8, 0, 0, 5 / 6], atol=1e-10)
    assert lab.loss(lab.proximal[2.0][-1]) == pytest.approx(0.3667, abs=1e-4)
    assert [int(np.sum(run[-1] == 0)) for run in lab.proximal.values()] == [1, 3, 3, 3]


def test_subgradient_step_descends_the_objective_where_it_is_smooth(lab):
    W, lam = np.array([1.0, -2.0, 0.5, 3.0, -1.0]), 0.7
    slope = [
        (lab.objective(W + 1e-3 * e, lam) - lab.objective(W - 1e-3 * e, lam)) / 2e-3
        for e in np.eye(5)
    ]
    np.testing.assert_allclose((W - lab.subgradient_step(lam)(W)) / lab.mu, slope, atol=1e-8)


def test_subgradient_runs_hold_no_zero_and_stay_off_the_minimum(lab):
    for lam, run in lab.subgradient.items():
        assert not np.any(run[1:] == 0)
        assert lab.objective(run[-1], lam) > lab.objective(lab.closed_form(lam), lam) + 1e-3


# ---------------------------------------------------------------- (f)


@exhaustive
@given(v=vectors, t=thresholds)
def test_trimmed_prox_is_the_best_over_all_supports(lab, v, t):
    # The trimmed penalty is the least over all choices of two free elements; each choice alone is
    # an easy prox.
    best = np.inf
    for penalized in itertools.combinations(range(5), 3):
        z = v.copy()
        for j in penalized:
            z[j] = max(v[j] - t, 0) if v[j] > 0 else min(v[j] + t, 0)
        best = min(best, prox_objective(z, v, t, penalized))
    ours = lab.trimmed_soft_threshold(v, t)
    smallest = np.argsort(np.abs(ours))[:3]
    assert prox_objective(ours, v, t, smallest) == pytest.approx(best, abs=1e-10)


def test_trimmed_runs_end_at_the_sparse_solution(lab):
    for run in lab.trimmed.values():
        np.testing.assert_allclose(run[-1], W_STAR, atol=1e-12)
        assert np.flatnonzero(run[-1]).tolist() == [1, 4]


def test_since_finds_the_last_change(lab):
    run = np.array([[1.0], [0.0], [1.0], [0.0], [0.0]])
    assert lab.since(run, lambda W: W[0] == 0) == 3
    with pytest.raises(AssertionError, match="last step"):
        lab.since(run, lambda W: W[0] == 1)


# ---------------------------------------------------------------- figures and the stored notebook


def test_an_exact_zero_loss_can_be_drawn(lab):
    with np.errstate(all="raise"):
        ax = lab.plot_loss({"exact": np.array([1.0, 1e-30, 0.0])}, lab.axes())
    assert np.all(np.isfinite(ax.lines[0].get_ydata()))
    matplotlib.pyplot.close("all")


def test_code_that_is_shown_is_short():
    for cell in read().cells:
        hidden = {"remove-cell", "remove-input"} & set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and not hidden:
            assert len(cell.source.splitlines()) <= 15, cell.id


def test_stored_answers_are_those_of_a_run_and_hold_the_right_numbers(lab):
    """An answer stands in its place, before what it is found with; what belongs to it, after."""
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    stored = [cell.outputs[0].data["text/markdown"] for cell in code
              if cell.source == "answer = open_answer()"]
    assert stored == lab.answers and len(stored) == 6
    assert all(1 <= len(re.findall(r"[.!](?= |$)", text.replace("**", ""))) <= 2 for text in stored)
    more = [cell.outputs[0].data["text/markdown"] for cell in code if "fill(answer" in cell.source
            and "def fill" not in cell.source]
    a, b, c, d, e, f = (f"{one} {rest}" for one, rest in zip(stored, more, strict=True))
    assert f"below {2 / np.linalg.norm(2 * lab.X.T @ lab.X, 2):.4f};" in a
    assert f"magnitude {np.abs(np.linalg.pinv(lab.X) @ lab.y).min():.5f}" in b
    assert "[0, -3, 0, 0, 1]" in c and f"loss {2 / 7:.4f}" in c
    for run in lab.subgradient.values():
        assert f"{np.sum((lab.X @ run[-1] - lab.y) ** 2):.4f}" in d
    assert "[0, -2.8, 0, 0, 0.8333]" in e and f"{11 / 120 * 2**2:.4f}" in e
    assert "76, 39, 16 and 8" in f and "84, 43, 16 and 6" in f


def test_questions_and_points_are_the_assignments():
    titles = [cell.source.splitlines()[0] for cell in read().cells if cell.source.startswith("#")]
    assert titles[0] == "# 2 Lab 1: Sparse optimization of a linear model (30 points)"
    assert [(t[3:6], t.rsplit("(", 1)[1]) for t in titles[1:]] == [
        (f"({q})", f"{points} points)") for q, points in zip("abcdef", (4, 3, 6, 5, 6, 6))]


@pytest.mark.parametrize("question, figures", [("b", 1), ("c", 1), ("d", 3), ("e", 3), ("f", 3)])
def test_both_kinds_of_figure_are_stored_for_each_question(question, figures):
    images = [
        output
        for cell in read().cells
        if cell.cell_type == "code" and cell.id == f"{question}-run"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == figures
