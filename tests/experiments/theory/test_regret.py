"""Assumption 4, the comparator and the regret bound of section 4.2 on small instances."""

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.theory import regret
from experiments.theory.regret import best_in_hindsight, clip, play_ngplus


@pytest.fixture(params=regret.STREAMS, ids=lambda make: make.__name__)
def stream(request):
    return request.param(np.random.default_rng(0), 120)


def inside(rng, stream):
    return clip(rng.normal(size=(stream.x.shape[1], stream.y.shape[1])), stream.radius * rng.random() ** 0.2)


def test_gradient_equals_finite_differences(stream):
    rng = np.random.default_rng(1)
    W, step, h = inside(rng, stream), inside(rng, stream), 1e-6
    plus, minus = (stream.losses(W + sign * h * step, 5)[4] for sign in (1, -1))
    assert np.sum(stream.gradient(W, 4) * step) == pytest.approx((plus - minus) / (2 * h), rel=1e-6)


def test_assumption_4_holds_with_the_stated_constants(stream):
    rng = np.random.default_rng(2)
    for t in range(60):
        X, Y = inside(rng, stream), inside(rng, stream)
        G = stream.gradient(Y, t)
        assert np.linalg.norm(G) <= stream.gradient_bound * (1 + 1e-12)
        change = stream.losses(X, t + 1)[t] - stream.losses(Y, t + 1)[t]
        curved = np.sum(G * (X - Y)) + stream.alpha / 2 * np.square(G.T @ (X - Y)).sum()
        assert change >= curved - 1e-12


def test_assumption_4_is_more_than_exp_concavity_for_a_softmax():
    rng = np.random.default_rng(3)
    x, W, label = rng.normal(size=4), rng.normal(size=(4, 3)), 1

    def loss(W):
        z = x @ W
        return np.log(np.exp(z).sum()) - z[label]

    probability = np.exp(x @ W) / np.exp(x @ W).sum()
    G = np.outer(x, probability - np.eye(3)[label])
    shift = np.outer(x, np.ones(3))  # a softmax does not see it, so the loss is flat along it
    assert loss(W + shift) == pytest.approx(loss(W))
    assert np.sum(G * shift) == pytest.approx(0, abs=1e-12)
    assert np.square(G.T @ shift).sum() > 0.1  # so no α > 0 satisfies the assumption


def test_best_point_equals_scipy(stream):
    best, gap = best_in_hindsight(stream, 60, np.zeros((stream.x.shape[1], stream.y.shape[1])))
    with np.errstate(invalid="ignore"):  # its line search may leave the ball, where a logarithm has no value
        found = minimize(
            lambda w: stream.losses(w.reshape(best.shape), 60).sum(),
            np.zeros(best.size),
            constraints={"type": "ineq", "fun": lambda w: stream.radius**2 - w @ w},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
    assert 0 <= gap <= 1e-6
    assert stream.losses(best, 60).sum() == pytest.approx(found.fun, abs=1e-5)


def test_best_point_says_when_it_was_not_found(stream):
    with pytest.raises(RuntimeError, match="after 2 steps"):
        best_in_hindsight(stream, 60, np.zeros((stream.x.shape[1], stream.y.shape[1])), steps=2)


def test_vectorized_play_is_the_online_newton_step_and_equals_ngplus_for_one_column(stream):
    ours, newton = play_ngplus(stream), play_ngplus(stream, vectorized=True)
    if stream.y.shape[1] == 1:
        np.testing.assert_array_equal(ours, newton)
    else:
        assert np.abs(ours - newton).max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_changes_the_draw_and_no_verdict(seed):
    rows, errata = regret.measure(seed, 100)
    outcomes = [verdict.verdict for verdict in regret.verdicts(rows, errata)]
    assert outcomes == ["reproduced", "not reproduced", "not reproduced"]


def test_a_run_leaves_its_files(tmp_path):
    errata = regret.run(1, tmp_path, 50)
    assert all(erratum.printed_is_wrong and erratum.corrected_is_right for erratum in errata)
    for name in ("regret.csv", "regret.png", "regret.svg", "errata.csv", "verdicts.csv"):
        assert (tmp_path / name).stat().st_size > 0
