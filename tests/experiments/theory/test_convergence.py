"""The constants and bounds of Theorems 2 and 3 on small instances."""

import numpy as np
import pytest

from experiments.theory import convergence
from experiments.theory.convergence import Constants, corrected_bound, minimise, printed_bound, slope_ratio


@pytest.fixture(params=convergence.PROBLEMS, ids=lambda make: make.__name__)
def problem(request):
    return request.param(np.random.default_rng(0))


def test_gradient_equals_finite_differences(problem):
    rng = np.random.default_rng(1)
    theta, step = rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 3, 6))
    gradient = problem.gradients_at_all(theta).transpose(0, 2, 1) @ problem.x / len(problem.x)
    h = 1e-6
    slope = (problem.objective(theta + h * step) - problem.objective(theta - h * step)) / (2 * h)
    assert np.sum(gradient * step) == pytest.approx(slope[0], rel=1e-7)


def test_constants_bound_what_is_seen(problem):
    rng = np.random.default_rng(2)
    theta, other = 3 * rng.normal(size=(2, 200, 3, 6))
    g = [problem.gradients_at_all(point) for point in (theta, other)]
    assert np.abs(g[0]).max() <= problem.slope_bound * (1 + 1e-12)
    change = (g[0] - g[1]).transpose(0, 2, 1) @ problem.x / len(problem.x)
    distance = np.linalg.norm(theta - other, axis=(1, 2))
    assert (np.linalg.norm(change, axis=(1, 2)) <= problem.smoothness * distance).all()


def test_measured_curvature_and_decay_are_within_the_bounds(problem):
    run = minimise(problem, 0.6, 300, np.random.default_rng(3))
    assert problem.h1 < run.h2 <= problem.h2
    constants = Constants(problem.smoothness, problem.h1, problem.h2, run.variance, run.initial_gap)
    means = np.cumsum(run.squared_gradient) / np.arange(1, 301)
    assert all(mean <= corrected_bound(constants, 0.6, k + 1) for k, mean in enumerate(means))


def test_bounds_at_one_step_without_noise():
    constants = Constants(2.0, 0.5, 3.0, 0.0, 0.7)
    assert corrected_bound(constants, 0.6, 1) == pytest.approx(2 * 2.0 * 9.0 / 0.25 * 0.7)
    assert printed_bound(constants, 0.6, 1) == pytest.approx(2.0 * 9.0 / 0.25)


def test_the_slope_exceeds_the_printed_bound_1477_fold_and_739_fold_with_the_printed_step():
    printed, corrected = slope_ratio()
    assert printed == pytest.approx(1477, abs=1)
    assert corrected < 1
    assert slope_ratio(factor=2.0)[0] == pytest.approx(739, abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_changes_the_draw_and_no_verdict(seed):
    rows, errata = convergence.measure(seed, 1000)
    outcomes = [verdict.verdict for verdict in convergence.verdicts(rows, errata)]
    assert outcomes == ["reproduced", "not reproduced", "reproduced", "not reproduced"]


def test_a_run_leaves_its_files(tmp_path):
    errata = convergence.run(1, tmp_path, 50)
    assert all(erratum.printed_is_wrong and erratum.corrected_is_right for erratum in errata)
    for name in ("convergence.png", "convergence.svg", "slope.png", "convergence.csv", "slope.csv", "verdicts.csv"):
        assert (tmp_path / name).stat().st_size > 0
