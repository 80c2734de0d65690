"""Each formula of the paper that is wrong as printed: the printed form misses, the corrected one does not."""

import numpy as np
import pytest

from experiments.records.claim_checks import Erratum
from experiments.theory import convergence, errata, regret

SEEDS = range(5)


def check(function, seed):
    erratum = function(np.random.default_rng(seed))
    assert erratum.printed > erratum.margin, erratum
    assert erratum.corrected <= erratum.tolerance, erratum


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", errata.FORMULAS, ids=lambda function: function.__name__)
def test_formula(function, seed):
    check(function, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", convergence.THEOREMS, ids=lambda function: function.__name__)
def test_global_convergence(function, seed):
    check(function, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", regret.THEOREM, ids=lambda function: function.__name__)
def test_regret(function, seed):
    check(function, seed)


def test_woodbury_as_printed_holds_at_damping_one():
    rng = np.random.default_rng(0)
    U = rng.normal(size=(6, 3))
    printed = np.eye(6) - U @ np.linalg.solve(np.eye(3) + U.T @ U, U.T)
    np.testing.assert_allclose(printed, np.linalg.inv(np.eye(6) + U @ U.T), atol=1e-12)


@pytest.mark.parametrize(("m", "n", "b"), [(6, 4, 3), (4, 6, 9)])
def test_kfac_and_ridge_shapes_fit_only_when_corrected(m, n, b):
    rng = np.random.default_rng(0)
    G, A, U = rng.normal(size=(m, n)), np.eye(n), rng.normal(size=(m, b))
    with pytest.raises(ValueError, match="mismatch"):
        A @ G @ np.eye(m)
    assert errata.ridge(U, G, 0.1).shape == (b, n)


def test_online_matrix_as_printed_has_the_wrong_shape():
    gradients = np.random.default_rng(0).normal(size=(3, 4, 2))
    with pytest.raises(ValueError, match="broadcast"):
        regret.potential(gradients, 1.0, printed_matrix=True)


def test_gfim_is_the_partial_trace_of_the_empirical_fisher():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(7, 3, 4))
    blocks = errata.empirical_fisher(gradients).reshape(4, 3, 4, 3)
    np.testing.assert_allclose(errata.left_gfim(gradients), np.einsum("jajb->ab", blocks), atol=1e-12)


def test_the_momentum_recursion_read_as_an_equation_never_moves():
    beta, previous = 0.8, 3.0  # L = βL' + (1−β)L has the one solution L = L'
    assert beta * previous / (1 - (1 - beta)) == pytest.approx(previous)


def test_row_sampling_is_crude_and_gets_better_like_a_sample():
    few, as_many, many = (
        errata.row_sampling_error(np.random.default_rng(0), q, m=64, b=16, n=8) for q in (32, 64, 6400)
    )
    assert few > as_many > 0.2
    assert many < as_many / 4


def test_an_erratum_notices_a_correction_that_is_wrong_and_a_print_that_is_right():
    swapped = Erratum(place="", measure="", printed=0.0, corrected=1.0, margin=0.1)
    assert not swapped.printed_is_wrong
    assert not swapped.corrected_is_right
    unknown = Erratum(place="", measure="", printed=np.nan, corrected=np.nan, margin=0.1)
    assert not unknown.printed_is_wrong
    assert not unknown.corrected_is_right


def test_a_margin_below_the_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"tolerance < margin.*self\.margin=0\.1"):
        Erratum(place="", measure="", printed=0.0, corrected=0.0, margin=0.1, tolerance=0.2)
